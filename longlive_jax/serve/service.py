"""The server as one value: everything that its endpoints use, and its life from start to stop."""

import asyncio
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import logging

from longlive_jax.serve.contract import Backend, Facts
from longlive_jax.serve.engine import Engine
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.frames import Form
from longlive_jax.serve.heap import give_back
from longlive_jax.serve.hosted import Residents
from longlive_jax.serve.limits import Limits
from longlive_jax.serve.metrics import Metrics
from longlive_jax.serve.security import Access
from longlive_jax.serve.sessions import Sessions
from longlive_jax.serve.shared import Shared
from longlive_jax.serve.shelf import Shelf
from longlive_jax.serve.tend import tend
from longlive_jax.serve.video_files import VideoFiles
from longlive_jax.serve.videos import Videos

TEND_SECONDS = 1.0
SESSIONS, VIDEOS = "sessions", "videos"  # folders below the state folder


def told(task: asyncio.Task[None]) -> None:
  """Logs the error of a task that nobody waits for."""
  if not task.cancelled() and (error := task.exception()):
    logging.error("a task of the server failed", exc_info=error)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a server is started with.

  Attributes:
    facts: sizes of the model's videos.
    build: makes the model and compiles everything; called in the model's thread.
    limits: of clients.
    access: who is let in.
    form: of encoded frames.
    state_dir: where sessions and videos are kept; None: sessions are not, videos until the end.
    encoders: threads that encode frames.
    page: folder of static files.
    url: where it listens, to be told when it is ready.
  """

  facts: Facts
  build: Callable[[], Backend]
  limits: Limits = dataclasses.field(default_factory=Limits)
  access: Access = dataclasses.field(default_factory=Access)
  form: Form = dataclasses.field(default_factory=Form)
  state_dir: Path | None = None
  encoders: int = 2
  page: Path = Path(__file__).parent / "page"
  url: str = ""


class Service:
  """A server's parts; to be made on the event loop.

  Args:
    setup: what it is started with.
    ended: called when the model could not be made, so that the server ends.

  Attributes:
    failure: why the model could not be made.
    websockets: how many are open.
  """

  def __init__(self, setup: Setup, ended: Callable[[], object] = lambda: None):
    self.setup, self.access, self._ended = setup, setup.access, ended
    self.metrics, self.engine = Metrics(), Engine()
    self._encoders = ThreadPoolExecutor(setup.encoders, thread_name_prefix="encoder")
    parts = self.engine, self._encoders, self.metrics, Residents(setup.limits.resident_sessions)
    self.shared = Shared(setup.facts, setup.limits, setup.form, *parts)
    self._own_folder = contextlib.ExitStack()
    folder = setup.state_dir
    if folder is None:
      made = tempfile.TemporaryDirectory(prefix="longlive-", ignore_cleanup_errors=True)
      folder = Path(self._own_folder.enter_context(made))
    limits = setup.limits
    shelf = Shelf(folder / SESSIONS, limits.saved_sessions) if setup.state_dir else None
    self.sessions = Sessions(self.shared, shelf, self.backend, lambda: self._memory)
    self.videos = Videos(self.shared, VideoFiles(folder / VIDEOS), self.backend)
    self._model: Backend | None = None
    self.failure: BaseException | None = None
    self.websockets, self._memory, self._stopping = 0, 0, False
    self._tasks: list[asyncio.Task[None]] = []
    self._watch()

  def _watch(self) -> None:
    watch = self.metrics.watch
    for state in ("awake", "parked", "disk"):
      watch(f"sessions_{state}", f"sessions that are {state}", self._counter(state))
    for status in ("queued", "in_progress"):
      watch(f"videos_{status}", f"videos that are {status}", lambda s=status: self.videos.count(s))
    watch("websockets", "open WebSockets", lambda: self.websockets)
    watch("turns_waiting", "blocks that wait for their turn", lambda: self.engine.waiting)
    watch("memory_bytes", "of the accelerator, or of the process", lambda: self._memory)
    watch("ready", "1 when the model is ready", lambda: float(self.ready))

  def _counter(self, state: str) -> Callable[[], float]:
    return lambda: sum(live.hosted.state == state for live in list(self.sessions.live.values()))

  @property
  def built(self) -> bool:
    """Whether the model has been made."""
    return self._model is not None

  @property
  def ready(self) -> bool:
    """Whether sessions and videos are taken."""
    return self._model is not None and not self._stopping

  def backend(self) -> Backend:
    """The model.

    Raises:
      Refused: 503, it is not ready.
    """
    if self._model is None:
      raise Refused(503, "starting", "the model is being compiled; try again later")
    return self._model

  def check_open(self) -> None:
    """Raises Refused: 503, the server starts or stops."""
    if self._stopping:
      raise Refused(503, "stopping", "the server stops")
    self.backend()

  def start(self) -> None:
    """Begins to make the model; everything else waits for it."""
    self.videos.load()
    self._tasks = [asyncio.create_task(self._begin()), asyncio.create_task(self._tend())]
    for task in self._tasks:
      task.add_done_callback(told)

  async def _begin(self) -> None:
    started = time.perf_counter()
    building = await self.engine.attempt(self.setup.build)
    if error := building.exception():
      self.failure = error
      self._ended()
      return
    self._model = building.result()
    if not self._stopping:
      self.videos.start()
      logging.info("ready in %.1f s: %s", time.perf_counter() - started, self.setup.url)

  async def _tend(self) -> None:
    freed = 0
    while True:
      await asyncio.sleep(TEND_SECONDS)
      if self._model is not None:
        measured = await self.engine.attempt(self._model.memory)
        if error := measured.exception():
          self.sessions.seldom.tell("the memory in use cannot be measured", error)
        else:
          self._memory = measured.result()
        await tend(self.sessions)
      if freed != self.shared.residents.freed:
        freed = self.shared.residents.freed
        await asyncio.to_thread(give_back)

  async def stop(self) -> None:
    """Takes nothing new, ends the block in the making, saves sessions, and frees everything."""
    if self._stopping:
      return
    self._stopping = True
    for task in self._tasks:
      task.cancel()
    if self._tasks:
      await asyncio.wait(self._tasks)
    if self._model is None:
      self.engine.abandon()  # it compiles; that cannot be cut short
    else:
      await self.videos.stop()
      await self.sessions.stop()
      await self.engine.stop()
    await asyncio.to_thread(self._encoders.shutdown)
    self._own_folder.close()
