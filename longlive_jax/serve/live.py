"""A live session: blocks are made as the viewer plays them, and delivered to one connection.

At most `limits.ahead` blocks are made beyond those that the viewer says it has played; it cannot
say so of frames that have not been sent.

    produce: wait until a block is wanted -> wait for the turn -> the model's thread
    deliver: encode in a thread of the pool -> keep -> outbox of the connection

What a call to the model changes is noted when its future is done, not when somebody has waited for
it: so events keep the order in which things happened in the model's thread.
"""

import asyncio
import time
from collections.abc import Callable

from longlive_jax.serve.card import Card
from longlive_jax.serve.engine import Turn
from longlive_jax.serve.errors import Refused, model_error
from longlive_jax.serve.frames import messages_of
from longlive_jax.serve.hosted import Hosted, Made
from longlive_jax.serve.outbox import Outbox
from longlive_jax.serve.reel import Reel
from longlive_jax.serve.shared import Shared


class Live:
  """A session and its viewer. Belongs to the event loop.

  Args:
    card: data of the session.
    hosted: the session itself.
    shared: of the server.
    memory: bytes in use, for the viewer.
    over: called once, when the last block is delivered, or with the error if the model failed.

  Attributes:
    paused: whether the client asked for a pause.
    outbox: of the connection, if there is one.
    active_at: when something happened last, `time.monotonic`.
    gone_at: when the connection was lost; None while there is one.
  """

  def __init__(
    self,
    card: Card,
    hosted: Hosted,
    shared: Shared,
    memory: Callable[[], int],
    over: Callable[["Live", BaseException | None], object],
  ):
    self.card, self.hosted, self.shared = card, hosted, shared
    self._memory, self._over = memory, over
    self.reel = Reel(shared.facts, card.position, shared.metrics.sent)
    self.paused, self._halted, self._said = False, False, ""
    self.outbox: Outbox | None = None
    self.active_at = time.monotonic()
    self.gone_at: float | None = None
    self._most_blocks = shared.facts.most_blocks(shared.limits.seconds)
    self._epoch = 0
    self._raw: asyncio.Queue[tuple[Made, Turn[Made]]] = asyncio.Queue()  # at most `ahead`
    self._changed = asyncio.Event()
    self._tasks: list[asyncio.Task[None]] = []

  @property
  def ahead(self) -> int:
    """Blocks made and not played."""
    return self.card.made - self.shared.facts.block_at(self.reel.position)

  def start(self) -> None:
    """Begins to make blocks."""
    for work in (self._produce(), self._deliver()):
      task = asyncio.create_task(work)
      task.add_done_callback(self._ended)
      self._tasks.append(task)

  async def stop(self) -> None:
    """Makes no more blocks."""
    for task in self._tasks:
      task.cancel()
    if self._tasks:
      await asyncio.wait(self._tasks)

  def _ended(self, task: asyncio.Task[None]) -> None:
    if not task.cancelled():
      self._over(self, task.exception())

  def why_waiting(self) -> str:
    """Why no block is made now: "end", "stopping", "paused", "viewer"; empty: one is."""
    if self.card.made >= self._most_blocks:
      return "end"
    if self._halted:
      return "stopping"
    if self.paused:
      return "paused"
    return "viewer" if self.ahead >= self.shared.limits.ahead else ""

  async def _produce(self) -> None:
    loop = asyncio.get_running_loop()

    def make() -> Made:  # in the model's thread
      self.hosted.wake()
      loop.call_soon_threadsafe(self._begun)
      return self.hosted.next_block()

    while True:
      while reason := self.why_waiting():
        self._tell_waiting(reason)
        self._changed.clear()
        await self._changed.wait()
      self._said = ""
      turn = await self.shared.engine.block(make)
      made = turn.done.result()
      self.active_at = time.monotonic()
      if made.epoch == self._epoch:
        self.card.made = made.block + 1
        self._raw.put_nowait((made, turn))

  def _tell_waiting(self, reason: str) -> None:
    if reason != self._said and reason in ("paused", "viewer"):
      self._event("waiting", reason=reason)
    self._said = reason

  def _begun(self) -> None:
    block = self.card.made
    self._event("block_started", block=block, prompt=self.card.prompt_of(block))

  async def _deliver(self) -> None:
    loop, shared = asyncio.get_running_loop(), self.shared
    while self.card.made < self._most_blocks or not self._raw.empty():
      made, turn = await self._raw.get()
      start, first = time.perf_counter(), shared.facts.first_frame(made.block)
      makers = messages_of(made.frames, made.block, first, shared.form)
      works = [loop.run_in_executor(shared.encoders, make) for make in makers]
      messages = await asyncio.gather(*works)
      encoded = time.perf_counter() - start
      shared.metrics.block_done("live", len(made.frames), turn.waited, turn.made, encoded)
      if made.epoch == self._epoch:
        delivery = self.reel.add(messages)
        if self.outbox:
          self.outbox.put(delivery)
        self._tell_stats(len(made.frames), turn.waited + turn.made + encoded, turn.made)
      self._raw.task_done()

  async def settled(self) -> None:
    """Waits until all blocks that were made are encoded, or none will be any more."""
    joined = asyncio.create_task(self._raw.join())
    await asyncio.wait([joined, *self._tasks[1:]], return_when=asyncio.FIRST_COMPLETED)
    joined.cancel()

  def _tell_stats(self, count: int, seconds: float, made: float) -> None:
    self._event(
      "stats",
      fps=round(count / seconds, 2),
      model_fps=round(count / made, 2),
      latency_ms=round(1000 * seconds),
      ahead=self.ahead,
      waiting=self.shared.engine.waiting,
      memory=self._memory(),
    )

  def _event(self, kind: str, **fields: object) -> None:
    if self.outbox:
      self.outbox.event(kind, **fields)

  def attach(self, outbox: Outbox) -> None:
    """Delivers to this connection from now on, first of all what has not been played."""
    if self.outbox:
      self.outbox.event("error", code="taken_over", message="another connection goes on with it")
      self.outbox.close(4409, "taken over")
    self.outbox, self.gone_at, self._said = outbox, None, ""
    outbox.event("session", **self.description())
    for delivery in self.reel:
      outbox.put(delivery)
    self.touch()

  def description(self) -> dict[str, object]:
    """The fields of the event "session"."""
    facts, card = self.shared.facts, self.card
    return {
      "id": card.id,
      "seed": card.seed,
      "width": facts.width,
      "height": facts.height,
      "fps": facts.fps,
      "block": card.made,
      "position": self.reel.position,
      "prompt": card.prompt_of(card.made),
      "first_block_frames": facts.first_frame(1),
      "block_frames": facts.block_frames,
      "ahead": self.shared.limits.ahead,
      "most_blocks": self._most_blocks,
      "format": self.shared.form.format,
      "paused": self.paused,
    }

  def detach(self, outbox: Outbox) -> None:
    """The connection is gone; the session stays for a while."""
    if self.outbox is outbox:
      self.outbox, self.gone_at = None, time.monotonic()

  def touch(self) -> None:
    """Notes that the client did something, and looks whether a block is wanted."""
    self.active_at = time.monotonic()
    self._changed.set()

  def halt(self) -> None:
    """Wants no more blocks, because the server stops."""
    self._halted = True

  def pause(self, paused: bool) -> None:
    """Makes no blocks until the pause is over."""
    self.paused = paused
    self.touch()

  def played(self, position: int, *, back: bool) -> None:
    """The viewer has played this many frames; see `Reel.played`."""
    self.reel.played(position, back=back)
    self.card.position = self.reel.position
    self.touch()

  async def push(self, prompt: str, transition: str, number: object) -> None:
    """Sets the prompt of the blocks to come; tells so with the client's `number`."""

    def noted(block: int) -> None:
      self.card.push(block, prompt, transition)
      self._event("prompt_received", id=number, takes_effect_block=block)

    await self._call(lambda: self.hosted.push(prompt, transition), noted)

  async def rewind(self, block: int, number: object) -> None:
    """Goes back, so that `block` is the next one.

    Raises:
      Refused: 400, there is no such block, or it is too long ago.
    """
    if not 0 <= block <= self.card.made:
      message = f"block={block} must be from 0 to {self.card.made}"
      raise Refused(400, "bad_block", message, "block")

    def noted(epoch: int) -> None:
      self._epoch = epoch
      self.reel.rewind(block)
      self.card.rewind(block, self.reel.position)
      if self.outbox:
        self.outbox.drop_frames(block)
      first = self.shared.facts.first_frame(block)
      self._event("rewound", id=number, block=block, first_frame=first)

    await self._call(lambda: self.hosted.rewind(block), noted, "bad_block")

  async def _call[T](
    self, work: Callable[[], T], noted: Callable[[T], None], code: str = "bad_request"
  ) -> None:
    """Calls the model; a refusal of its session is one to the client, other errors end it."""
    future = self.shared.engine.submit(work)
    future.add_done_callback(lambda f: None if f.exception() else noted(f.result()))
    await asyncio.wait([future])
    self.touch()
    error = future.exception()
    if isinstance(error, ValueError):
      raise Refused(400, code, model_error(error)) from error
    if error:
      self._over(self, error)
      raise Refused(500, "model_failed", model_error(error)) from error
