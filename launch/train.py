"""Trains a stage on one device.

  python -m launch.train --config=configs/tiny.py --config.train.stage=vae --workdir=outputs/vae
  python -m launch.train --config=configs/tiny.py --workdir=outputs/ar \
      --config.io.checkpoint=outputs/vae/params

A run goes on by itself from the newest checkpoint in its workdir. The result, weights and resolved
configuration, is `WORKDIR/params`, a checkpoint like any other.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags, logging

from longlive_jax.build import build_models
from longlive_jax.checks import check_choice
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.io.checkpoint import save_params
from longlive_jax.train.stages import train_ar, train_vae

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of checkpoints, metrics and the result")


def train(experiment: Experiment, workdir: Path) -> Path:
  """Runs the stage of a checked experiment and saves all weights; returns their folder."""
  check_choice("train.stage", experiment.train.stage, ("ar", "vae"))
  models = build_models(experiment)
  params = dict(models.params)
  if experiment.train.stage == "vae":
    params["vae"] = train_vae(experiment, models.vae, params["vae"], workdir)
  else:
    params["dit"] = train_ar(experiment, dataclasses.replace(models, params=params), workdir)
  result = workdir / "params"
  metadata = {"stage": experiment.train.stage, "steps": experiment.train.steps}
  save_params(result, params, json.loads(to_json(experiment)), metadata)
  return result


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if not WORKDIR.value:
    raise ValueError("--workdir is required: the folder of checkpoints, metrics and the result")
  workdir = Path(WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(to_json(experiment))
  logging.info("weights in %s", train(experiment, workdir))


if __name__ == "__main__":
  run_main(main)
