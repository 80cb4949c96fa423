"""Bytes of a training run, by arithmetic on the shapes of its parameters."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from longlive_jax.config import Experiment
from longlive_jax.eval.plan_trace import AXES, Traced, ranks
from longlive_jax.eval.trace import nbytes
from longlive_jax.io.leaves import flat
from longlive_jax.model.module import Network, count_parameters
from longlive_jax.parallel.rules import DIT_RULES, EVERYWHERE, TEXT_RULES, Rule, specs_of
from longlive_jax.types import DATA, SHARDS, PyTree

FLOAT32, BFLOAT16 = 4, 2
Rules = tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Whole:
  """A parameter that stays whole on every device, for its axis does not divide."""

  path: str
  shape: tuple[int, ...]
  nbytes: int


def leaf_specs(params: PyTree, rules: Rules, mesh: AbstractMesh) -> dict[str, P]:
  """Name -> how it is split."""
  specs = specs_of(params, rules, mesh)  # type: ignore[arg-type]
  found = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
  return dict(zip(flat(params), (spec for _, spec in found), strict=True))


def cuts(spec: P, mesh: AbstractMesh) -> int:
  """In how many parts an array is split."""
  names = [axes if isinstance(axes, tuple) else (axes,) for axes in spec if axes is not None]
  return math.prod(ranks(mesh, axes) for axes in names)


def split_bytes(params: PyTree, rules: Rules, mesh: AbstractMesh) -> tuple[int, int]:
  """Bytes on a device of the parameters that are split, and of those that are whole there."""
  parts, whole = 0, 0
  specs = leaf_specs(params, rules, mesh)
  for name, leaf in flat(params).items():
    count = cuts(specs[name], mesh)
    if count > 1:
      parts += nbytes(leaf) // count
    else:
      whole += nbytes(leaf)
  return parts, whole


def whole_leaves(params: PyTree, mesh: AbstractMesh) -> tuple[Whole, ...]:
  """Parameters that a rule would split, but whose axis does not divide; the largest first."""
  if ranks(mesh, SHARDS) == 1:
    return ()
  one = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  wanted, found = (leaf_specs(params, DIT_RULES, m) for m in (one, mesh))
  rows = [
    Whole(name, tuple(leaf.shape), nbytes(leaf))
    for name, leaf in flat(params).items()
    if wanted[name] != found[name]
  ]
  return tuple(sorted(rows, key=lambda row: -row.nbytes))


def optimizer_copies(experiment: Experiment) -> int:
  """Moments that AdamW keeps of each parameter."""
  return 1 if experiment.train.beta1 == 0.0 else 2


def device_bytes(
  experiment: Experiment, networks: dict[str, Network], mesh: AbstractMesh, traced: Traced
) -> dict[str, int]:
  """What a device holds at the peak of an update, by kind.

  Of the parameters in the compute dtype there are one layer's at a time. With accumulation there
  are two gradients, that of a part and the sum. Clips of the shapes world are drawn on every device
  with a text encoder of its own; with files it is split.
  """
  abstract = networks["dit"].abstract
  text_rules = EVERYWHERE if experiment.data.source == "shapes" else TEXT_RULES
  params = sum(split_bytes(abstract, DIT_RULES, mesh))
  width = jax.numpy.dtype(experiment.model.dtype).itemsize
  layer = count_parameters(abstract["layers"]) // experiment.model.layers
  found = {
    "parameters": params,
    "gradients": params * (2 if experiment.train.accumulate > 1 else 1),
    "optimiser": params * optimizer_copies(experiment),
    "average": params,
    "a layer's parameters in model.dtype": layer * width,
    "VAE": FLOAT32 * count_parameters(networks["vae"].abstract),
    "text encoder": sum(split_bytes(networks["text"].abstract, text_rules, mesh)),
  }
  if experiment.data.source == "shapes":
    found["bank of clips"] = clips_bytes(experiment)
  return found | {
    "kept by the forward": traced.kept // mesh.size,
    "a layer in its backward": traced.layer // mesh.size,
  }


def block_numbers(experiment: Experiment) -> int:
  """Elements of a block of latents."""
  cfg = experiment.model
  area = experiment.latent_height * experiment.latent_width
  return cfg.block_latents * area * cfg.vae.latent_channels


def clips_bytes(experiment: Experiment) -> int:
  """Latents of the bank of clips of data.source=shapes, bfloat16 and whole on every device."""
  data = experiment.data
  return BFLOAT16 * data.clips * data.clip_blocks * block_numbers(experiment)


def bank_bytes(experiment: Experiment) -> int:
  """Both banks of recycled errors on the host when they are full, bfloat16."""
  cfg = experiment.train.recycling
  entries = 2 * cfg.buckets * cfg.bucket_size
  return entries * BFLOAT16 * block_numbers(experiment) if cfg.enabled else 0


def bank_growth(experiment: Experiment) -> float:
  """Bytes that an update adds to both banks until they are full, on average."""
  cfg = experiment.train.recycling
  share = 1.0 - cfg.clean_share * (1.0 - cfg.clean_update_share)
  entries = 2 * experiment.train.batch * experiment.data.blocks
  return entries * share * BFLOAT16 * block_numbers(experiment) if cfg.enabled else 0.0


def parameter_traffic(
  experiment: Experiment, params: PyTree, mesh: AbstractMesh
) -> dict[str, float]:
  """Bytes that a device sends for parameters and gradients in an update, over rings.

  Parameters that are split are gathered in model.dtype, in forward and backward; their gradients
  are scattered in float32 and summed over "data". Those that are whole are summed over all.
  """
  parts, whole = split_bytes(params, DIT_RULES, mesh)
  shards, copies = ranks(mesh, SHARDS), mesh.shape[DATA]
  narrow = jax.numpy.dtype(experiment.model.dtype).itemsize / FLOAT32
  times = experiment.train.accumulate
  summed = parts * 2 * (copies - 1) / copies + whole * 2 * (mesh.size - 1) / mesh.size
  return {
    "parameters gathered": times * 2 * narrow * parts * (shards - 1),
    "gradients scattered": times * float(parts * (shards - 1)),
    "gradients summed": times * summed,
  }
