"""A real server in a thread, on a free port, with a fake model unless a test brings another."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from websockets.sync.client import ClientConnection, connect

from longlive_jax.serve.contract import Backend
from longlive_jax.serve.frames import Form, Packed, unpack
from longlive_jax.serve.limits import Limits
from longlive_jax.serve.security import Access
from longlive_jax.serve.server import Server, listen
from longlive_jax.serve.service import Service, Setup
from tests.serve.fake import FACTS, FakeBackend

SECONDS = 20.0  # a test waits for anything at most so long
QUICK = Limits(messages_a_second=1000.0, patience_seconds=1.0, seconds=60.0)
LOSSLESS = Form("webp", 100, 3)


@dataclasses.dataclass
class Running:
  """A server that runs.

  Attributes:
    server: in its thread.
    port: where it listens.
    backend: its model.
    thread: of the event loop.
  """

  server: Server
  port: int
  backend: Any
  thread: threading.Thread
  failure: BaseException | None = None

  @property
  def service(self) -> Service:
    """Its parts."""
    return self.server.service

  def http(self, **headers: str) -> httpx2.Client:
    """A client; to be closed."""
    url = f"http://127.0.0.1:{self.port}"
    return httpx2.Client(base_url=url, headers=headers, timeout=SECONDS, trust_env=False)

  def websocket(self, query: str = "", **options: Any) -> ClientConnection:
    """A WebSocket; to be closed."""
    url = f"ws://127.0.0.1:{self.port}/v1/realtime{query}"
    limits = {"open_timeout": SECONDS, "close_timeout": 0.5, "max_size": 64 << 20}
    return connect(url, proxy=None, compression=None, **(limits | options))

  @contextlib.contextmanager
  def viewer(self, prompt: str = "a red circle", **fields: Any) -> Iterator["Viewer"]:
    """A client whose session has begun."""
    with self.websocket() as socket:
      viewer = Viewer(socket)
      viewer.say("start", prompt=prompt, **fields)
      viewer.session = viewer.event("session")
      yield viewer

  @contextlib.contextmanager
  def resumed(self, session: str, **fields: Any) -> Iterator["Viewer"]:
    """A client that goes on with a session."""
    with self.websocket() as socket:
      viewer = Viewer(socket)
      viewer.say("resume_session", id=session, **fields)
      viewer.session = viewer.event("session")
      yield viewer

  def stop(self) -> None:
    """As SIGTERM does."""
    self.server.should_exit = True
    self.thread.join(SECONDS)
    assert not self.thread.is_alive(), "the server did not stop"


class Viewer:
  """Talks over a WebSocket and collects what comes."""

  def __init__(self, socket: ClientConnection):
    self.socket = socket
    self.session: dict[str, Any] = {}
    self.events: list[dict[str, Any]] = []
    self.unseen: list[dict[str, Any]] = []  # events that nobody asked for yet
    self.messages: list[Packed] = []

  def say(self, kind: str, **fields: Any) -> None:
    """Sends a message."""
    self.socket.send(json.dumps({"type": kind} | fields))

  def receive(self) -> dict[str, Any] | Packed:
    """What comes next."""
    got = self.socket.recv(timeout=SECONDS)
    if isinstance(got, bytes):
      self.messages.append(unpack(got))
      return self.messages[-1]
    self.events.append(json.loads(got))
    self.unseen.append(self.events[-1])
    return self.events[-1]

  def event(self, kind: str) -> dict[str, Any]:
    """The next event of this kind; others may be asked for later."""
    while True:
      for place, event in enumerate(self.unseen):
        if event["type"] == kind:
          return self.unseen.pop(place)
      self.receive()

  def block(self) -> list[Packed]:
    """Reads until the end of the next block of frames; its messages."""
    while True:
      got = self.receive()
      if isinstance(got, Packed) and got.last:
        return [m for m in self.messages if m.block == got.block]

  def close_code(self) -> int:
    """Reads until the server ends the connection."""
    import websockets.exceptions

    try:
      while True:
        self.receive()
    except websockets.exceptions.ConnectionClosed as end:
      return end.rcvd.code if end.rcvd else 1006


@contextlib.contextmanager
def running(
  backend: Backend | None = None,
  *,
  limits: Limits = QUICK,
  form: Form = LOSSLESS,
  state_dir: Path | None = None,
  tokens: tuple[str, ...] = (),
  build: Callable[[], Backend] | None = None,
  **changes: Any,
) -> Iterator[Running]:
  """A server, ready unless `build` is given."""
  model = backend or FakeBackend()
  setup = Setup(
    changes.pop("facts", FACTS),
    build or (lambda: model),
    limits=limits,
    form=form,
    state_dir=state_dir,
    access=Access(tokens, **changes),
  )
  listening = listen("127.0.0.1", 0)
  server, port = Server(setup), listening.getsockname()[1]

  def serve() -> None:
    try:
      server.serve_on(listening)
    except ValueError as error:
      run.failure = error

  thread = threading.Thread(target=serve, daemon=True)
  run = Running(server, port, model, thread)
  thread.start()
  wait_for(lambda: server.started and (build is not None or server.service.ready))
  try:
    yield run
  finally:
    run.stop()


def wait_for(done: Callable[[], object], seconds: float = SECONDS) -> None:
  """Waits until something is true."""
  end = time.monotonic() + seconds
  while not done():
    assert time.monotonic() < end, "it did not happen in time"
    time.sleep(0.005)
