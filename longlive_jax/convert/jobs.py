"""The conversions into a checkpoint of ours: each is a job, which says what is to be written.

A job is made and checked before anything is written, and reads no weights: so what cannot be
converted is refused at once.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.checks import check_at_least
from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config, to_json
from longlive_jax.convert.diffusers_config import latent_statistics
from longlive_jax.convert.keys_lora import rank_of
from longlive_jax.convert.leaves import (
  FLOATING,
  KERNEL,
  PARTS,
  Leaves,
  cast,
  checkpoint_leaves,
  merged,
  path_of,
  quantised,
)
from longlive_jax.convert.networks import CONSTANTS, NETWORKS, config_beside, network_leaves
from longlive_jax.convert.sources import Source
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.write import Progress, write_checkpoint
from longlive_jax.io.checkpoint import CONFIG, read_config, read_metadata
from longlive_jax.model.vae import WAN_MEAN, WAN_STD

FORMAT = 1  # of the metadata


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be written.

  Attributes:
    networks: name -> leaves.
    config: the configuration that goes beside them, as JSON.
    metadata: what made them, as JSON.
    files: the foreign files that are read.
  """

  networks: Mapping[str, Leaves]
  config: Mapping[str, Any]
  metadata: Mapping[str, Any]
  files: Sequence[Path] = ()

  @property
  def nbytes(self) -> int:
    """Bytes of all leaves."""
    return sum(stored.nbytes for leaves in self.networks.values() for stored in leaves.values())

  def write(self, folder: str | Path, progress: Progress = lambda size: None) -> None:
    """See `write_checkpoint`."""
    write_checkpoint(
      folder, self.networks, self.config, self.metadata, self.files, progress=progress
    )


def dtype_of(networks: Mapping[str, Leaves]) -> str:
  """The dtype of the transformer's matrices, or of what there is: "nvfp4", "bfloat16", "mixed"."""
  leaves = networks.get("dit") or next(iter(networks.values()))
  if any(name.endswith(f"/{PARTS[0]}") for name in leaves):
    return "nvfp4"
  found = {str(s.dtype) for s in leaves.values() if len(s.shape) > 1 and s.dtype in FLOATING}
  return found.pop() if len(found) == 1 else "mixed"


def import_job(
  experiment: Experiment,
  sources: Mapping[str, Source],
  *,
  rule: str = "",
  alpha: float = 0.0,
  dtype: str = "",
) -> Job:
  """Foreign files become a checkpoint.

  Args:
    experiment: gives the sizes; what goes beside the weights.
    sources: "dit", "vae", "vae_decoder", "text", "lora" -> opened file. Adapters beside a
      transformer are merged into it; without one they are kept by themselves.
    rule: scale rule of packed weights, where the file does not say it.
    alpha: of the adapters; 0 = the file's, or else their rank.
    dtype: "" keeps that of the files.

  Raises:
    ValueError: something does not fit; names the file and the tensor.
  """
  networks, chosen = imported_networks(experiment, sources, rule)
  notes = sources["dit"].notes if "dit" in sources else {}
  metadata: dict[str, Any] = {"format": FORMAT}
  if isinstance(notes.get("step"), int):
    metadata["steps"] = notes["step"]
  if notes.get("merged_lora"):
    metadata["adapters"] = [{"name": Path(str(notes.get("source_lora_ckpt", ""))).name}]
  if "lora" in sources:
    about = adapters_of(sources["lora"], alpha)
    if "dit" in networks:
      adapters = networks.pop("lora")
      networks["dit"] = with_adapters(networks["dit"], adapters, about, metadata)
      metadata["adapters"] = [about]
    else:
      metadata["lora"] = about
  config = saved_config(experiment)
  if chosen:
    config["quant"] |= packed_settings(networks["dit"], experiment.quant.layers, chosen)
  if dtype:
    networks = {name: cast(leaves, dtype) for name, leaves in networks.items()}
  files = dict.fromkeys(file for source in sources.values() for file in source.files)
  return Job(networks, config, metadata | {"dtype": dtype_of(networks)}, tuple(files))


def imported_networks(
  experiment: Experiment, sources: Mapping[str, Source], rule: str
) -> tuple[dict[str, Leaves], str]:
  """The leaves of all networks, and the scale rule if the transformer is packed."""
  networks: dict[str, Leaves] = {}
  chosen = ""
  for name in NETWORKS:
    if name in sources:
      side = "encoder" if name == "vae" and "vae_decoder" in sources else ""
      networks[name], found = network_leaves(experiment, name, sources[name], rule=rule, side=side)
      chosen = chosen or found
  if "vae_decoder" in sources:
    if "vae" not in networks:
      raise ValueError("--vae_decoder needs --vae, whose encoder goes with it")
    decoder = sources["vae_decoder"]
    networks["vae"] |= network_leaves(experiment, "vae", decoder, side="decoder")[0]
  if "vae" in networks:
    networks["vae"] |= latent_constants(experiment, config_beside(sources["vae"]))
  return networks, chosen


def latent_constants(experiment: Experiment, beside: Mapping[str, Any]) -> Leaves:
  """The mean and deviation of the latents, which stand in no state dict.

  Args:
    experiment: says how many channels there are.
    beside: the config.json beside the weights, or {}: then they are those of the released VAE.

  Raises:
    ValueError: nobody says them.
  """
  if "latents_mean" in beside:
    found = latent_statistics(beside)
  elif experiment.model.vae.latent_channels == len(WAN_MEAN):
    found = np.asarray(WAN_MEAN, np.float32), np.asarray(WAN_STD, np.float32)
  else:
    raise ValueError(
      f"model.vae.latent_channels={experiment.model.vae.latent_channels}: the mean and deviation of"
      " such latents are not known; they belong into a config.json beside the VAE"
    )
  return {n: Stored.of(a) for n, a in zip(CONSTANTS, found, strict=True)}


