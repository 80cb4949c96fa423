"""Checkpoints on their way into networks: found by path or name, checked, merged with adapters."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.config.load import read_saved
from longlive_jax.config.walk import differences
from longlive_jax.convert.adapters import ADAPTERS, read_adapters
from longlive_jax.io.checkpoint import MismatchError, load_params, read_metadata
from longlive_jax.model.lora import adapter_shapes, merge
from longlive_jax.model.module import Network
from longlive_jax.model.narrow import narrowed
from longlive_jax.parallel.mesh import replicate
from longlive_jax.parallel.rules import RULES, Rule, placed
from longlive_jax.quant.policy import quantise_params
from longlive_jax.types import PyTree

ASSETS = Path(__file__).parent / "assets"
STORED_QUANT = ("linears", "layers", "weights", "weight_blocks")  # what NVFP4 weights depend on


def find_checkpoint(name: str, setting: str = "io.checkpoint") -> Path:
  """The folder of a checkpoint: a path, or the name of a set of weights that ships.

  Args:
    name: path or name.
    setting: that it comes from, for errors.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  for folder in (Path(name), ASSETS / name):
    if (folder / "config.json").is_file():
      return folder
  shipped = sorted(file.parent.name for file in ASSETS.glob("*/config.json"))
  raise FileNotFoundError(
    f"{setting}={name!r} is neither a checkpoint folder nor one of the shipped"
    f" weights: {', '.join(shipped) or 'none'}"
  )


def holds_nvfp4(experiment: Experiment) -> bool:
  """Whether `io.checkpoint` names weights that are stored in NVFP4."""
  name = experiment.io.checkpoint
  return bool(name) and read_metadata(find_checkpoint(name)).get("dtype") == "nvfp4"


def check_stored_quant(experiment: Experiment, folder: Path) -> None:
  """That weights which are stored in NVFP4 were quantised as the experiment says.

  Raises:
    ValueError: names the settings that differ.
  """
  here, there = experiment.quant, read_saved(folder / "config.json").quant
  for name in STORED_QUANT:
    if getattr(here, name) != getattr(there, name):
      raise ValueError(
        f"io.checkpoint='{folder}' holds weights in NVFP4 with quant.{name}="
        f"{getattr(there, name)!r}, not {getattr(here, name)!r}"
      )


def load_networks(
  experiment: Experiment,
  networks: dict[str, Network],
  folder: Path,
  mesh: Mesh | None = None,
  *,
  narrow: bool = False,
  rules: Mapping[str, Sequence[Rule]] = RULES,
) -> dict[str, PyTree]:
  """Parameters of these networks from a checkpoint, whatever dtype is stored; NVFP4 stays.

  Args:
    experiment: checked experiment.
    networks: name -> network.
    folder: of the checkpoint.
    mesh: on which the parameters are placed.
    narrow: as `narrowed` has them, so that nothing wider is ever in memory; otherwise float32.
    rules: how they are placed.

  Raises:
    ValueError: they do not fit the experiment (names the settings that differ), or are not finite.
  """
  abstract = {
    name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), net.abstract)
    for name, net in networks.items()
  }
  if narrow:
    abstract = jax.eval_shape(functools.partial(narrowed, cfg=experiment.model), abstract)
  if "dit" in networks and holds_nvfp4(experiment):
    check_stored_quant(experiment, folder)
    quantise = functools.partial(quantise_params, quant=experiment.quant)
    abstract["dit"] = jax.eval_shape(quantise, abstract["dit"])
  if mesh:
    abstract = {name: placed(tree, rules[name], mesh) for name, tree in abstract.items()}
  try:
    return load_params(folder, abstract)
  except MismatchError as error:
    saved = read_saved(folder / "config.json").model
    found = differences(saved, experiment.model)
    names = [f"model.{name}={there!r} there, {here!r} here" for name, there, here in found]
    raise ValueError(f"io.checkpoint='{folder}': {'; '.join([str(error), *names])}") from error


def adapters_for(experiment: Experiment) -> str:
  """What `io.adapters` names; with "auto" what weights without adapters say they are used with."""
  io = experiment.io
  if io.adapters != "auto" or not io.checkpoint:
    return "" if io.adapters == "auto" else io.adapters
  metadata = read_metadata(find_checkpoint(io.checkpoint))
  return "" if metadata.get("adapters") else str(metadata.get(ADAPTERS, ""))


def find_adapters(experiment: Experiment) -> Path | None:
  """The folder of the adapters of `io.adapters`; None without. Reads no weights.

  Raises:
    FileNotFoundError: there is no such checkpoint.
    ValueError: there are no weights to merge into, or they are packed or have adapters already.
  """
  name, checkpoint = adapters_for(experiment), experiment.io.checkpoint
  if not name:
    return None
  if not checkpoint:
    raise ValueError(f"io.adapters={name!r} needs io.checkpoint, the weights they are for")
  if read_metadata(find_checkpoint(checkpoint)).get("adapters"):
    raise ValueError(f"io.adapters={name!r}: io.checkpoint={checkpoint!r} has adapters merged in")
  if holds_nvfp4(experiment):
    raise ValueError(
      f"io.adapters={name!r} cannot be merged into NVFP4 weights; merge, then quantise, with"
      " launch.convert"
    )
  return find_checkpoint(name, "io.adapters")


def with_adapters(
  folder: Path | None, network: Network, params: PyTree, mesh: Mesh | None = None
) -> PyTree:
  """The transformer's parameters with the adapters in a folder, in their own dtype.

  Args:
    folder: from `find_adapters`.
    network: the transformer, declared.
    params: its parameters.
    mesh: on which they are.

  Raises:
    ValueError: the folder holds no adapters, or those of another model.
  """
  if folder is None:
    return params
  try:
    about, saved = read_adapters(read_metadata(folder)), read_saved(folder / "config.json")
    shapes = adapter_shapes(network.abstract, int(about["rank"]), saved.distill.layers)
    adapters = load_params(folder, {"lora": shapes})["lora"]
  except ValueError as error:
    raise ValueError(f"io.adapters='{folder}': {error}") from error
  return merge(params, replicate(adapters, mesh) if mesh else adapters, float(about["alpha"]))
