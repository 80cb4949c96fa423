"""The HTTP endpoints. Who may call them has been decided before, see `guard`."""

import asyncio
import dataclasses
import functools
from collections.abc import Awaitable, Callable

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
  FileResponse,
  MalformedRangeHeader,
  PlainTextResponse,
  RangeNotSatisfiable,
  Response,
)
from starlette.routing import Route

from longlive_jax.serve.answers import Json, refusal
from longlive_jax.serve.card import Card
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.live import Live
from longlive_jax.serve.pictures import read_picture
from longlive_jax.serve.service import Service
from longlive_jax.serve.video_files import Video
from longlive_jax.serve.video_request import read_fields, reference_of, script_of

Endpoint = Callable[[Request], Awaitable[Response]]
DEFAULT_LIMIT, MOST_LIMIT = 20, 100


def endpoint(work: Callable[[Service, Request], Awaitable[Response]]) -> Endpoint:
  """An endpoint that gets the server, and whose refusals become JSON."""

  @functools.wraps(work)
  async def call(request: Request) -> Response:
    service: Service = request.app.state.service
    try:
      return await work(service, request)
    except Refused as error:
      service.metrics.refused(error.code)
      retry = {"retry-after": "5"} if error.status in (429, 503) else None
      return refusal(error, retry)
    except ClientDisconnect:
      return Response(status_code=400)  # nobody reads it

  return call


def owner_of(request: Request) -> str:
  """Who asks."""
  return request.state.owner


def video_tree(video: Video, model: str) -> dict[str, object]:
  """The JSON of a video."""
  return {
    "id": video.id,
    "object": "video",
    "model": model,
    "status": video.status,
    "progress": video.progress,
    "created_at": video.created_at,
    "completed_at": video.completed_at or None,
    "seconds": video.seconds,
    "size": video.size,
    "prompt": video.prompt,
    "seed": video.seed(),
    "error": {"code": "failed", "message": video.error} if video.error else None,
  }


@endpoint
async def create_video(service: Service, request: Request) -> Response:
  """`POST /v1/videos`."""
  service.check_open()
  facts, limits = service.shared.facts, service.shared.limits
  fields = await read_fields(request, limits)
  script, data = script_of(fields, facts, limits), reference_of(fields)
  image: np.ndarray | None = None
  try:
    for index, shot in enumerate(script.shots):
      service.backend().check(shot.prompt, shot.transition if index else "keep")
    if data is not None:
      image = await asyncio.get_running_loop().run_in_executor(
        service.shared.encoders, read_picture, data, facts.height, facts.width
      )
  except ValueError as error:
    raise Refused(400, "bad_request", str(error)) from error
  service.check_open()
  video = await service.videos.create(owner_of(request), script, image)
  return Json(video_tree(video, facts.name))


@endpoint
async def list_videos(service: Service, request: Request) -> Response:
  """`GET /v1/videos`: newest first; `limit`, `after` and `order` as query."""
  videos = service.videos.of(owner_of(request))
  query = request.query_params
  order, after = query.get("order", "desc"), query.get("after")
  if order not in ("asc", "desc"):
    raise Refused(400, "bad_request", "order must be asc or desc", "order")
  if order == "asc":
    videos.reverse()
  text = query.get("limit", str(DEFAULT_LIMIT))
  if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MOST_LIMIT):
    raise Refused(400, "bad_request", f"limit must be from 1 to {MOST_LIMIT}", "limit")
  if after is not None:
    found = service.videos.find(owner_of(request), after)
    videos = videos[videos.index(found) + 1 :]
  page = videos[: int(text)]
  tree = {
    "object": "list",
    "data": [video_tree(video, service.shared.facts.name) for video in page],
    "first_id": page[0].id if page else None,
    "last_id": page[-1].id if page else None,
    "has_more": len(videos) > len(page),
  }
  return Json(tree)


@endpoint
async def get_video(service: Service, request: Request) -> Response:
  """`GET /v1/videos/{id}`."""
  video = service.videos.find(owner_of(request), request.path_params["id"])
  return Json(video_tree(video, service.shared.facts.name))


class Content(FileResponse):
  """A file; a `Range` that makes no sense is ignored, as RFC 9110 allows."""

  @classmethod
  def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
    try:
      return super()._parse_range_header(http_range, file_size)
    except MalformedRangeHeader:
      return []
    except RangeNotSatisfiable as error:
      headers = {"content-range": f"bytes */{file_size}"}
      message = f"the file has {file_size} bytes, and none of those asked for"
      raise HTTPException(416, message, headers) from error


