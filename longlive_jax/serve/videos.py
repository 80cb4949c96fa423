"""Videos of the REST interface: sessions that always want the next block.

Each video has a task. It waits for one of `videos_at_once` places, then a thread writes the file
and asks for block after block, one ahead of what it encodes.
"""

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from longlive_jax.data.prompts import Script
from longlive_jax.io.video import write_video
from longlive_jax.serve.contract import Backend, Session
from longlive_jax.serve.errors import Refused, Seldom, model_error, not_removed
from longlive_jax.serve.hosted import Hosted
from longlive_jax.serve.security import VIDEO_ID, check_id, new_id, unknown
from longlive_jax.serve.shared import Shared
from longlive_jax.serve.video_files import Video, VideoFiles


class Stopped(RuntimeError):
  """The video is not wanted any more."""


class Blocks:
  """The blocks of a video for the thread that writes it; each is asked for on the event loop.

  Args:
    video: its `done` is counted up.
    hosted: the session.
    shared: of the server.
  """

  def __init__(self, video: Video, hosted: Hosted, shared: Shared):
    self._video, self._hosted, self._shared = video, hosted, shared
    self._loop = asyncio.get_running_loop()
    self._asked: concurrent.futures.Future[np.ndarray] | None = None
    self._stopped = False
    script = Script.from_json(video.script)
    self._pushes: dict[int, tuple[str, str]] = {}
    block = 0
    for shot in script.shots:
      self._pushes[block] = (shot.prompt, shot.transition if block else "keep")
      block += shared.facts.blocks_of(shot)

  def frames(self) -> Iterator[np.ndarray]:
    """Yields uint8 `[T, H, W, 3]`; for the thread that writes.

    Raises:
      Stopped: the video is not wanted any more.
    """
    asked = self._ask()
    for _ in range(self._video.blocks - 1):
      frames = self._result(asked)
      asked = self._ask()
      yield frames
    yield self._result(asked)

  def stop(self) -> None:
    """Makes `frames` raise as soon as it waits."""
    self._stopped = True
    if self._asked:
      self._asked.cancel()

  def _ask(self) -> concurrent.futures.Future[np.ndarray]:
    asked = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
    self._asked = asked
    if self._stopped:
      asked.cancel()
    return asked

  def _result(self, asked: concurrent.futures.Future[np.ndarray]) -> np.ndarray:
    try:
      return asked.result()
    except concurrent.futures.CancelledError:
      raise Stopped("the video is not wanted any more") from None

  async def _next(self) -> np.ndarray:
    block = self._video.done
    push = self._pushes.get(block)

    def make() -> np.ndarray:
      if push:
        self._hosted.push(*push)
      return self._hosted.next_block().frames

    turn = await self._shared.engine.block(make)
    frames = turn.done.result()
    self._video.done = block + 1
    self._shared.metrics.block_done("video", len(frames), turn.waited, turn.made, None)
    return frames


