r"""Trains a stage on all devices.

  python -m launch.train --config=configs/tiny.py:vae --workdir=outputs/vae
  python -m launch.train --config=configs/tiny.py:ar --workdir=outputs/ar \
      --config.io.checkpoint=outputs/vae/params

A run goes on by itself from the newest checkpoint in its workdir. The result, weights and resolved
configuration, is `WORKDIR/params`, a checkpoint like any other.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from longlive_jax.build import build_models, enable_compile_cache, holds_nvfp4
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.io.checkpoint import read_metadata, save_params
from longlive_jax.train.loop import steps_done
from longlive_jax.train.stages import train_ar, train_vae

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of checkpoints, metrics and the result")


def train(experiment: Experiment, workdir: Path) -> int:
  """Runs the stage of a checked experiment and saves all weights; returns the steps they took."""
  stage, result = experiment.train.stage, workdir / "params"
  done = steps_done(experiment, workdir)
  steps = max(done, experiment.train.steps)
  if done == steps and is_result(result, steps):
    print(f"nothing to do: {done} steps are done, train.steps={experiment.train.steps}")
    return steps
  models = build_models(experiment)
  workdir.mkdir(parents=True, exist_ok=True)
  with replacing(workdir / "config.json") as part:
    part.write_text(to_json(experiment))
  params = dict(models.params)
  if stage == "vae":
    params["vae"] = train_vae(experiment, models.vae, params["vae"], workdir)
  else:
    params["dit"] = train_ar(experiment, dataclasses.replace(models, params=params), workdir)
  save_params(result, params, json.loads(to_json(experiment)), {"stage": stage, "steps": steps})
  return steps


def is_result(folder: Path, steps: int) -> bool:
  """Whether weights after so many steps are there."""
  return (folder / "metadata.json").is_file() and read_metadata(folder).get("steps") == steps


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if not WORKDIR.value:
    raise ValueError("--workdir is needed: the folder of checkpoints, metrics and the result")
  workdir = Path(WORKDIR.value)
  check_writable(workdir / "params", folder=True)
  if (workdir / "metadata.json").is_file():
    raise ValueError(f"--workdir={workdir} holds weights, not a run; use another folder")
  if holds_nvfp4(experiment):
    raise ValueError(
      f"io.checkpoint='{experiment.io.checkpoint}' holds weights in NVFP4, which are for sampling;"
      " train from the ones they were made of"
    )
  enable_compile_cache(experiment)
  print(f"{workdir / 'params'}: weights after {train(experiment, workdir)} steps")


if __name__ == "__main__":
  run_main(main)
