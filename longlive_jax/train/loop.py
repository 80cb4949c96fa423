"""The training loop: one jitted step, metrics written one step late, checkpoints that resume.

All randomness of a step is a function of (seed, step), so a resumed run repeats exactly what an
uninterrupted one would have done.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from longlive_jax.config import Experiment, Train
from longlive_jax.config.load import from_json, to_json
from longlive_jax.config.walk import differences
from longlive_jax.io.atomic import replacing
from longlive_jax.io.metrics import MetricWriter
from longlive_jax.io.processes import is_first, of_first
from longlive_jax.io.train_checkpoint import TrainCheckpointer
from longlive_jax.train.rates import Work
from longlive_jax.train.state import TrainState
from longlive_jax.train.watch import Log, Terminated, Termination, not_finite, progress
from longlive_jax.types import Array, PyTree

Step = Callable[[TrainState], tuple[TrainState, dict[str, Array | float]]]

CHECKPOINTS = "checkpoints"
# Settings that may differ when a run goes on; all others must be as they were.
MAY_CHANGE = (
  "name",
  "model.attention",
  "model.text.parked",
  "model.vae.convolution",
  "data.ahead",
  "data.path",
  "data.readers",
  "distill.critic_lr",
  "parallel.chunk_vae",
  "parallel.fsdp",
  "parallel.layout",
  "parallel.seq",
  "quant.kernels",
  "sample.guidance",
  "sample.negative_prompt",
  "sample.seed",
  "sample.solver",
  "sample.steps",
  "train.accumulate",
  "train.batch",
  "train.beta2",
  "train.clip_norm",
  "train.ema",
  "train.ema_start_step",
  "train.final_lr_fraction",
  "train.kl_weight",
  "train.loss_weighting",
  "train.lr",
  "train.motion_weight",
  "train.remat",
  "train.steps",
  "train.warmup_steps",
  "train.weight_decay",
  "io.adapters",
  "io.checkpoint_every_steps",
  "io.compile_cache",
  "io.evaluate_every_steps",
  "io.evaluate_scripts",
  "io.keep_checkpoints",
  "io.log_every_steps",
)


class Rider:
  """What goes along with the state of a run: its data, and whatever else is on the host."""

  def snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, JSON) that a run needs to go on."""
    return {}, {}

  def restore(self, done: int, arrays: dict[str, np.ndarray], extra: dict[str, Any]) -> None:
    """Takes over what `snapshot` gave after `done` updates; both empty at the start."""

  def close(self) -> None:
    """Lets go of threads and files."""


def run(
  experiment: Experiment,
  workdir: str | Path,
  state: TrainState,
  step: Step,
  rider: Rider | None = None,
  work: Work | None = None,
  rollouts: Callable[[int, PyTree], None] | None = None,
) -> TrainState:
  """Runs `train.steps` updates, going on from the newest checkpoint in `workdir`.

  SIGTERM ends the run after the step that is being computed, with a checkpoint; if it comes to one
  of several processes, it ends all after the same step. A second one ends the process at once.

  Args:
    experiment: checked experiment.
    workdir: folder of checkpoints, metrics and, once nothing can refuse the run, `config.json`.
    state: where a fresh run starts; also the shapes to restore into.
    step: update, its argument donated.
    rider: saved and restored with the state.
    work: of an update, for the rates in the metrics.
    rollouts: `(step, averaged parameters)`, called every `io.evaluate_every_steps`.

  Returns:
    The last state, which is also the newest checkpoint.

  Raises:
    ValueError: `workdir` holds a run with other settings; names the setting.
    FloatingPointError: the loss, or the parameters at a checkpoint, are not finite.
    Terminated: SIGTERM came.
  """
  rider = rider or Rider()
  with open_checkpoints(experiment, workdir) as checkpointer, contextlib.closing(rider):
    for name, there, here in changed_settings(experiment, workdir, checkpointer):
      logging.info("%s is %r from here on; it was %r", name, here, there)
    state = checkpointer.restore_latest(state)
    done, steps = int(state.step), experiment.train.steps
    if done >= steps:
      logging.info("nothing to do: %d steps are done, train.steps=%d", done, steps)
      return state
    logging.info("steps %d to %d, in '%s'; compiling", done + 1, steps, workdir)
    rider.restore(done, checkpointer.latest_arrays(), checkpointer.latest_extra())
    save_config(experiment, workdir)  # nothing refuses the run from here on
    with open_metrics(workdir, done) as writer:
      log = Log(experiment.train, writer, done, work or Work())
      saver = Saver(experiment, checkpointer, rider, log)
      return updates(experiment, state, done, step, saver, log, rollouts)


