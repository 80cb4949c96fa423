"""The WebSocket of a live session: one connection, one session.

    handshake -> first message (`start` or `resume_session`) -> commands until either side ends it

One task reads and acts on one message after the other, another one sends what is in the outbox. A
message that is refused is answered with an event "error" and the connection goes on, unless there
is no session yet or the client sends too fast.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from longlive_jax.serve.answers import internal_error, refusal
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.limits import Rate
from longlive_jax.serve.live import Live
from longlive_jax.serve.messages import (
  FIRST,
  Message,
  bad,
  check_prompt,
  check_seed,
  check_transition,
  parse,
)
from longlive_jax.serve.outbox import Closing, Delivery, Outbox
from longlive_jax.serve.pictures import from_base64, read_picture
from longlive_jax.serve.saver import Saving
from longlive_jax.serve.security import SUBPROTOCOL, handshake_token
from longlive_jax.serve.service import Service

LAST_WORDS_SECONDS = 5.0  # for what is in the outbox when a connection ends


async def realtime(websocket: WebSocket) -> None:
  """The endpoint `WS /v1/realtime`."""
  service: Service = websocket.app.state.service
  token = handshake_token(
    websocket.scope.get("subprotocols", []),
    websocket.headers,
    websocket.query_params.get("token"),
  )
  try:
    owner = service.access.owner(token) if token is not None else None
    owner = "" if not service.access.tokens else owner
    service.check_open()
    if service.websockets >= service.shared.limits.websockets:
      raise Refused(429, "too_many_connections", "there are too many connections; try again later")
  except Refused as error:
    service.metrics.refused(error.code)
    await websocket.send_denial_response(refusal(error))
    return
  offered = websocket.scope.get("subprotocols", [])
  service.websockets += 1
  try:
    await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
    await Connection(service, websocket, owner).run()
  finally:
    service.websockets -= 1


class Connection:
  """One WebSocket.

  Args:
    service: the server.
    websocket: accepted.
    owner: who it is; None if the first message has to say.
  """

  def __init__(self, service: Service, websocket: WebSocket, owner: str | None):
    self.service, self.websocket, self.owner = service, websocket, owner
    self.outbox = Outbox()
    self.live: Live | None = None
    self._rate = Rate(service.shared.limits.messages_a_second)
    self._saving: Saving | None = None

  async def run(self) -> None:
    """Serves the connection until it ends."""
    sender = asyncio.create_task(self._send())
    reader = asyncio.create_task(self._read())
    tasks = [sender, reader]
    try:
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      if reader.done() and not sender.done():  # what is still to be said
        if reader.cancelled() or reader.exception():  # raised below, and so in the log
          self._tell(failed := internal_error(), None)
          self.outbox.close(1011, failed.code)
        self.outbox.close(1000, "")
        await asyncio.wait([sender], timeout=LAST_WORDS_SECONDS)
    finally:
      for task in tasks:
        task.cancel()
      await asyncio.wait(tasks)
      if self.live:
        self.live.detach(self.outbox)
    for task in tasks:
      if not task.cancelled():
        task.result()

  async def _send(self) -> None:
    try:
      while True:
        item = await self.outbox.get()
        if isinstance(item, Closing):
          await self.websocket.close(item.code, item.reason)
          return
        if isinstance(item, Delivery):
          await self.websocket.send_text(item.header)
          for message in item.messages:
            await self.websocket.send_bytes(message)
          item.sent()
        else:
          await self.websocket.send_text(item)
    except WebSocketDisconnect:
      return

  async def _read(self) -> None:
    patience = self.service.shared.limits.patience_seconds
    try:
      async with asyncio.timeout(patience):
        first = await self._next()
      await self._begin(first)
      while not self.outbox.closed:
        await self._act()
        await self.outbox.room()
    except Refused as error:
      self._tell(error, None)
      self.outbox.close(error.close_code, error.code)
    except TimeoutError:
      self.outbox.close(4408, "no first message")
    except WebSocketDisconnect:
      return

  async def _next(self) -> str:
    """The next message; ends the connection if it is none, or too soon."""
    message = await self.websocket.receive()
    if message["type"] == "websocket.disconnect":
      raise WebSocketDisconnect(message.get("code", 1006))
    if not self._rate.take():
      most = self.service.shared.limits.messages_a_second
      raise Refused(429, "too_fast", f"at most {most:g} messages a second")
    text = message.get("text")
    if text is None:
      raise Refused(415, "not_text", "messages of clients are JSON text, not binary")
    return text

  def _tell(self, error: Refused, number: str | int | None) -> None:
    self.service.metrics.refused(error.code)
    self.outbox.event("error", id=number, code=error.code, message=error.message)

  async def _saved(self) -> None:
    """Waits until what the client asked to save is on disk, or could not be."""
    if self._saving:
      await asyncio.wait([self._saving])

  def _tell_saved(self, saving: Saving, number: str | int | None) -> None:
    error = None if saving.cancelled() else saving.exception()
    if isinstance(error, Refused):
      self._tell(error, number)
    elif not error and not saving.cancelled():
      self.outbox.event("saved", id=number, block=saving.result())

  async def _begin(self, text: str) -> None:
    """Acts on the first message: who it is, and which session."""
    message = parse(text)
    if message.kind not in FIRST:
      raise bad(f"the first message must be {' or '.join(FIRST)}, not {message.kind}")
    if self.owner is None:
      self.owner = self.service.access.owner(message.text("token"))
    self.service.check_open()
    position = message.whole("position")
    if position is not None and position < 0:
      raise Refused(400, "bad_position", f"position={position} must be at least 0", "position")
    if message.kind == "start":
      live = await self._start(message, self.owner)
    else:
      live = await self.service.sessions.resume(self.owner, message.text("id"))
    self.live = live
    live.attach(self.outbox)
    if position is not None:  # more than was sent: part of a block, or a server that was killed
      live.played(min(position, live.reel.sent), back=False)

  async def _start(self, message: Message, owner: str) -> Live:
    prompt = self._prompt(message.text("prompt"), "prompt", "keep")
    given = message.whole("seed")
    seed = secrets.randbits(32) if given is None else check_seed(given)
    image = await self._image(message.text("image")) if "image" in message.values else None
    return await self.service.sessions.start(owner, prompt, seed, image)

  async def _image(self, text: str) -> np.ndarray:
    facts, shared = self.service.shared.facts, self.service.shared

    def read() -> np.ndarray:
      return read_picture(from_base64(text), facts.height, facts.width)

    try:
      return await asyncio.get_running_loop().run_in_executor(shared.encoders, read)
    except ValueError as error:
      raise Refused(400, "bad_image", str(error), "image") from error

  def _prompt(self, text: str, param: str, transition: str) -> str:
    prompt = check_prompt(text, self.service.shared.limits.prompt_chars, param)
    try:
      self.service.backend().check(prompt, transition)
    except ValueError as error:
      raise Refused(400, "bad_prompt", str(error), param) from error
    return prompt

  async def _act(self) -> None:
    """Reads a message and does what it says; a refusal is told."""
    text = await self._next()
    number: str | int | None = None
    try:
      message = parse(text)
      number = message.number
      if message.kind in FIRST:
        raise bad("this connection has a session; open another one")
      if self.live:
        await self._command(message, self.live)
    except Refused as error:
      self._tell(error, number)

  async def _command(self, message: Message, live: Live) -> None:
    async def prompt() -> None:
      transition = check_transition(message.text("transition", "keep"))
      text = self._prompt(message.text("text"), "text", transition)
      await live.push(text, transition, message.number)

    async def cut() -> None:
      text = self._prompt(message.text("text"), "text", "cut")
      await live.push(text, "cut", message.number)

    async def played() -> None:
      live.played(message.whole("position") or 0, back=message.kind == "seek")

    async def pause() -> None:
      live.pause(message.kind == "pause")

    async def fork() -> None:
      child = await self.service.sessions.fork(live, message.whole("block"))
      self.outbox.event("forked", id=message.number, session=child.card.id, block=child.card.made)

    async def rewind() -> None:
      await live.rewind(message.whole("block") or 0, message.number)

    async def save() -> None:
      await self._saved()
      self._saving = await self.service.sessions.save(live, keep=True)
      self._saving.add_done_callback(lambda saving: self._tell_saved(saving, message.number))

    async def stop() -> None:
      await self._saved()
      self.service.sessions.finish(live, "stopped")

    commands: dict[str, Callable[[], Awaitable[None]]] = {
      "prompt": prompt,
      "cut": cut,
      "played": played,
      "seek": played,
      "pause": pause,
      "resume": pause,
      "fork": fork,
      "rewind": rewind,
      "save": save,
      "stop": stop,
    }
    await commands[message.kind]()
