"""One run at a time in a workdir."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging

from longlive_jax.io.processes import is_first, of_all, of_first, wait_for_all

LOCK = "lock"
TAKEN = (errno.EAGAIN, errno.EACCES)  # what flock says if another process has it


@contextlib.contextmanager
def only_run(workdir: str | Path) -> Iterator[None]:
  """Holds `WORKDIR/lock`, in process 0 for all of a run; makes the workdir.

  The system lets go of it when the process ends, in whatever way. The file stays: it says who had
  it last.

  Raises:
    ValueError: another run has it, or the processes of this one do not see the same workdir.
  """
  path, free = Path(workdir) / LOCK, True
  with contextlib.ExitStack() as stack:
    if is_first():
      path.parent.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(path.open("a+", encoding="utf-8"))
      if free := take(file):
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
    free = bool(of_first(free))
    if not all(of_all(path.is_file())):
      raise ValueError(f"--workdir={workdir} must be one folder that all processes share")
    if not free:
      raise ValueError(
        f"--workdir={workdir} is in use by {holder(path)}; wait for its end, or use another folder"
      )
    wait_for_all("lock")
    yield


def take(file: IO[str]) -> bool:
  """Locks an open file unless another process has; where nothing can be locked, warns."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in TAKEN:
      return False
    logging.warning(
      "'%s' cannot be locked (%s): see to it that no other run uses this folder",
      *(file.name, error.strerror),
    )
  return True


def holder(path: Path) -> str:
  """Who has a lock, as far as its file tells."""
  host, _, process = path.read_text(encoding="utf-8").strip().partition(" ")
  return f"a run on host {host}, process {process}" if process else "another run"
