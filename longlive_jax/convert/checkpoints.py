"""A checkpoint of ours as leaves, checked against its own configuration."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.convert.adapters import read_adapters
from longlive_jax.convert.keys_lora import lora_shapes
from longlive_jax.convert.leaves import Leaves, checkpoint_leaves
from longlive_jax.convert.networks import NETWORKS, form_of
from longlive_jax.io.checkpoint import CONFIG, check_leaves, read_config, read_metadata
from longlive_jax.io.leaves import disk_places, flat
from longlive_jax.quant.policy import quantise_params
from longlive_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a folder of weights holds.

  Attributes:
    folder: its place.
    networks: name -> leaves.
    experiment: the configuration that was saved with it.
    metadata: what made it.
    files: all its files.
  """

  folder: Path
  networks: Mapping[str, Leaves]
  experiment: Experiment
  metadata: Mapping[str, Any]
  files: tuple[Path, ...]

  @property
  def is_packed(self) -> bool:
    """Whether the transformer is in NVFP4."""
    return self.metadata.get("dtype") == "nvfp4"


def open_checkpoint(folder: Path) -> Checkpoint:
  """Opens a checkpoint; reads no weights.

  Raises:
    FileNotFoundError: it is none.
    ValueError: its parts contradict each other, or it holds something else or nothing.
  """
  read_config(folder)
  metadata, experiment = read_metadata(folder), load_config(folder / CONFIG)
  found = sorted(path for path in folder.iterdir() if path.is_dir())
  odd = next((path.name for path in found if path.name not in NETWORKS), None)
  if odd is not None:
    raise ValueError(f"'{folder}' holds '{odd}', which is no network; move it away")
  if not found:
    raise ValueError(f"'{folder}' holds no weights")
  networks = {path.name: checkpoint_leaves(path) for path in found}
  for name, leaves in networks.items():
    check_leaves(
      name,
      {key: stored.shape for key, stored in leaves.items()},
      {
        place: leaf.shape if index is ... else leaf.shape[1:]
        for key, leaf in flat(shapes_of(experiment, name, metadata)).items()
        for place, index in disk_places(key, leaf.shape)
      },
    )
  files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
  return Checkpoint(folder, networks, experiment, metadata, files)


def shapes_of(experiment: Experiment, network: str, metadata: Mapping[str, Any]) -> PyTree:
  """Shapes of what a checkpoint of this configuration holds."""
  if network == "lora":
    rank = read_adapters(metadata)["rank"]
    return lora_shapes(experiment.model, rank, experiment.distill.layers)
  shapes = form_of(experiment, network).abstract
  if network != "dit" or metadata.get("dtype") != "nvfp4":
    return shapes
  if experiment.quant.linears != "nvfp4":
    raise ValueError(
      "metadata.json says that weights are in NVFP4, but config.json has quant.linears="
      f"{experiment.quant.linears}"
    )
  wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), shapes)
  return jax.eval_shape(functools.partial(quantise_params, quant=experiment.quant), wide)
