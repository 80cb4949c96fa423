"""Writes a checkpoint again in another precision, with the configuration it is to be used with.

  python -m launch.export --config=configs/tiny.py --config.io.checkpoint=outputs/ar/params \
      --out=outputs/tiny --dtype=bfloat16

Single vectors (the constants of the latents, the biases of the VAE) stay float32. Loading converts
to float32, or to `model.dtype`, again.

`--dtype=nvfp4 --config.quant.linears=nvfp4` stores the layers that `quant.layers` names in NVFP4,
byte for byte what loading the source with these settings gives, and the rest in bfloat16. Such a
checkpoint is loaded with the same `quant` settings, and is for sampling.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from longlive_jax.build import build_models, cast_params, find_checkpoint, holds_nvfp4
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.io.atomic import check_writable
from longlive_jax.io.checkpoint import read_metadata, save_params
from longlive_jax.quant.policy import is_quantised, quantise_params
from longlive_jax.types import PyTree

CONFIG = define_config_flag()
OUT = flags.DEFINE_string("out", "outputs/exported", "folder to write")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "nvfp4"], "of the weights")


def narrowed(params: dict[str, PyTree], experiment: Experiment, dtype: str) -> dict[str, PyTree]:
  """Parameters of all networks as they are stored."""
  if dtype == "nvfp4":
    dit = cast_params(params["dit"], experiment.model.dtype)
    params = params | {"dit": quantise_params(dit, experiment.quant)}
  wide = "bfloat16" if dtype == "nvfp4" else dtype

  def narrow(leaf: Any) -> Any:
    return leaf if is_quantised(leaf) or leaf.ndim < 2 else leaf.astype(wide)

  return jax.tree.map(narrow, params, is_leaf=is_quantised)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if not experiment.io.checkpoint:
    raise ValueError("io.checkpoint is empty: it must name the weights to export")
  check_writable(OUT.value, folder=True)
  if DTYPE.value == "nvfp4" and experiment.quant.linears != "nvfp4":
    raise ValueError("--dtype=nvfp4 needs --config.quant.linears=nvfp4, which says how")
  source = find_checkpoint(experiment.io.checkpoint)
  if holds_nvfp4(experiment) and DTYPE.value != "nvfp4":
    raise ValueError(
      f"io.checkpoint='{source}' holds weights in NVFP4; --dtype={DTYPE.value} needs the ones that"
      " they were made of"
    )
  params = narrowed(build_models(experiment).params, experiment, DTYPE.value)
  config = json.loads(to_json(experiment))
  config["io"]["checkpoint"] = ""
  save_params(OUT.value, params, config, {**read_metadata(source), "dtype": DTYPE.value})
  size = sum(path.stat().st_size for path in Path(OUT.value).rglob("*") if path.is_file())
  logging.info("%s: %.1f MB", OUT.value, size / 1e6)


if __name__ == "__main__":
  run_main(main)