@endpoint
async def get_content(service: Service, request: Request) -> Response:
  """`GET /v1/videos/{id}/content`: the .mp4, or parts of it."""
  video = service.videos.find(owner_of(request), request.path_params["id"])
  path = service.videos.files.content(video.id)
  if video.status != "completed" or not path.is_file():
    raise Refused(409, "not_ready", f"the video is {video.status}")
  return Content(
    path,
    media_type="video/mp4",
    filename=f"{video.id}.mp4",
    content_disposition_type="inline",
  )


@endpoint
async def delete_video(service: Service, request: Request) -> Response:
  """`DELETE /v1/videos/{id}`."""
  name = request.path_params["id"]
  await service.videos.delete(owner_of(request), name)
  return Json({"id": name, "object": "video.deleted", "deleted": True})


def session_tree(service: Service, found: Live | Card) -> dict[str, object]:
  """The JSON of a live session or one on disk."""
  live = found if isinstance(found, Live) else None
  card = found.card if isinstance(found, Live) else found
  return {
    "id": card.id,
    "object": "session",
    "status": live.hosted.state if live else "saved",
    "connected": bool(live and live.outbox),
    "block": card.made,
    "seconds": round(service.shared.facts.seconds(card.made), 3),
    "prompt": card.prompt_of(card.made),
    "seed": card.seed,
    "created_at": card.created_at,
    "saved_at": card.saved_at or None,
  }


@endpoint
async def list_sessions(service: Service, request: Request) -> Response:
  """`GET /v1/sessions`: newest first."""
  cards = dict(service.sessions.shelf.cards) if service.sessions.shelf else {}
  found: dict[str, Live | Card] = {**cards, **service.sessions.live}
  trees = [
    session_tree(service, item)
    for item in found.values()
    if (item.card if isinstance(item, Live) else item).owner == owner_of(request)
  ]
  trees.sort(key=lambda tree: str(tree["created_at"]), reverse=True)
  return Json({"object": "list", "data": trees})


@endpoint
async def get_session(service: Service, request: Request) -> Response:
  """`GET /v1/sessions/{id}`."""
  found = service.sessions.find(owner_of(request), request.path_params["id"])
  card = found.card if isinstance(found, Live) else found
  return Json(session_tree(service, found) | {"prompts": [p._asdict() for p in card.prompts]})


@endpoint
async def delete_session(service: Service, request: Request) -> Response:
  """`DELETE /v1/sessions/{id}`."""
  name = request.path_params["id"]
  await service.sessions.delete(owner_of(request), name)
  return Json({"id": name, "object": "session.deleted", "deleted": True})


@endpoint
async def list_models(service: Service, request: Request) -> Response:
  """`GET /v1/models`: the one that there is, and what may be asked of it."""
  facts = service.shared.facts
  model = {
    "id": facts.name,
    "object": "model",
    "size": facts.size,
    "fps": facts.fps,
    "steps": facts.steps,
    "first_block_frames": facts.first_frame(1),
    "block_frames": facts.block_frames,
    "limits": dataclasses.asdict(service.shared.limits),
    "saves": service.sessions.shelf is not None,
  }
  return Json({"object": "list", "data": [model]})


@endpoint
async def health(service: Service, request: Request) -> Response:
  """`GET /healthz`: the process answers."""
  return PlainTextResponse("ok\n")


@endpoint
async def readiness(service: Service, request: Request) -> Response:
  """`GET /readyz`: whether sessions and videos are taken."""
  ready = service.ready
  return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)


@endpoint
async def metrics(service: Service, request: Request) -> Response:
  """`GET /metrics`."""
  text, kind = service.metrics.text()
  return Response(text, media_type=kind)


ROUTES = [
  Route("/v1/videos", create_video, methods=["POST"]),
  Route("/v1/videos", list_videos),
  Route("/v1/videos/{id}", get_video),
  Route("/v1/videos/{id}", delete_video, methods=["DELETE"]),
  Route("/v1/videos/{id}/content", get_content),
  Route("/v1/sessions", list_sessions),
  Route("/v1/sessions/{id}", get_session),
  Route("/v1/sessions/{id}", delete_session, methods=["DELETE"]),
  Route("/v1/models", list_models),
  Route("/healthz", health),
  Route("/readyz", readiness),
  Route("/metrics", metrics),
]
