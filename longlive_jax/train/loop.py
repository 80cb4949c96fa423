"""The training loop: one jitted step, metrics written one step late, checkpoints that resume.

All randomness of a step is a function of (seed, step), so a resumed run repeats exactly what an
uninterrupted one would have done.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from longlive_jax.config import Experiment, Train
from longlive_jax.config.load import from_json, to_json
from longlive_jax.config.walk import differences
from longlive_jax.io.metrics import MetricWriter
from longlive_jax.io.train_checkpoint import TrainCheckpointer
from longlive_jax.train.state import TrainState
from longlive_jax.types import Array, PyTree

Step = Callable[[TrainState], tuple[TrainState, dict[str, Array]]]

CHECKPOINTS = "checkpoints"
# Settings that may differ when a run goes on; all others must be as they were.
MAY_CHANGE = (
  "name",
  "model.attention",
  "model.vae.convolution",
  "parallel.fsdp",
  "parallel.seq",
  "quant.kernels",
  "sample.guidance",
  "sample.negative_prompt",
  "sample.seed",
  "sample.solver",
  "sample.steps",
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
  "io.checkpoint_every_steps",
  "io.compile_cache",
  "io.keep_checkpoints",
  "io.log_every_steps",
)


def run(experiment: Experiment, workdir: str | Path, state: TrainState, step: Step) -> TrainState:
  """Runs `train.steps` updates, going on from the newest checkpoint in `workdir`.

  Args:
    experiment: checked experiment.
    workdir: folder of checkpoints and metrics.
    state: where a fresh run starts; also the shapes to restore into.
    step: jitted update, its argument donated.

  Returns:
    The last state, which is also the newest checkpoint.

  Raises:
    ValueError: `workdir` holds a run with other settings; names the setting.
    FloatingPointError: the loss, or the parameters at a checkpoint, are not finite.
  """
  cfg, io = experiment.train, experiment.io
  extra = {"config": json.loads(to_json(experiment))}
  with open_checkpoints(experiment, workdir) as checkpointer:
    for name, there, here in changed_settings(experiment, workdir, checkpointer):
      logging.info("%s is %r from here on; it was %r", name, here, there)
    state = checkpointer.restore_latest(state)
    done = int(state.step)
    if done >= cfg.steps:
      logging.info("nothing to do: %d steps are done, train.steps=%d", done, cfg.steps)
      return state
    logging.info("steps %d to %d, in '%s'; compiling", done + 1, cfg.steps, workdir)
    with MetricWriter(workdir, done) as writer:
      log = Log(cfg, writer, done)
      for number in range(done + 1, cfg.steps + 1):
        state, metrics = step(state)
        log.flush()  # of an earlier step, while the device runs this one
        last = number == cfg.steps
        if last or number % io.log_every_steps == 0:
          log.keep(number, metrics)
        if last or checkpointer.is_due(number):
          log.flush()
          check_params(cfg, number, state.params)
          checkpointer.save(number, state, extra, force=last)
  return state


def steps_done(experiment: Experiment, workdir: str | Path) -> int:
  """Step of the newest checkpoint in a workdir; 0 if there is none.

  Raises:
    ValueError: it is of a run with other settings; names the setting.
  """
  if not (Path(workdir) / CHECKPOINTS).is_dir():
    return 0
  with open_checkpoints(experiment, workdir) as checkpointer:
    changed_settings(experiment, workdir, checkpointer)
    return checkpointer.latest_step or 0


def open_checkpoints(experiment: Experiment, workdir: str | Path) -> TrainCheckpointer:
  """The checkpoints of a run, kept as `io` says."""
  io = experiment.io
  folder = Path(workdir) / CHECKPOINTS
  return TrainCheckpointer(folder, io.checkpoint_every_steps, io.keep_checkpoints)


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


class Log:
  """Metrics on their way to the host, fetched when the next step is already running.

  Args:
    cfg: names the settings when a loss is not finite.
    writer: where they go.
    step: steps done before.
  """

  def __init__(self, cfg: Train, writer: MetricWriter, step: int):
    self._cfg, self._writer = cfg, writer
    self._step, self._time = step, time.perf_counter()
    self._late: tuple[int, dict[str, Array]] | None = None

  def keep(self, step: int, metrics: dict[str, Array]) -> None:
    """Remembers what to write at the next `flush`."""
    self._late = step, metrics

  def flush(self) -> None:
    """Writes what is remembered, if anything.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    if self._late is None:
      return
    (step, metrics), self._late = self._late, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.perf_counter()
    values["steps_per_second"] = (step - self._step) / (now - self._time)
    self._step, self._time = step, now
    self._writer.write(step, values)
    logging.info("step %d  %s", step, "  ".join(f"{n} {v:.4g}" for n, v in values.items()))
    if not math.isfinite(values["loss"]):
      raise not_finite(self._cfg, f"the loss is {values['loss']}", step)


@jax.jit
def all_finite(tree: PyTree) -> Array:
  """Whether no array of a tree holds NaN or infinity."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def check_params(cfg: Train, step: int, params: PyTree) -> None:
  """Raises FloatingPointError rather than let NaN or infinity into a checkpoint."""
  if not all_finite(params):
    raise not_finite(cfg, "the parameters are not finite", step)


def not_finite(cfg: Train, what: str, step: int) -> FloatingPointError:
  """The error of a run that has diverged."""
  return FloatingPointError(
    f"{what} at step {step}: try a lower train.lr={cfg.lr:g} or train.clip_norm={cfg.clip_norm:g};"
    " the run goes on from its newest checkpoint"
  )
