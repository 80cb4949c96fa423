"""Runs the application: the socket, signals, and an orderly end."""

import errno
import fcntl
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from absl import logging

from longlive_jax.io.atomic import check_writable
from longlive_jax.serve.app import make_app
from longlive_jax.serve.protocol import uvicorn_config
from longlive_jax.serve.service import SESSIONS, VIDEOS, Service, Setup


def is_loopback(host: str) -> bool:
  """Whether only this machine reaches an address or name.

  Raises:
    ValueError: there is no such host.
  """
  return all(ipaddress.ip_address(address).is_loopback for _, address in addresses(host))


def addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
  """The addresses of a host, IPv4 first.

  Raises:
    ValueError: there is no such host.
  """
  try:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
  except (socket.gaierror, UnicodeError) as error:
    raise ValueError(f"--host={host!r} is no address of this machine: {error}") from error
  listed = [(family, str(address[0]).partition("%")[0]) for family, _, _, _, address in found]
  return sorted(listed, key=lambda item: item[0] != socket.AF_INET)


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens.

  Args:
    host: name or address.
    port: 0 takes a free one.

  Raises:
    ValueError: the port is taken or not allowed, or the host is not of this machine.
  """
  family, address = addresses(host)[0]
  # With the protocol named, asyncio turns Nagle's algorithm off: it costs 40 ms an answer.
  listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
  try:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((address, port))
    listening.listen(128)
    return listening
  except (OSError, OverflowError) as error:
    listening.close()
    code = getattr(error, "errno", None)
    hint = "; choose another --port" if code in (errno.EADDRINUSE, errno.EACCES) else ""
    reason = (getattr(error, "strerror", "") or str(error)).lower()
    raise ValueError(f"cannot listen at --host={host} --port={port}: {reason}{hint}") from error


def take_folder(folder: Path) -> object:
  """Makes a state folder and keeps other servers out of it while the result lives.

  Raises:
    OSError: it or a folder in it cannot be written or read.
    ValueError: another server uses it.
  """
  for part in (folder, folder / SESSIONS, folder / VIDEOS):
    check_writable(part, folder=True)
    part.mkdir(parents=True, exist_ok=True)
    check_writable(part / "new")
    next(part.iterdir(), None)
  check_writable(folder / "lock")
  lock = (folder / "lock").open("w")
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    lock.close()
    raise ValueError(f"--state_dir='{folder}' is in use by another server") from error
  return lock


class Server(uvicorn.Server):
  """Serves until it is told to stop; then everything is saved before connections end.

  Args:
    setup: what it is started with.
  """

  def __init__(self, setup: Setup):
    self.app = make_app(setup, self._give_up)
    limits = setup.limits
    super().__init__(
      uvicorn_config(self.app, request_bytes=limits.request_bytes, connections=limits.connections)
    )

  @property
  def service(self) -> Service:
    """The service, once it has started."""
    return self.app.state.service

  def _give_up(self) -> None:
    self.should_exit = True

  async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
    """Stops accepting, stops the service, then ends what connections are left."""
    logging.info("stopping")
    for server in self.servers:
      server.close()
    await self.service.stop()
    await super().shutdown(list(sockets or []))

  def serve_on(self, listening: socket.socket) -> None:
    """Serves on a socket that listens, until SIGTERM or SIGINT; they are raised again at the end.

    Raises:
      Whatever kept the model from being made.
    """
    try:
      self.run(sockets=[listening])
    finally:
      listening.close()
    if self.service.failure:
      raise self.service.failure