class Videos:
  """All videos of a server. Belongs to the event loop.

  Args:
    shared: of the server.
    files: where they are.
    backend: gives the model once it is ready.
  """

  def __init__(self, shared: Shared, files: VideoFiles, backend: Callable[[], Backend]):
    self.shared, self.files, self._backend = shared, files, backend
    self.videos: dict[str, Video] = {}
    self._places = asyncio.Semaphore(shared.limits.videos_at_once)  # gives way in order
    self._writers = ThreadPoolExecutor(shared.limits.videos_at_once, thread_name_prefix="writer")
    self._tasks: dict[str, asyncio.Task[None]] = {}
    self._leaving: set[str] = set()  # are being removed, and unknown
    self._seldom = Seldom()

  def _known(self) -> list[Video]:
    return [video for video in list(self.videos.values()) if video.id not in self._leaving]

  def count(self, status: str) -> int:
    """How many videos are in this state."""
    return sum(video.status == status for video in self._known())

  def load(self) -> None:
    """Finds what an earlier server left."""
    self.videos |= {video.id: video for video in self.files.load()}

  def start(self) -> None:
    """Makes what an earlier server left unfinished; the model is ready."""
    for video in self.videos.values():
      if not video.finished:
        script = Script.from_json(video.script)
        self._size(video, script)
        self._run(video)

  def _size(self, video: Video, script: Script) -> None:
    """Notes how long a video of this model is, and how large."""
    facts = self.shared.facts
    video.blocks = sum(facts.blocks_of(shot) for shot in script.shots)
    video.seconds, video.size = round(facts.seconds(video.blocks), 3), facts.size

  async def create(self, owner: str, script: Script, image: np.ndarray | None) -> Video:
    """Queues a video.

    Args:
      owner: who it belongs to.
      script: with a seed, within the limits.
      image: the first frame, uint8 `[H, W, 3]`.

    Raises:
      Refused: 429, the queue is full; 507, there is no room on disk.
    """
    limits = self.shared.limits
    unfinished = sum(not video.finished for video in self._known())
    if unfinished >= limits.queue + limits.videos_at_once:
      raise Refused(429, "queue_full", f"{self.count('queued')} videos wait; try again later")
    prompt, made = script.shots[0].prompt, int(time.time())
    video = Video(new_id("video"), owner, script.to_json(), prompt, made)
    self._size(video, script)
    self.videos[video.id] = video
    try:
      await asyncio.to_thread(self.files.create, video, image)
    except OSError as error:
      del self.videos[video.id]
      raise Refused(507, "not_saved", "the video cannot be written to disk") from error
    self._run(video)
    await self._drop_oldest()
    return video

  async def _drop_oldest(self) -> None:
    finished = [video for video in self._known() if video.finished]
    for video in finished[: max(0, len(finished) - self.shared.limits.videos_kept)]:
      if self._is_known(video):  # nobody else has removed it meanwhile
        with contextlib.suppress(Refused):  # it is in the log; the next video tries again
          await self._remove(video)

  def _is_known(self, video: Video) -> bool:
    return video.id in self.videos and video.id not in self._leaving

  def _run(self, video: Video) -> None:
    def ended(task: asyncio.Task[None]) -> None:
      del self._tasks[video.id]
      if not task.cancelled() and (error := task.exception()):
        logging.error("video %s is lost", video.id, exc_info=error)

    task = asyncio.create_task(self._make(video))
    self._tasks[video.id] = task
    task.add_done_callback(ended)

  def find(self, owner: str, video: str) -> Video:
    """A video of this owner.

    Raises:
      Refused: 404.
    """
    found = self.videos.get(check_id(video, VIDEO_ID))
    if found is None or found.owner != owner or not self._is_known(found):
      raise unknown(VIDEO_ID)
    return found

  def of(self, owner: str) -> list[Video]:
    """All videos of this owner, newest first."""
    return [video for video in reversed(self._known()) if video.owner == owner]

  async def delete(self, owner: str, video: str) -> None:
    """Cancels a video in whatever state, frees and removes all of it.

    Raises:
      Refused: 404; 507, its files cannot be removed: it stays, as failed if it was not finished.
    """
    await self._remove(self.find(owner, video))

  async def _remove(self, video: Video) -> None:
    """Removes a video, which is unknown from now on; raises Refused if that cannot be."""
    self._leaving.add(video.id)
    try:
      await self._cancel(video.id)
      await asyncio.to_thread(self.files.remove, video.id)
      del self.videos[video.id]
    except OSError as error:
      if not video.finished:
        video.status, video.error = "failed", "it is cancelled, but its files cannot be removed"
      self._seldom.tell(f"the files of video {video.id} cannot be removed", error)
      raise not_removed("video") from error
    finally:
      self._leaving.discard(video.id)

  async def _cancel(self, video: str) -> None:
    if task := self._tasks.get(video):
      task.cancel()
      await asyncio.wait([task])

  async def stop(self) -> None:
    """Makes no more; what is not finished is made again by the next server."""
    for video in list(self._tasks):
      await self._cancel(video)
    await asyncio.to_thread(self._writers.shutdown)

  async def _make(self, video: Video) -> None:
    async with self._places:
      video.status = "in_progress"
      error = await self._write(video)
    if error:
      logging.error("video %s failed", video.id, exc_info=error)
      self.shared.metrics.failed("video")
      video.status, video.error = "failed", model_error(error)
    else:
      video.status, video.completed_at = "completed", int(time.time())
    await asyncio.to_thread(self.files.write, video)

  async def _write(self, video: Video) -> BaseException | None:
    """Makes the file of a video; returns what went wrong."""
    backend, seed = self._backend(), video.seed()

    def make() -> Session:
      return backend.new(seed, self.files.image(video.id))

    hosted = Hosted(make, self.shared.residents)
    blocks = Blocks(video, hosted, self.shared)
    path, fps = self.files.content(video.id), self.shared.facts.fps
    loop = asyncio.get_running_loop()
    writing = loop.run_in_executor(self._writers, write_video, path, blocks.frames(), fps)
    try:
      await asyncio.wait([writing])
    finally:
      blocks.stop()
      await asyncio.wait([writing])
      await self.shared.engine.attempt(hosted.close)
      error = writing.exception()
    return error
