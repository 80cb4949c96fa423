"""Start-up of a run of several processes, one or more on each machine.

Under SLURM, Open MPI or a Kubernetes indexed job --distributed is enough; elsewhere each process is
told where the first one listens, how many there are, and its own number.
"""

import dataclasses

import jax
from absl import flags, logging


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
  """The flags of a program that may be one of several processes."""

  distributed: flags.FlagHolder[bool]
  coordinator: flags.FlagHolder[str]
  processes: flags.FlagHolder[int]
  process: flags.FlagHolder[int]

  def join(self) -> None:
    """Joins the other processes, if flags say that there are any.

    Raises:
      ValueError: flags that do not belong together, or a cluster that does not tell.
    """
    address, count, number = self.coordinator.value, self.processes.value, self.process.value
    if (address, count, number) == ("", 0, -1):
      if self.distributed.value:
        initialise()
      return
    if not address or count < 1 or not 0 <= number < count:
      raise ValueError(
        f"--coordinator={address!r} --processes={count} --process={number} must be given together:"
        " HOST:PORT of process 0, how many there are, and this one's number from 0"
      )
    initialise(coordinator_address=address, num_processes=count, process_id=number)


def define_process_flags() -> ProcessFlags:
  """Defines --distributed, --coordinator, --processes and --process."""
  return ProcessFlags(
    flags.DEFINE_bool(
      "distributed", False, "this is one of several processes; the cluster says which"
    ),
    flags.DEFINE_string(
      "coordinator", "", "HOST:PORT of process 0, where the cluster does not say"
    ),
    flags.DEFINE_integer("processes", 0, "with --coordinator: how many there are", 0),
    flags.DEFINE_integer("process", -1, "with --coordinator: number of this one", -1),
  )


def initialise(**settings: object) -> None:
  """Calls `jax.distributed.initialize`; its complaints become one line."""
  try:
    jax.distributed.initialize(**settings)  # type: ignore[arg-type]
  except (RuntimeError, ValueError) as error:
    line = " ".join(str(error).split())
    raise ValueError(f"the processes did not find each other: {line}") from error
  logging.info("process %d of %d", jax.process_index(), jax.process_count())
