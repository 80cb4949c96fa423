"""Writes a checkpoint again in another precision, with the configuration it is to be used with.

  python -m launch.export --config=configs/tiny.py --config.io.checkpoint=outputs/ar/params \
      --out=outputs/tiny --dtype=bfloat16

Single vectors (the constants of the latents, the biases of the VAE) stay float32. Loading converts
to float32, or to `model.dtype`, again.
"""

import json
from pathlib import Path

import jax
from absl import flags, logging

from longlive_jax.build import build_models, find_checkpoint
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.io.checkpoint import read_metadata, save_params

CONFIG = define_config_flag()
OUT = flags.DEFINE_string("out", "outputs/exported", "folder to write")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the weights")


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if not experiment.io.checkpoint:
    raise ValueError("io.checkpoint is empty: it must name the weights to export")
  source = find_checkpoint(experiment.io.checkpoint)
  params = build_models(experiment).params
  config = json.loads(to_json(experiment))
  config["io"]["checkpoint"] = ""
  narrow = jax.tree.map(lambda a: a.astype(DTYPE.value) if a.ndim > 1 else a, params)
  save_params(OUT.value, narrow, config, {**read_metadata(source), "dtype": DTYPE.value})
  size = sum(path.stat().st_size for path in Path(OUT.value).rglob("*") if path.is_file())
  logging.info("%s: %.1f MB", OUT.value, size / 1e6)


if __name__ == "__main__":
  run_main(main)
