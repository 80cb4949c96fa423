"""Says what NVFP4 does to each linear layer of a model, in a video of a script.

  python -m launch.quant_report --config=configs/tiny.py --script=configs/scripts/demo.json \
      --out=outputs/quant.json

Writes JSON, and a plot beside it. Scale rules and blocks are those of the configuration's `quant`;
the video itself is made without quantisation.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from longlive_jax.build import Pipeline, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.data.prompts import Script, load_script
from longlive_jax.eval.quant_report import MEASURES, activation_rows, plot, table, weight_rows
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.policy import linear_paths, selected

CONFIG = define_config_flag()
SCRIPT = flags.DEFINE_string("script", "configs/scripts/demo.json", "script of the video")
OUT = flags.DEFINE_string("out", "outputs/quant.json", "file to write; the plot goes beside it")
LEVELS = flags.DEFINE_list("timesteps", ["250", "500", "750", "1000"], "noise levels to look at")


def report(experiment: Experiment, script: Script, timesteps: list[float]) -> list[dict]:
  """Rows of weights and of activations."""
  stacked = dataclasses.replace(experiment.sample, unroll_layers="off")  # as layers are named
  experiment = dataclasses.replace(experiment, sample=stacked)
  quant, pipeline = experiment.quant, Pipeline.from_config(experiment)
  params, network = pipeline.models.params["dit"], pipeline.models.dit
  paths = sorted(selected(linear_paths(params), quant.layers))
  square = quant.weight_blocks == "16x16"
  rows = weight_rows(params, paths, Spec(quant.weights, two_d=square, transpose=True, exact=True))
  blocks = [np.asarray(block) for block in pipeline.latent_blocks([script])]
  window = experiment.sample.window_latents // experiment.model.block_latents
  latents = jnp.asarray(np.concatenate(blocks[-window:], 1))
  prompt = pipeline.plan([script])[0][-1].prompt
  prompts = jnp.asarray(pipeline.embed(prompt))[None]
  spec = Spec(quant.activations)
  return rows + activation_rows(network, params, latents, prompts, timesteps, paths, spec)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if experiment.quant.linears != "none":
    raise ValueError(
      f"quant.linears={experiment.quant.linears} must be none here: the report compares with the"
      " model as it is; quant.weights and quant.activations say what is tried"
    )
  try:
    timesteps = [float(level) for level in LEVELS.value]
  except ValueError as error:
    raise ValueError(f"--timesteps={','.join(LEVELS.value)} must be numbers") from error
  out = Path(OUT.value)
  check_writable(out)
  enable_compile_cache(experiment)
  rows = report(experiment, load_script(SCRIPT.value), timesteps)
  with replacing(out) as part:
    part.write_text(json.dumps({"config": json.loads(to_json(experiment)), "rows": rows}, indent=1))
  plot(rows, out.with_suffix(".png"))
  for kind in ("weight", "activation"):
    means = (f"{name} {np.nanmean(table(rows, kind, name)[1]):.4f}" for name in MEASURES)
    logging.info("%s  %s", kind, "  ".join(means))


if __name__ == "__main__":
  run_main(main)
