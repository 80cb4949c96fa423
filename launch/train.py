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

import jax
from absl import flags, logging

from launch.processes import define_process_flags
from longlive_jax.build import build_models, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.eval.plan_text import dry_run
from longlive_jax.io.atomic import check_writable
from longlive_jax.io.checkpoint import is_checkpoint, read_metadata, save_params
from longlive_jax.io.lock import LOCK, only_run
from longlive_jax.io.processes import is_first, of_first
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.train.loop import CHECKPOINTS, steps_done
from longlive_jax.train.stage_ar import train_ar
from longlive_jax.train.stage_dmd import train_dmd
from longlive_jax.train.stage_vae import train_vae
from longlive_jax.train.start import check_files, check_same_settings
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
  if of_first(done == steps and is_result(workdir, stage, steps)):
    if is_first():
      print(f"nothing to do: {done} steps are done, train.steps={experiment.train.steps}")
    return steps
  distils, name = stage == "dmd", experiment.io.checkpoint
  logging.info("%d devices: %s", jax.device_count(), jax.devices()[0].device_kind)
  logging.info("%s", f"weights of '{name}': dit, vae, text" if name else "fresh weights")
  models = build_models(experiment, mesh_of(experiment), narrow=distils, plain=distils)
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


def is_result(workdir: Path, stage: str, steps: int) -> bool:
  """Whether all that a stage leaves after so many steps is there, as far as names of files tell."""
  if any(lacking(workdir / name, networks) for name, networks in results_of(stage).items()):
    return False
  return read_metadata(workdir / "params").get("steps") == steps


def results_of(stage: str) -> dict[str, tuple[str, ...]]:
  """Folder in the workdir -> networks in it, of all that a stage leaves."""
  results: dict[str, tuple[str, ...]] = {"params": ("dit", "text", "vae")}
  if stage == "dmd":
    results["adapters"] = ("lora",)
  return results


def lacking(folder: Path, networks: tuple[str, ...]) -> list[str]:
  """Names of what a checkpoint of these networks lacks; numbers are not read."""
  files = [name for name in ("config.json", "metadata.json") if not (folder / name).is_file()]
  return files + [name for name in networks if not is_network(folder / name)]


def is_network(folder: Path) -> bool:
  """Whether groups of arrays are there, none of the first ones missing and none empty."""
  count = len(list(folder.glob("*")))
  groups = [folder / f"{number:03d}" for number in range(count)]
  return count > 0 and all(any(group.glob("*")) for group in groups)


def check_left(workdir: Path, stage: str) -> None:
  """Raises ValueError for what is left of a result and is no checkpoint, so never replaced."""
  for name, networks in results_of(stage).items():
    folder = workdir / name
    if not (folder / "metadata.json").is_file() or is_checkpoint(folder):
      continue
    if missing := lacking(folder, networks):
      raise ValueError(
        f"'{folder}' is not whole: it lacks {', '.join(missing)}; remove what is left of it,"
        " and the same command writes it again"
      )


def check_run(experiment: Experiment, workdir: Path) -> None:
  """Raises OSError or ValueError for what is no run of training, whatever other processes say."""
  check_writable(workdir / "params", folder=True)
  check_writable(workdir / CHECKPOINTS, folder=True)
  check_writable(workdir / LOCK)
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
  if experiment.quant.linears == "fp8":
    raise ValueError("quant.linears=fp8 has no gradients: train with none or nvfp4")


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if DRY_RUN.value:
    print(dry_run(experiment, DEVICES.value, DEVICE_KIND.value))
    return
  if DEVICES.value is not None or DEVICE_KIND.value:
    raise ValueError("--devices and --device_kind are for --dry_run; a run has all devices")
  if not WORKDIR.value:
    raise ValueError("--workdir is needed: the folder of checkpoints, metrics and the result")
  workdir = Path(WORKDIR.value)
  check_run(experiment, workdir)
  with PROCESSES.joined():
    enable_compile_cache(experiment)
    check_same_settings(experiment)
    if experiment.train.stage != "vae":
      mesh_of(experiment)  # what these devices cannot be divided into is said before there is a run
    if not is_result(workdir, experiment.train.stage, experiment.train.steps):
      check_left(workdir, experiment.train.stage)
      check_files(experiment, workdir)
    with only_run(workdir):
      steps = train(experiment, workdir)
    if is_first():
      print(f"{workdir / 'params'}: weights after {steps} steps")


if __name__ == "__main__":
  run_main(main)