def adapters_of(source: Source, alpha: float) -> dict[str, Any]:
  """What is to be known of adapters: name, rank and alpha."""
  rank = rank_of(source.tensors)
  said = source.notes.get("alpha") or source.notes.get("lora_alpha") or 0
  if alpha and said and alpha != said:
    raise ValueError(f"--alpha={alpha:g}, but '{source.path}' says {said:g}")
  check_at_least("--alpha", alpha, 0)
  return {"name": source.path.name, "rank": rank, "alpha": float(alpha or said or rank)}


def with_adapters(
  base: Leaves, adapters: Leaves, about: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Leaves:
  """The base with adapters merged; refuses a second merge, and packed weights."""
  before = metadata.get("adapters")
  if before:
    names = ", ".join(str(each.get("name", "?")) for each in before)
    raise ValueError(f"adapters are merged already ({names}); merge into the weights without them")
  if any(name.endswith(f"/{PARTS[0]}") for name in base):
    raise ValueError("adapters cannot be merged into NVFP4 weights; merge first, quantise then")
  return merged(base, adapters, about["alpha"] / about["rank"])


def packed_settings(dit: Leaves, patterns: tuple[str, ...], rule: str) -> dict[str, Any]:
  """The settings of the section `quant` that describe packed weights.

  Args:
    dit: the leaves.
    patterns: `quant.layers`, kept if they name just the packed layers.
    rule: scale rule.
  """
  packed = {name.removesuffix(f"/{PARTS[0]}") for name in dit if name.endswith(f"/{PARTS[0]}")}
  paths = sorted({path_of(name) for name in packed})
  plain = {path_of(name) for name in dit if name.endswith(f"/{KERNEL}")}
  torn = next((path for path in paths if path in plain), None)
  if torn is not None:
    raise ValueError(f"'{torn}' is packed in some layers and not in others; it must be in all")
  named = {p for p in (*paths, *plain) if any(re.fullmatch(each, p) for each in patterns)}
  layers = list(patterns) if named == set(paths) else paths
  return {"linears": "nvfp4", "weights": rule, "weight_blocks": "1x16", "layers": layers}


def saved_config(experiment: Experiment) -> dict[str, Any]:
  """A configuration as JSON; it does not say where its weights came from."""
  config = json.loads(to_json(experiment))
  config["io"]["checkpoint"] = ""
  return config


def checkpoint_networks(folder: Path) -> dict[str, Leaves]:
  """The leaves of all networks of a checkpoint."""
  read_config(folder)
  read_metadata(folder)
  return {p.name: checkpoint_leaves(p) for p in sorted(folder.iterdir()) if p.is_dir()}


def merge_job(base: Path, lora: Path) -> Job:
  """Adapters of one checkpoint go into the transformer of another.

  Raises:
    ValueError: the base has adapters already, is packed, or does not fit.
  """
  networks, metadata = checkpoint_networks(base), read_metadata(base)
  about = read_metadata(lora).get("lora")
  adapters = checkpoint_networks(lora).get("lora")
  if "dit" not in networks:
    raise ValueError(f"'{base}' has no transformer to merge into")
  if adapters is None or not isinstance(about, dict):
    raise ValueError(f"'{lora}' holds no adapters; import them with --lora alone")
  dit = with_adapters(networks["dit"], adapters, about, metadata)
  sources = read_metadata(lora).get("sources", [])
  metadata = {**metadata, "adapters": [{**about, "sources": sources}]}
  return Job({**networks, "dit": dit}, saved_config(load_config(base / CONFIG)), metadata)


def quantise_job(source: Path, overrides: Mapping[str, object]) -> Job:
  """The linear layers of a transformer go to NVFP4, the other networks to bfloat16.

  Args:
    source: checkpoint with plain weights.
    overrides: settings that replace those saved with it, such as `{"quant.weights": "mse"}`.

  Raises:
    ValueError: it holds NVFP4 already, or a setting is wrong.
  """
  networks, metadata = checkpoint_networks(source), read_metadata(source)
  if metadata.get("dtype") == "nvfp4":
    raise ValueError(f"'{source}' holds NVFP4 weights already")
  if "dit" not in networks:
    raise ValueError(f"'{source}' has no transformer to quantise")
  experiment = load_config(source / CONFIG, {**overrides, "quant.linears": "nvfp4"})
  networks["dit"] = quantised(networks["dit"], experiment.quant, experiment.model.dtype)
  networks = {name: cast(leaves, "bfloat16") for name, leaves in networks.items()}
  return Job(networks, saved_config(experiment), {**metadata, "dtype": "nvfp4"})


def cast_job(source: Path, dtype: str) -> Job:
  """All networks in another precision; single vectors stay float32.

  Raises:
    ValueError: it holds NVFP4 weights.
  """
  networks, metadata = checkpoint_networks(source), read_metadata(source)
  if metadata.get("dtype") == "nvfp4":
    raise ValueError(f"'{source}' holds NVFP4 weights; take the ones that they were made of")
  networks = {name: cast(leaves, dtype) for name, leaves in networks.items()}
  return Job(networks, saved_config(load_config(source / CONFIG)), {**metadata, "dtype": dtype})
