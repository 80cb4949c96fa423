"""The conversions into a checkpoint of ours: each is a job, which says what is to be written.

A job is made and checked before anything is written, and reads no weights: so what cannot be
converted is refused at once.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config, to_json
from longlive_jax.convert.adapters import ADAPTERS, read_adapters, with_adapters
from longlive_jax.convert.checkpoints import Checkpoint
from longlive_jax.convert.leaves import FLOATING, Leaves, cast, is_packed, quantised
from longlive_jax.convert.write import Progress, write_checkpoint
from longlive_jax.io.checkpoint import CONFIG


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be written.

  Attributes:
    networks: name -> leaves.
    config: the configuration that goes beside them, as JSON.
    metadata: what made them, as JSON.
    files: the foreign files that are read.
    inputs: the files of checkpoints that are read.
  """

  networks: Mapping[str, Leaves]
  config: Mapping[str, Any]
  metadata: Mapping[str, Any]
  files: Sequence[Path] = ()
  inputs: Sequence[Path] = ()

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves."""
    return sum(stored.nbytes for leaves in self.networks.values() for stored in leaves.values())

  @property
  def contents(self) -> str:
    """Networks and dtype in a few words."""
    dtype = self.metadata.get("dtype")
    return ", ".join(self.networks) + (f" in {dtype}" if dtype else "")

  def write(
    self, folder: str | Path, progress: Progress = lambda size: None, *, overwrite: bool = False
  ) -> None:
    """See `write_checkpoint`."""
    write_checkpoint(
      folder,
      self.networks,
      self.config,
      self.metadata,
      self.files,
      inputs=self.inputs,
      overwrite=overwrite,
      progress=progress,
    )

  def with_rest(self, rest: Checkpoint) -> "Job":
    """This job with the networks that it lacks taken from a checkpoint.

    Raises:
      ValueError: they have other sizes than this job's configuration says.
    """
    networks = {name: leaves for name, leaves in rest.networks.items() if name != "lora"}
    networks |= self.networks
    here, there = self.config["model"], saved_config(rest.experiment)["model"]
    for name in networks.keys() - self.networks.keys():
      sizes = (here, there) if name == "dit" else (here[name], there[name])
      if sizes[0] != sizes[1]:
        raise ValueError(
          f"--rest={rest.folder} has a {name} of another configuration: see --config"
        )
    metadata = self.metadata
    if "dit" not in self.networks and "dit" in networks:
      if rest.is_packed:
        raise ValueError(f"--rest={rest.folder} has a transformer in NVFP4; import it with --dit")
      metadata = {**rest.metadata, **metadata, "dtype": dtype_of(networks)}  # what it was made of
    metadata = {**metadata, "sources": rest.metadata.get("sources", [])}
    inputs = (*self.inputs, *rest.files)
    return dataclasses.replace(self, networks=networks, metadata=metadata, inputs=inputs)


def dtype_of(networks: Mapping[str, Leaves]) -> str:
  """The dtype of the transformer's matrices, or of what there is: "nvfp4", "bfloat16", "mixed"."""
  leaves = networks.get("dit") or next(iter(networks.values()))
  if is_packed(leaves):
    return "nvfp4"
  found = {str(s.dtype) for s in leaves.values() if len(s.shape) > 1 and s.dtype in FLOATING}
  return found.pop() if len(found) == 1 else "mixed"


def saved_config(experiment: Experiment) -> dict[str, Any]:
  """A configuration as JSON; it does not say where its weights came from."""
  config = json.loads(to_json(experiment))
  config["io"]["checkpoint"] = ""
  return config


def merge_job(base: Checkpoint, lora: Checkpoint) -> Job:
  """Adapters of one checkpoint go into the transformer of another.

  Raises:
    ValueError: the base has adapters already, is packed, or does not fit.
  """
  if "dit" not in base.networks:
    raise ValueError(f"'{base.folder}' has no transformer to merge into")
  if "lora" not in lora.networks:
    raise ValueError(f"'{lora.folder}' holds no adapters; import them with --lora alone")
  about, model = read_adapters(lora.metadata), base.experiment.model
  adapters = lora.networks["lora"]
  layers = lora.experiment.distill.layers
  dit = with_adapters(base.networks["dit"], adapters, about, base.metadata, model, layers)
  sources = lora.metadata.get("sources", [])
  metadata = {**base.metadata, "adapters": [{**about, "sources": sources}]}
  inputs = (*base.files, *lora.files)
  return Job({**base.networks, "dit": dit}, saved_config(base.experiment), metadata, inputs=inputs)


def quantise_job(source: Checkpoint, overrides: Mapping[str, object]) -> Job:
  """The linear layers of a transformer go to NVFP4, the other networks to bfloat16.

  Args:
    source: plain weights.
    overrides: settings that replace those saved with it, such as `{"quant.weights": "mse"}`.

  Raises:
    ValueError: it holds NVFP4 already, or a setting is wrong.
  """
  if source.is_packed:
    raise ValueError(f"'{source.folder}' holds NVFP4 weights already")
  if "dit" not in source.networks:
    raise ValueError(f"'{source.folder}' has no transformer to quantise")
  experiment = load_config(source.folder / CONFIG, {**overrides, "quant.linears": "nvfp4"})
  dit = quantised(source.networks["dit"], experiment.quant, experiment.model.dtype)
  networks = {name: cast(n, "bfloat16") for name, n in {**source.networks, "dit": dit}.items()}
  metadata = {**source.metadata, "dtype": "nvfp4"}
  left_out = metadata.pop(ADAPTERS, None)
  if left_out and not metadata.get("adapters"):
    logging.warning(
      "'%s' is sampled with the adapters '%s', which these weights will not have: to have them,"
      " merge first",
      *(source.folder, left_out),
    )
  return Job(networks, saved_config(experiment), metadata, inputs=source.files)


def cast_job(source: Checkpoint, dtype: str) -> Job:
  """All networks in another precision; single vectors stay float32.

  Raises:
    ValueError: it holds NVFP4 weights.
  """
  if source.is_packed:
    raise ValueError(f"'{source.folder}' holds NVFP4 weights; take the ones that they were made of")
  networks = {name: cast(leaves, dtype) for name, leaves in source.networks.items()}
  metadata = {**source.metadata, "dtype": dtype}
  return Job(networks, saved_config(source.experiment), metadata, inputs=source.files)
