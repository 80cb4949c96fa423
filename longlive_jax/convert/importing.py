"""Foreign files become a checkpoint: the job that says what is written."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.convert.adapters import adapters_of, with_adapters
from longlive_jax.convert.diffusers_config import latent_statistics
from longlive_jax.convert.jobs import Job, dtype_of, saved_config
from longlive_jax.convert.leaves import KERNEL, PARTS, Leaves, cast, path_of
from longlive_jax.convert.networks import (
  CONSTANTS,
  NETWORKS,
  config_beside,
  file_beside,
  network_leaves,
)
from longlive_jax.convert.packed import blocks_of
from longlive_jax.convert.sources import Source
from longlive_jax.convert.stored import Stored
from longlive_jax.model.vae import WAN_MEAN, WAN_STD

FORMAT = 1  # of the metadata


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
  if entries := {name: source.entry for name, source in sources.items() if source.entry}:
    metadata["entries"] = entries
  if isinstance(notes.get("step"), int):
    metadata["steps"] = notes["step"]
  if notes.get("merged_lora"):
    metadata["adapters"] = [{"name": Path(str(notes.get("source_lora_ckpt", ""))).name}]
  if "lora" in sources:
    about = adapters_of(sources["lora"], alpha)
    if "dit" in networks:
      given = networks["dit"], networks.pop("lora"), about, metadata
      networks["dit"] = with_adapters(*given, experiment.model, experiment.distill.layers)
      metadata["adapters"] = [about]
    else:
      metadata["lora"] = about
  elif alpha:
    raise ValueError("--alpha means nothing without --lora")
  config = saved_config(experiment)
  if chosen:
    config["quant"] |= packed_settings(networks["dit"], experiment.quant.layers, chosen)
    config["quant"]["weight_blocks"] = blocks_of(notes)
  elif rule:
    raise ValueError(f"--rule={rule} means nothing: no weights are packed")
  if dtype:
    networks = {name: cast(leaves, dtype) for name, leaves in networks.items()}
  metadata |= {"dtype": dtype_of(networks)}
  return Job(networks, config, metadata, *read_files(sources))


def read_files(sources: Mapping[str, Source]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
  """The files that weights are read from, and those that say something about them."""
  files = dict.fromkeys(file for source in sources.values() for file in source.files)
  beside = [file_beside(n, sources[n]) for n in ("dit", "vae", "text") if n in sources]
  return tuple(files), tuple(file for file in beside if file)


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
    networks["vae"] |= latent_constants(experiment, config_beside("vae", sources["vae"]))
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
  return {"linears": "nvfp4", "weights": rule, "layers": layers}
