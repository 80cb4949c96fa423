"""Jobs of several programs each, run in processes of their own on the GPUs of one machine."""

import collections
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
  """Programs that run one after the other.

  Attributes:
    name: of the job; its log is `NAME.log`.
    gpus: that it needs.
    programs: arguments of `python` each.
    seconds: that it may take in all; then it is ended.
  """

  name: str
  gpus: int
  programs: tuple[tuple[str, ...], ...]
  seconds: float = 900.0


@dataclasses.dataclass(frozen=True)
class Ended:
  """A job that has ended.

  Attributes:
    job: the job.
    code: exit status of the program that failed, or 0.
    seconds: that it took.
    gpus: that it had.
  """

  job: Job
  code: int
  seconds: float
  gpus: tuple[str, ...]


class _Running:
  """A job under way."""

  def __init__(self, job: Job, gpus: tuple[str, ...], folder: Path):
    self.job, self.gpus, self.began = job, gpus, time.monotonic()
    self.waiting = collections.deque(job.programs)
    self.log: IO[str] = (folder / f"{job.name}.log").open("w")
    self.process = self._next()

  def _next(self) -> subprocess.Popen[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
    return subprocess.Popen(
      (sys.executable, *self.waiting.popleft()),
      stdin=subprocess.DEVNULL,
      stdout=self.log,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment,
      start_new_session=True,
    )

  def poll(self) -> Ended | None:
    """What became of it; None = it goes on."""
    code, seconds = self.process.poll(), time.monotonic() - self.began
    if code is None and seconds > self.job.seconds:
      self.stop()
      self.log.write(f"ended after {self.job.seconds:.0f} s\n")
      code = self.process.returncode or 1
    if code == 0 and self.waiting:
      self.process = self._next()
      return None
    if code is None:
      return None
    self.log.close()
    return Ended(self.job, code, seconds, self.gpus)

  def stop(self) -> None:
    """Ends its program."""
    self.process.terminate()
    try:
      self.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()


def run_jobs(jobs: Sequence[Job], gpus: Sequence[str], folder: Path) -> Iterator[Ended]:
  """Runs jobs, each when enough GPUs are free, the earlier ones first.

  Args:
    jobs: all of them.
    gpus: as `CUDA_VISIBLE_DEVICES` names them.
    folder: where logs go.

  Yields:
    Jobs as they end. Whoever leaves early ends those that run.

  Raises:
    ValueError: a job needs more GPUs than there are.
  """
  for job in jobs:
    if job.gpus > len(gpus):
      raise ValueError(f"{job.name} needs {job.gpus} GPUs; there are {len(gpus)}")
  waiting, free, running = list(jobs), list(gpus), list[_Running]()
  try:
    while waiting or running:
      for job in [job for job in waiting if job.gpus <= len(free)]:
        if job.gpus <= len(free):
          waiting.remove(job)
          taken, free = tuple(free[: job.gpus]), free[job.gpus :]
          running.append(_Running(job, taken, folder))
      for one in tuple(running):
        ended = one.poll()
        if ended is not None:
          running.remove(one)
          free = sorted((*free, *ended.gpus), key=gpus.index)
          yield ended
      time.sleep(POLL_SECONDS)
  finally:
    for one in running:
      one.stop()
      one.log.close()


def measure(jobs: list[Job], gpus: list[str], folder: Path) -> None:
  """Measures rows and says what became of each.

  Raises:
    SystemExit: some failed.
  """
  failed = []
  for ended in run_jobs(jobs, gpus, folder):
    name, code = ended.job.name, ended.code
    said = "measured" if code == 0 else f"failed with {code}, see {folder / name}.log"
    print(f"{name:20} {ended.seconds:7.1f} s on GPU {','.join(ended.gpus)}: {said}", flush=True)
    if code == 0:
      (folder / f"{name}.done").touch()
    else:
      failed.append(name)
  if failed:
    sys.exit(f"error: {len(failed)} of {len(jobs)} rows failed: {', '.join(failed)}")
