"""The ASGI application: guard, endpoints, the page, and the life of the service."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from longlive_jax.serve.answers import internal_error, refusal
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.realtime import realtime
from longlive_jax.serve.routes import ROUTES
from longlive_jax.serve.security import ALWAYS, SAFE_METHODS, Access, bearer
from longlive_jax.serve.service import Service, Setup

OWNED = ("/v1/", "/metrics")  # paths that need a token
REALTIME = "/v1/realtime"


class Guard:
  """Looks at every request before anything else does, and adds headers to every answer.

  Args:
    app: what comes behind.
    access: who is let in.
  """

  def __init__(self, app: ASGIApp, access: Access):
    self.app, self.access = app, access

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Serves one request or WebSocket."""
    if scope["type"] not in ("http", "websocket"):
      await self.app(scope, receive, send)
      return
    headers = Headers(scope=scope)
    try:
      self.access.check_headers(headers)
      self.access.check_host(headers)
      if scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS:
        self.access.check_origin(headers)
      if scope["type"] == "websocket" and scope["path"] != REALTIME:
        raise Refused(404, "not_found", f"WebSockets are served at {REALTIME}")
      owned = scope["type"] == "http" and scope["path"].startswith(OWNED)
      scope.setdefault("state", {})["owner"] = self.access.owner(bearer(headers)) if owned else ""
    except Refused as error:
      await self._refuse(error, scope, receive, with_headers(send, scope))
      return
    await self.app(scope, receive, with_headers(send, scope))

  async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    extra = {"www-authenticate": "Bearer"} if error.status == 401 else None
    response = refusal(error, extra)
    if scope["type"] == "websocket":
      await WebSocket(scope, receive, send).send_denial_response(response)
    else:
      await response(scope, receive, send)


def with_headers(send: Send, scope: Scope) -> Send:
  """Adds the headers of `ALWAYS`; answers of the API are not to be stored."""

  async def sending(message: Message) -> None:
    if message["type"] in ("http.response.start", "websocket.http.response.start"):
      headers = MutableHeaders(raw=message["headers"])
      for name, value in ALWAYS.items():
        headers.setdefault(name, value)
      stored = "no-store" if scope["path"].startswith(OWNED) else "no-cache"
      headers.setdefault("cache-control", stored)
    await send(message)

  return sending


async def http_error(request: Request, error: Exception) -> Response:
  """Errors of routing in the form of all others."""
  status = error.status_code if isinstance(error, HTTPException) else 500
  codes = {404: "not_found", 405: "bad_method", 416: "bad_range"}
  text = error.detail if isinstance(error, HTTPException) else ""
  headers: Mapping[str, str] | None = getattr(error, "headers", None)
  return refusal(Refused(status, codes.get(status, "bad_request"), text), headers)


async def unexpected_error(request: Request, error: Exception) -> Response:
  """An error of ours, which uvicorn logs; the guard is passed by, so its headers are added here."""
  return refusal(internal_error(), {**ALWAYS, "cache-control": "no-store", "connection": "close"})


def make_app(setup: Setup, ended: Callable[[], object] = lambda: None) -> Starlette:
  """The application.

  Args:
    setup: what the server is started with.
    ended: called when the model could not be made.

  Returns:
    It has the `Service` as `app.state.service` once it has started.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.service = service = Service(setup, ended)
    service.start()
    with contextlib.suppress(asyncio.CancelledError):  # a second SIGINT
      yield
    await service.stop()

  return Starlette(
    routes=[
      *ROUTES,
      WebSocketRoute(REALTIME, realtime),
      Mount("/", StaticFiles(directory=setup.page, html=True)),
    ],
    middleware=[Middleware(Guard, access=setup.access)],
    exception_handlers={HTTPException: http_error, Exception: unexpected_error},
    lifespan=lifespan,
  )