def updates(
  experiment: Experiment,
  state: TrainState,
  done: int,
  step: Step,
  saver: "Saver",
  log: Log,
  rollouts: Callable[[int, PyTree], None] | None,
) -> TrainState:
  """The updates after `done` of a run; see `run`."""
  steps, io = experiment.train.steps, experiment.io
  with Termination() as termination:
    for number in progress(done, steps):
      state, metrics = step(state)
      log.flush()  # of an earlier step, while the device runs this one
      last, ends = number == steps, termination.due(number)
      if last or ends or number % io.log_every_steps == 0:
        log.keep(number, metrics)
      saver.save(number, state, force=last or ends)
      if ends and not last:
        saver.wait()
        logging.info("stopped after step %d, checkpoint saved; the same command goes on", number)
        raise Terminated
      if rollouts is not None and number % io.evaluate_every_steps == 0:
        log.flush()
        rollouts(number, state.ema)
        log.pause()
  return state


class Saver:
  """Saves a run: state, what rides along, settings; never numbers that are not finite."""

  def __init__(
    self, experiment: Experiment, checkpointer: TrainCheckpointer, rider: Rider, log: Log
  ):
    self._experiment, self._checkpointer = experiment, checkpointer
    self._rider, self._log = rider, log

  def save(self, number: int, state: TrainState, *, force: bool) -> None:
    """Saves the state after `number` updates if it is due, and writes the metrics until there."""
    if not (force or self._checkpointer.is_due(number)):
      return
    self._log.flush()
    check_params(self._experiment.train, number, state.params)
    arrays, extra = self._rider.snapshot()
    extra = {"config": json.loads(to_json(self._experiment)), **extra}
    self._checkpointer.save(number, state, extra, arrays, force=force)

  def wait(self) -> None:
    """Returns when what was saved is on disk."""
    self._checkpointer.wait()


def steps_done(experiment: Experiment, workdir: str | Path) -> int:
  """Step of the newest checkpoint in a workdir; 0 if there is none.

  Raises:
    ValueError: it is of a run with other settings; names the setting.
  """
  if not of_first((Path(workdir) / CHECKPOINTS).is_dir()):
    return 0
  with open_checkpoints(experiment, workdir) as checkpointer:
    changed_settings(experiment, workdir, checkpointer)
    return checkpointer.latest_step or 0


def save_config(experiment: Experiment, workdir: str | Path) -> None:
  """Writes `WORKDIR/config.json`, once for all processes."""
  if is_first():
    with replacing(Path(workdir) / "config.json") as part:
      part.write_text(to_json(experiment))


def open_metrics(workdir: str | Path, done: int) -> Any:
  """The writer of the metrics after `done` steps; in one process only, None in the others."""
  return MetricWriter(workdir, done) if is_first() else contextlib.nullcontext()


def open_checkpoints(experiment: Experiment, workdir: str | Path) -> TrainCheckpointer:
  """The checkpoints of a run, kept as `io` says."""
  io = experiment.io
  folder = Path(workdir) / CHECKPOINTS
  return TrainCheckpointer(
    folder, io.checkpoint_every_steps, io.keep_checkpoints, needs=("config",)
  )


def changed_settings(
  experiment: Experiment, workdir: str | Path, checkpointer: TrainCheckpointer
) -> list[tuple[str, object, object]]:
  """Settings of `MAY_CHANGE` that the newest checkpoint has otherwise: (name, there, here).

  Raises:
    ValueError: another setting differs.
  """
  saved = checkpointer.latest_extra().get("config")
  if saved is None:
    return []
  changed = list(differences(from_json(json.dumps(saved)), experiment))
  for name, there, here in changed:
    if name not in MAY_CHANGE:
      raise ValueError(
        f"'{workdir}' holds a run with {name}={there!r}, not {here!r};"
        " go on with the same setting, or use another workdir"
      )
  return changed


@jax.jit
def all_finite(tree: PyTree) -> Array:
  """Whether no array of a tree holds NaN or infinity."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def check_params(cfg: Train, step: int, params: PyTree) -> None:
  """Raises FloatingPointError rather than let NaN or infinity into a checkpoint."""
  if not all_finite(params):
    raise not_finite(cfg, "the parameters are not finite", step)
