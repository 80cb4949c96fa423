"""What is watched while a run goes on: its metrics, SIGTERM, a bar for people."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable

import jax
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from longlive_jax.config import Train
from longlive_jax.io.metrics import MetricWriter
from longlive_jax.train.rates import Work
from longlive_jax.types import Array

TOGETHER_SECONDS = 0.5  # signals that are one


class Terminated(SystemExit):
  """The run ends because of SIGTERM, in all its processes after the same step."""

  def __init__(self) -> None:
    super().__init__(143)


def progress(done: int, steps: int) -> Iterable[int]:
  """Numbers of the updates to come, shown as a bar where somebody may be looking."""
  numbers = range(done + 1, steps + 1)
  hidden = not sys.stderr.isatty() or jax.process_index() != 0
  return tqdm(numbers, initial=done, total=steps, unit="step", disable=hidden)


class Termination:
  """Notes SIGTERM instead of ending the process, so that a step can end and be saved.

  A second one ends the process at once, whatever it computes; but not one that comes together with
  the first, as `timeout` sends them.

  Of several processes JAX itself notes it, from when they have joined: it tells the others, and
  they agree on a step that none of them has begun.
  """

  def __init__(self) -> None:
    self._noted, self._joined = False, jax.distributed.is_initialized()
    main = threading.current_thread() is threading.main_thread()
    self._listens = main and not self._joined

  def __enter__(self) -> "Termination":
    self._before = signal.getsignal(signal.SIGTERM)
    if self._listens:
      self._before_wakeup, self._pipe = self._wake_up()
      signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    if self._listens and not self._noted:  # else a second one may still come
      signal.signal(signal.SIGTERM, self._before)
      signal.set_wakeup_fd(self._before_wakeup)
      os.close(self._pipe)

  def _note(self, *_: object) -> None:
    self._noted = True

  def _wake_up(self) -> tuple[int, int]:
    """Has signals watched by a thread too, which they reach while this one computes."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=end_at_second, args=(read,), daemon=True).start()
    return signal.set_wakeup_fd(write, warn_on_full_buffer=False), write

  def due(self, step: int) -> bool:
    """Whether the run ends after this step; the same in all processes. To call at every step."""
    return multihost_utils.reached_preemption_sync_point(step) if self._joined else self._noted


def end_at_second(pipe: int) -> None:
  """Ends the process when SIGTERM comes again; reads the numbers of signals until the end."""
  first = math.inf
  with open(pipe, "rb", buffering=0) as numbers:
    while number := numbers.read(1):
      now = time.monotonic()
      if number[0] != signal.SIGTERM:
        continue
      if now - first > TOGETHER_SECONDS:
        os._exit(143)
      first = min(first, now)


class Log:
  """Metrics on their way to the host, fetched when the next step is already running.

  Args:
    cfg: names the settings when a loss is not finite.
    writer: where they go; None writes nothing.
    step: steps done before.
    work: of an update.
  """

  def __init__(self, cfg: Train, writer: MetricWriter | None, step: int, work: Work):
    self._cfg, self._writer, self._work = cfg, writer, work
    self._step, self._time = step, time.perf_counter()
    self._late: tuple[int, dict[str, Array | float]] | None = None

  def keep(self, step: int, metrics: dict[str, Array | float]) -> None:
    """Remembers what to write at the next `flush`."""
    self._late = step, metrics

  def pause(self) -> None:
    """Leaves the time since the last `flush` out of the rates."""
    self._time = time.perf_counter()

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
    values |= self._work.rates((now - self._time) / (step - self._step))
    self._step, self._time = step, now
    if self._writer is not None:
      self._writer.write(step, values)
    told = {name: value for name, value in values.items() if "/" not in name}
    logging.info("step %d  %s", step, "  ".join(f"{n} {v:.4g}" for n, v in told.items()))
    if not math.isfinite(values["loss"]):
      raise not_finite(self._cfg, f"the loss is {values['loss']}", step)


def not_finite(cfg: Train, what: str, step: int) -> FloatingPointError:
  """The error of a run that has diverged."""
  return FloatingPointError(
    f"{what} at step {step}: try a lower train.lr={cfg.lr:g} or train.clip_norm={cfg.clip_norm:g};"
    " the run goes on from its newest checkpoint"
  )
