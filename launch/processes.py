"""Start-up of a run of several processes, one or more on each machine.

Under SLURM, Open MPI or a Kubernetes indexed job --distributed is enough; elsewhere each process is
told where the first one listens, how many there are, and its own number.
"""

import jax
from absl import flags, logging

DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "this is one of several processes; the cluster says which"
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, where the cluster does not say"
)
PROCESSES = flags.DEFINE_integer("processes", 0, "with --coordinator: how many there are", 0)
PROCESS = flags.DEFINE_integer("process", -1, "with --coordinator: number of this one", -1)


def join() -> None:
  """Joins the other processes, if flags say that there are any.

  Raises:
    ValueError: flags that do not belong together, or a cluster that does not tell.
  """
  given = COORDINATOR.value, PROCESSES.value, PROCESS.value
  if given == ("", 0, -1):
    if DISTRIBUTED.value:
      initialise()
    return
  address, count, number = given
  if not address or count < 1 or not 0 <= number < count:
    raise ValueError(
      f"--coordinator={address!r} --processes={count} --process={number} must be given together:"
      " HOST:PORT of process 0, how many there are, and this one's number from 0"
    )
  initialise(coordinator_address=address, num_processes=count, process_id=number)


def initialise(**settings: object) -> None:
  """Calls `jax.distributed.initialize`; its complaints become one line."""
  try:
    jax.distributed.initialize(**settings)  # type: ignore[arg-type]
  except (RuntimeError, ValueError) as error:
    line = " ".join(str(error).split())
    raise ValueError(f"the processes did not find each other: {line}") from error
  logging.info("process %d of %d", jax.process_index(), jax.process_count())
