"""The training loop: one jitted step, metrics written one step late, checkpoints that resume.

All randomness of a step is a function of (seed, step), so a resumed run repeats exactly what an
uninterrupted one would have done.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from longlive_jax.config import Experiment
from longlive_jax.io.checkpoint import TrainCheckpointer
from longlive_jax.io.metrics import MetricWriter
from longlive_jax.train.state import TrainState
from longlive_jax.types import Array

Step = Callable[[TrainState], tuple[TrainState, dict[str, Array]]]


def run(experiment: Experiment, workdir: str | Path, state: TrainState, step: Step) -> TrainState:
  """Runs `train.steps` updates, going on from the newest checkpoint in `workdir`.

  Args:
    experiment: checked experiment.
    workdir: folder of checkpoints and metrics.
    state: where a fresh run starts; also the shapes to restore into.
    step: jitted update, its argument donated.

  Returns:
    The last state.
  """
  cfg, io = experiment.train, experiment.io
  folder = Path(workdir)
  checkpointer = TrainCheckpointer(
    folder / "checkpoints", io.checkpoint_every_steps, io.keep_checkpoints
  )
  state = checkpointer.restore_latest(state)
  begun = first = int(state.step)
  started = time.perf_counter()
  late: tuple[int, dict[str, Array]] | None = None
  with MetricWriter(folder) as writer:
    for number in range(first, cfg.steps):
      state, metrics = step(state)
      if late is not None:
        seconds = time.perf_counter() - started
        values = {name: float(value) for name, value in late[1].items()}
        rate = (late[0] - begun) / seconds
        writer.write(late[0], {**values, "steps_per_second": rate})
        logging.info("step %d %s %.2f steps/s", late[0], values, rate)
        late = None
      if (number + 1) % io.log_every_steps == 0 or number + 1 == cfg.steps:
        late = (number + 1, metrics)
      checkpointer.save(number + 1, state)
    if late is not None:
      writer.write(late[0], {name: float(value) for name, value in late[1].items()})
  checkpointer.close()
  return jax.block_until_ready(state)
