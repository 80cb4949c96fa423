r"""Trains a stage on all devices.

  python -m launch.train --config=configs/tiny.py:vae --workdir=outputs/vae
  python -m launch.train --config=configs/tiny.py:ar --workdir=outputs/ar \
      --config.io.checkpoint=outputs/vae/params

With --dry_run it only prints what the run would need, on any number of devices, see docs/plan.md.
A run goes on by itself from the newest checkpoint in its workdir. The result, weights and resolved
configuration, is `WORKDIR/params`, a checkpoint like any other.

Several processes of one run share the workdir; see launch/processes.py and launch/cluster.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from launch.processes import define_process_flags
from longlive_jax.build import build_models, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.eval.plan_text import dry_run
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.io.checkpoint import read_metadata, save_params
from longlive_jax.io.processes import is_first, of_all, of_first, wait_for_all
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.train.loop import steps_done
from longlive_jax.train.stage_ar import train_ar
from longlive_jax.train.stage_dmd import train_dmd
from longlive_jax.train.stage_vae import train_vae
from longlive_jax.weights import holds_nvfp4

CONFIG = define_config_flag()
PROCESSES = define_process_flags()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of checkpoints, metrics and the result")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what the run would need, and start nothing")
DEVICES = flags.DEFINE_integer(
  "devices", None, "with --dry_run: how many; default those there are", 1
)
DEVICE_KIND = flags.DEFINE_string("device_kind", "", "with --dry_run: such as H200, for the time")


def train(experiment: Experiment, workdir: Path) -> int:
  """Runs the stage of a checked experiment and saves all weights; returns the steps they took."""
  stage, result = experiment.train.stage, workdir / "params"
  done = steps_done(experiment, workdir)
  steps = max(done, experiment.train.steps)
  if of_first(done == steps and is_result(result, steps)):
    if is_first():
      print(f"nothing to do: {done} steps are done, train.steps={experiment.train.steps}")
    return steps
  distils = stage == "dmd"
  models = build_models(experiment, mesh_of(experiment), narrow=distils, plain=distils)
  save_config(experiment, workdir)
  about: dict[str, Any] = {"stage": stage, "steps": steps}
  if stage == "vae":
    trained = {"vae": train_vae(experiment, models.vae, models.params["vae"], workdir)}
  elif stage == "ar":
    trained = {"dit": train_ar(experiment, models, workdir)}
  else:
    distill = experiment.distill
    lora = {"name": experiment.name, "rank": distill.rank, "alpha": distill.alpha}
    dit, adapters = train_dmd(experiment, models, workdir)
    trained = {"dit": dit}
    config = json.loads(to_json(experiment))
    save_params(workdir / "adapters", {"lora": adapters}, config, {**about, "lora": lora})
    about["adapters"] = [lora]
  save_params(result, models.params | trained, json.loads(to_json(experiment)), about)
  return steps


def save_config(experiment: Experiment, workdir: Path) -> None:
  """Writes `WORKDIR/config.json`, once for all processes.

  Raises:
    ValueError: another process does not see it.
  """
  path = workdir / "config.json"
  if is_first():
    workdir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
      part.write_text(to_json(experiment))
  wait_for_all("config.json")
  if not all(of_all(path.is_file())):
    raise ValueError(f"--workdir={workdir} must be one folder that all processes share")


def is_result(folder: Path, steps: int) -> bool:
  """Whether weights after so many steps are there."""
  return (folder / "metadata.json").is_file() and read_metadata(folder).get("steps") == steps


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if DRY_RUN.value:
    print(dry_run(experiment, DEVICES.value, DEVICE_KIND.value))
    return
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
  if experiment.io.adapters not in ("", "auto"):
    raise ValueError(
      f"io.adapters={experiment.io.adapters!r} is for sampling; to train from them, merge them"
      " with launch.convert first"
    )
  if experiment.model.attention == "fp8":
    raise ValueError("model.attention=fp8 has no gradients: train with auto, cudnn or jnp")
  with PROCESSES.joined():
    enable_compile_cache(experiment)
    steps = train(experiment, workdir)
    if is_first():
      print(f"{workdir / 'params'}: weights after {steps} steps")


if __name__ == "__main__":
  run_main(main)
