"""What uvicorn does not limit: clients that send no headers, or read no answers."""

import asyncio
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from longlive_jax.serve.security import MOST_HEADER_BYTES, MOST_HEADERS

HEADER_SECONDS = 10.0
SPARE = 64  # connections beyond the limit that get an answer
LINGER_SECONDS = 15.0
DRAIN_SECONDS = 1.0
MOST_LINE = 8000  # bytes of one header of a WebSocket
MOST_UNREAD = 64 << 20  # bytes of a WebSocket that wait for a client to read

TOO_LARGE = (
  b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


class HttpProtocol(H11Protocol):
  """HTTP whose requests must arrive within `HEADER_SECONDS`, their bodies left aside."""

  _deadline: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.BaseTransport) -> None:
    """A client connects; beyond the limit it is told so, and far beyond it it is not."""
    super().connection_made(transport)  # type: ignore[arg-type]
    if len(self.connections) > (self.limit_concurrency or 0) + SPARE:
      self.transport.abort()
    else:
      self._watch()

  def data_received(self, data: bytes) -> None:
    """Bytes of the client."""
    super().data_received(data)
    if self.transport.get_protocol() is self:
      self._watch()
    else:
      self._forget()  # it is a WebSocket now

  def connection_lost(self, exc: Exception | None) -> None:
    """The end."""
    self._forget()
    super().connection_lost(exc)

  def handle_websocket_upgrade(self, event: h11.Request) -> None:
    """Refuses headers that the WebSocket library would give up on without an answer."""
    lines = [len(event.target), *(len(name) + len(value) for name, value in event.headers)]
    if len(lines) > MOST_HEADERS or sum(lines) > MOST_HEADER_BYTES or max(lines) > MOST_LINE:
      self.transport.write(TOO_LARGE)
      self.transport.close()
      return
    super().handle_websocket_upgrade(event)

  def _watch(self) -> None:
    """A deadline while the headers of a request are awaited."""
    if self.conn.their_state is not h11.IDLE:
      self._forget()
    elif self._deadline is None:
      self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

  def _forget(self) -> None:
    if self._deadline is not None:
      self._deadline.cancel()
      self._deadline = None


class WebSocketProtocol(WebSocketsSansIOProtocol):
  """A WebSocket that is cut off if its client reads nothing."""

  _drains = False

  def data_received(self, data: bytes) -> None:
    """Bytes of the client; answers to its pings are not subject to flow control."""
    if self._drains:
      return
    super().data_received(data)
    if self.transport.get_write_buffer_size() > MOST_UNREAD:
      self.transport.abort()

  async def send(self, message: Any) -> None:
    """Bytes for the client; a refusal of the handshake completes it, or uvicorn complains.

    Raises:
      ConnectionError: the connection has been ended from below; uvicorn would call it our error.
    """
    if self.close_sent:
      raise ConnectionAbortedError("the connection has ended")
    await super().send(message)
    if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
      self.handshake_complete = True

  def send_receive_event_to_app(self) -> None:
    """A whole message; text that is no UTF-8 ends the connection, and is no error of ours."""
    if self.curr_msg_data_type == "text" and not self.close_sent:
      try:
        b"".join(self.frames).decode()
      except UnicodeDecodeError:
        self.frames = []
        self.conn.send_close(1007, "text must be UTF-8")
        self.handle_parser_exception()
        return
    super().send_receive_event_to_app()

  def handle_parser_exception(self) -> None:
    """Says why the connection ends.

    What the client still sends is read and dropped for a while: closed at once, with bytes unread,
    TCP would reset the connection and the client might not get to read the reason.
    """
    if self.conn.close_sent is None:  # the handshake was wrong
      self.transport.close()
      return
    code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
    self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
    self.transport.write(b"".join(self.conn.data_to_send()))
    self.close_sent = self._drains = True
    self.close_timer = self.loop.call_later(DRAIN_SECONDS, self.transport.close)

  def on_task_complete(self, task: asyncio.Task[None]) -> None:
    """What has not been read by now never will be."""
    super().on_task_complete(task)
    self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def uvicorn_config(app: Any, *, request_bytes: int, connections: int) -> Config:
  """The settings of uvicorn."""
  return Config(
    app,
    loop="asyncio",
    http=HttpProtocol,
    ws=WebSocketProtocol,
    ws_max_size=request_bytes,
    ws_per_message_deflate=False,
    lifespan="on",
    log_config=None,
    log_level="error",
    access_log=False,
    proxy_headers=False,
    server_header=False,
    limit_concurrency=connections,
    timeout_keep_alive=5,
    timeout_graceful_shutdown=10,
    h11_max_incomplete_event_size=MOST_HEADER_BYTES,
  )
