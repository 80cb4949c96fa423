"""Start-up and end of a run of several processes, one or more on each machine.

Under SLURM, Open MPI or a Kubernetes indexed job --distributed is enough; elsewhere each process is
told where the first one listens, how many there are, and its own number.

All processes compute each step together, so that none goes on without the others. One that fails
leaves at once; the others end with an error too when they next wait for it, at the latest when JAX
misses its heartbeat, which takes 100 seconds. SIGTERM is noted and told to all, from when they have
joined; see `train.watch.Termination`. Until then it ends the process.
"""

import dataclasses
import os
import sys
import time
from types import TracebackType

import jax
from absl import flags, logging

from launch.rendezvous import Address, check_name, initialise, wait_for_port
from longlive_jax.config.flags import one_line_errors
from longlive_jax.train.watch import Terminated

LAST_WORDS_SECONDS = 3.0  # process 0 waits with its end: the others are cut short by it
WAIT_SECONDS = 240


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
  """The flags of a program that may be one of several processes."""

  distributed: flags.FlagHolder[bool]
  coordinator: flags.FlagHolder[str]
  processes: flags.FlagHolder[int]
  process: flags.FlagHolder[int]
  wait_seconds: flags.FlagHolder[int]

  def joined(self) -> "Joined":
    """Joins the other processes, if flags say that there are any.

    Raises:
      ValueError: flags that do not belong together, an address that is none, or a cluster that does
        not tell.
      SystemExit: the others did not come in time, or SIGTERM came.
    """
    address, count, number = self.coordinator.value, self.processes.value, self.process.value
    if (address, count, number) == ("", 0, -1):
      if self.distributed.value:
        initialise(self.wait_seconds.value)
        tell_number()
    elif not address or count < 1 or not 0 <= number < count:
      raise ValueError(
        f"--coordinator={address!r} --processes={count} --process={number} must be given together:"
        " HOST:PORT of process 0, how many there are, and this one's number from 0"
      )
    else:
      self._join(Address.of(address), count, number)
    return Joined()

  def _join(self, address: Address, count: int, number: int) -> None:
    last = time.monotonic() + self.wait_seconds.value
    check_name(address, last)
    if count > 1:
      logging.info("waiting for %s (process %d of %d)", address, number, count)
    if number > 0:
      wait_for_port(address, last)
    left = max(last - time.monotonic(), 1.0)
    initialise(left, coordinator_address=str(address), num_processes=count, process_id=number)
    tell_number()


class Joined:
  """While the processes are together; an error of one of them ends it at once.

  The usual end of a process waits for the others, which in turn wait for what it was to compute.
  """

  def __enter__(self) -> "Joined":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if error is None or isinstance(error, Terminated) or jax.process_count() == 1:
      return
    code = tell(error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      time.sleep(LAST_WORDS_SECONDS)
    os._exit(code)


def tell(error: BaseException, trace: TracebackType | None) -> int:
  """Writes an error to stderr as the end of a program does; returns the exit code."""

  def again() -> None:
    raise error

  try:
    one_line_errors(again)
  except SystemExit as end:
    return end.code if isinstance(end.code, int) else 1
  except type(error):
    sys.excepthook(type(error), error.with_traceback(trace), trace)
  return 1


def define_process_flags() -> ProcessFlags:
  """Defines --distributed, --coordinator, --processes, --process and --wait_seconds."""
  return ProcessFlags(
    flags.DEFINE_bool(
      "distributed", False, "this is one of several processes; the cluster says which"
    ),
    flags.DEFINE_string(
      "coordinator", "", "HOST:PORT of process 0, where the cluster does not say"
    ),
    flags.DEFINE_integer("processes", 0, "with --coordinator: how many there are", 0),
    flags.DEFINE_integer("process", -1, "with --coordinator: number of this one", -1),
    flags.DEFINE_integer("wait_seconds", WAIT_SECONDS, "how long to wait for the others", 1),
  )


def tell_number() -> None:
  """Logs which process this is; what a run tells after that, process 0 tells."""
  logging.info("process %d of %d", jax.process_index(), jax.process_count())
  if jax.process_index() > 0:
    logging.set_verbosity(logging.WARNING)
