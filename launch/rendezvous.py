"""How the processes of a run find each other: an address that is checked, and waits that end.

JAX itself ends a process without a word of ours when the others do not come, and hears no SIGTERM
while it waits; so it waits in a thread, and this one watches.
"""

import concurrent.futures
import functools
import os
import socket
import sys
import time
from typing import NamedTuple, NoReturn

import jax

PAUSE_SECONDS = 0.5  # between two attempts
SPARE_SECONDS = 60  # JAX waits longer than we do
FLAGS = "--coordinator=HOST:PORT, --processes and --process"
LATE = 1  # exit code; the same command may well go on, unlike after an error of the user


class Address(NamedTuple):
  """Where process 0 listens."""

  host: str
  port: int

  @classmethod
  def of(cls, text: str) -> "Address":
    """Reads HOST:PORT; raises ValueError unless it is."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
      raise ValueError(
        f"--coordinator={text!r} must be HOST:PORT, with a port from 1 to 65535, of process 0"
      )
    return cls(host, int(port))

  def __str__(self) -> str:
    return f"{self.host}:{self.port}"

  @property
  def plain(self) -> tuple[str, int]:
    """For sockets: without the brackets of IPv6."""
    return self.host.removeprefix("[").removesuffix("]"), self.port


def check_name(address: Address, last: float) -> None:
  """Raises ValueError if the host has no address.

  Under Kubernetes, where a pod has its name only from when it starts, that is waited for until the
  monotonic time `last`.
  """
  while True:
    try:
      socket.getaddrinfo(*address.plain, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
      if "KUBERNETES_SERVICE_HOST" not in os.environ or time.monotonic() > last:
        said = getattr(error, "strerror", None) or "it is no name"
        raise ValueError(
          f"--coordinator={address}: the host {address.host!r} cannot be found: {said}"
        ) from error
    else:
      return
    time.sleep(PAUSE_SECONDS)


def wait_for_port(address: Address, last: float) -> None:
  """Returns when something answers there; ends the program at the monotonic time `last`."""
  started = time.monotonic()
  while True:
    try:
      with socket.create_connection(address.plain, timeout=5):
        return
    except OSError as error:
      if time.monotonic() > last:
        waited = round(time.monotonic() - started)
        said = error.strerror or str(error)
        sys.stderr.write(
          f"error: the processes did not find each other: process 0 did not answer at {address}"
          f" for {waited} seconds ({said}); --wait_seconds says how long\n"
        )
        sys.exit(LATE)
    time.sleep(PAUSE_SECONDS)


def initialise(seconds: float, **settings: object) -> None:
  """Calls `jax.distributed.initialize`; its complaints become one line.

  Ends the process if the others have not come after so many seconds, or SIGTERM comes.

  Raises:
    ValueError: they cannot be found.
  """
  patience = round(seconds) + SPARE_SECONDS
  connect = functools.partial(jax.distributed.initialize, initialization_timeout=patience)
  thread = concurrent.futures.ThreadPoolExecutor(1)
  try:
    thread.submit(connect, **settings).result(timeout=seconds)
  except TimeoutError:
    leave(
      LATE,
      "error: the processes did not find each other: not all were there after"
      f" {round(seconds)} seconds; --wait_seconds says how long",
    )
  except KeyboardInterrupt:
    leave(130, "interrupted")
  except SystemExit as end:
    leave(end.code if isinstance(end.code, int) else 1, "ended while waiting for other processes")
  except (RuntimeError, ValueError, LookupError, OSError) as error:
    line = " ".join(str(error).split())
    if not settings:
      line = f"no cluster tells who takes part ({line.rstrip('.')}); give {FLAGS}"
    elif "Failed to start RPC server" in line:
      line = f"process 0 cannot listen at {settings['coordinator_address']}: is the port in use?"
    raise ValueError(f"the processes did not find each other: {line}") from error
  thread.shutdown()


def leave(code: int, line: str) -> NoReturn:
  """Ends the process, whatever its threads do."""
  sys.stdout.flush()
  sys.stderr.write(line + "\n")
  sys.stderr.flush()
  os._exit(code)
