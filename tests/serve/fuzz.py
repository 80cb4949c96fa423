"""Nonsense of all kinds, drawn from a seed: each gets a clear answer, and the server goes on.

  python -m tests.serve.fuzz --messages=10000 --out=benchmarks/results/serve_fuzz_cpu.json

A clear answer is an HTTP status below 500, an event, or a close code of a WebSocket, within
`SECONDS`. Raw bytes that are no HTTP may also just be cut off.
"""

import argparse
import collections
import contextlib
import json
import random
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import websockets.exceptions
from websockets.sync.client import ClientConnection

from longlive_jax.serve.messages import KINDS
from tests.serve.fake import FakeBackend
from tests.serve.record import write_record
from tests.serve.running import LOSSLESS, QUICK, Running, running

SECONDS = 10.0
CLOSE_CODES = {1000, 1002, 1003, 1006, 1007, 1008, 1009, 4400, 4401, 4404, 4408, 4409, 4415, 4429}
WORDS = (
  "",
  " ",
  "a",
  "one red circle",
  "\0",
  "\ud800",
  "é" * 50,
  "🎬",
  "../../etc/passwd",
  "%00",
  "session_" + "0" * 32,
  "video_" + "f" * 32,
  "x" * 3000,
  "keep",
  "cut",
  "recache",
  "32x16",
  "NaN",
  "1e999",
  "data:image/png;base64,AAAA",
  "<script>",
  "null",
)
NUMBERS = (0, 1, 5, -1, 0.5, 1e308, -1e-308, 2**31, 2**32, 2**53, 2**64, 10**400, True, False, None)
WS_FIELDS = ("type", "id", "prompt", "text", "seed", "image", "token", "position", "block")
HTTP_FIELDS = ("prompt", "script", "seconds", "size", "seed", "model", "input_reference")
TYPES = (
  "start",
  "resume_session",
  "prompt",
  "cut",
  "pause",
  "resume",
  "played",
  "seek",
  "fork",
  "rewind",
  "save",
  "startt",
)
PATHS = (
  "/",
  "/healthz",
  "/metrics",
  "/v1/videos",
  "/v1/videos/{}",
  "/v1/videos/{}/content",
  "/v1/sessions",
  "/v1/sessions/{}",
  "/v1/models",
  "/v1/realtime",
  "/{}",
)
Counts = collections.Counter


def value(rng: random.Random, depth: int = 0) -> object:
  """Some JSON."""
  kind = rng.random()
  if kind < 0.4:
    return rng.choice(WORDS)
  if kind < 0.8 or depth > 3:
    return rng.choice(NUMBERS)
  if kind < 0.9:
    return [value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
  names = ("shots", "prompt", "blocks", "seconds", "transition", "seed", "image", "x")
  return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def spoiled(rng: random.Random, text: str) -> str:
  """A text with something cut out, put in or repeated."""
  start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
  kind = rng.randint(0, 3)
  if kind == 0:
    return text[:start] + text[end:]
  if kind == 1:
    return text[:start] + rng.choice('{}[]":,\\\x00e-') + text[start:]
  if kind == 2:
    return text[:end] + text[start:]
  return text * rng.choice((2, 50))


def message(rng: random.Random) -> str:
  """What a client might say over a WebSocket."""
  if rng.random() < 0.5:
    kind = rng.choice([kind for kind in KINDS if kind != "stop" or rng.random() < 0.1])
    tree: dict[str, object] = {"type": kind}
    for name, field in KINDS[kind].items():
      if field.needed or rng.random() < 0.3:
        right = rng.choice(WORDS[2:4]) if field.kind is str else rng.randint(0, 60)
        tree[name] = right if rng.random() < 0.9 else value(rng)
    return json.dumps(tree)
  tree = {rng.choice(WS_FIELDS): value(rng) for _ in range(rng.randint(0, 4))}
  if rng.random() < 0.9:
    tree["type"] = rng.choice(TYPES)
  if rng.random() < 0.3:
    tree |= {"prompt": "a", "text": "b"}
  text = json.dumps(tree)
  return spoiled(rng, text) if rng.random() < 0.3 else text


def try_http(rng: random.Random, client: httpx2.Client) -> str:
  """A request; returns its status."""
  path = rng.choice(PATHS).replace("{}", rng.choice(WORDS).encode("utf-8", "replace").hex()[:9000])
  if rng.random() < 0.5:
    path = rng.choice(PATHS).replace("{}", rng.choice(("..%2f..", "video_" + "0" * 32, "%ff", "~")))
  method = rng.choice(("GET", "GET", "POST", "POST", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"))
  options: dict = {}
  if rng.random() < 0.2:
    options["params"] = {"limit": ascii(value(rng))[:50]}
  if method == "POST":
    path = rng.choice(("/v1/videos", "/v1/videos", "/v1/videos", path))
    names = HTTP_FIELDS if rng.random() < 0.8 else WORDS
    tree = {rng.choice(names): value(rng) for _ in range(rng.randint(0, 4))}
    kind = rng.random()
    if kind < 0.5:
      text = json.dumps(tree)
      text = spoiled(rng, text) if rng.random() < 0.3 else text
      options["content"] = text.encode("utf-8", "replace")
      options["headers"] = {"content-type": rng.choice(("application/json", "", "text/html"))}
    elif kind < 0.8:
      options["data"] = {
        k if k in HTTP_FIELDS else ascii(k): str(v).encode("utf-8", "replace")
        for k, v in tree.items()
      }
      options["files"] = {"input_reference": ("a.png", rng.randbytes(rng.randint(0, 300)))}
    else:
      body = b"--x\r\n" + rng.randbytes(rng.randint(0, 200)) + b"\r\n--x--"
      options["content"] = body
      options["headers"] = {"content-type": "multipart/form-data; boundary=x"}
  names = ("range", "if-range", "origin", "authorization", "cookie", "expect", "accept")
  if rng.random() < 0.3:
    given = rng.choice(("bytes=0-", "bytes=,", "null", "x" * 100, "http://localhost", "é")).encode()
    options.setdefault("headers", {})[rng.choice(names)] = given
  answer = client.request(method, path, **options)
  if answer.status_code >= 500:
    raise AssertionError(f"{method} {path} {options}: {answer.status_code} {answer.text}")
  return f"HTTP {answer.status_code}"


def try_raw(rng: random.Random, run: Running) -> str:
  """Raw bytes; returns what came of them."""
  lines = [
    f"{rng.choice(('GET', 'POST', 'X'))} {rng.choice(PATHS)} HTTP/1.{rng.randint(0, 2)}",
    rng.choice(("host: localhost", "host: evil.example", "", "host: [")),
    *(f"{rng.choice(WORDS)[:200]}: {rng.choice(WORDS)}" for _ in range(rng.choice((0, 2, 100)))),
    rng.choice(("upgrade: websocket\r\nconnection: upgrade", "transfer-encoding: chunked", "a: b")),
    rng.choice(("sec-websocket-key: x", "content-length: 5", "content-length: x", "expect: x")),
  ]
  data = "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + rng.randbytes(20)
  if rng.random() < 0.3:
    data = rng.randbytes(rng.randint(1, 2000))
  got = b""
  connected = socket.create_connection(("127.0.0.1", run.port), timeout=SECONDS)
  with connected as raw, contextlib.suppress(ConnectionError):
    raw.sendall(data)
    raw.shutdown(socket.SHUT_WR)
    got = raw.recv(4096)
  if got.startswith(b"HTTP/1.1 5"):
    raise AssertionError(f"{data[:300]!r}: {got[:300]!r}")
  return f"raw {got[9:12].decode()}" if got else "raw cut"


def try_websocket(rng: random.Random, run: Running, count: int) -> Counts[str]:
  """A conversation of this many messages; returns what came of it."""
  told: Counts[str] = collections.Counter()
  with run.websocket() as opened:
    try:
      begun = rng.random() < 0.7
      if begun:
        opened.send(json.dumps({"type": "start", "prompt": "a"}))
      for place in range(count):
        kind = rng.random()
        if kind < 0.02:
          opened.send(rng.randbytes(rng.randint(0, 100)))
        elif kind < 0.03:
          opened.socket.sendall(rng.randbytes(rng.randint(1, 100)))  # no frame at all
          opened.socket.shutdown(socket.SHUT_WR)
        else:
          opened.send(message(rng))
        opened.send(json.dumps({"type": "rewind", "block": -1, "id": f"probe {place}"}))
        await_probe(opened, f"probe {place}", told)
    except OSError:
      told["cut"] += 1
    except websockets.exceptions.ConnectionClosed as end:
      code = end.rcvd.code if end.rcvd else 1006
      if code not in CLOSE_CODES:
        raise AssertionError(f"closed with {code}") from end
      told[f"close {code}"] += 1
  return told


def await_probe(opened: ClientConnection, probe: str, told: Counts[str]) -> None:
  """Reads until the server has answered a message that it refuses."""
  deadline = time.monotonic() + SECONDS
  while True:
    got = opened.recv(timeout=deadline - time.monotonic())
    if isinstance(got, bytes):
      continue
    event = json.loads(got)
    if event.get("id") == probe:
      return
    told[f"event {event['type']} {event.get('code', '')}"] += 1


def fuzz(run: Running, messages: int, seed: int, tick: Callable[[int], None]) -> Counts[str]:
  """Sends this many messages; returns what came of them."""
  rng, told, done = random.Random(seed), collections.Counter(), 0
  client = run.http()
  with client:
    while done < messages:
      kind = rng.random()
      if kind < 0.25:
        count = rng.randint(1, 40)
        told += try_websocket(rng, run, count)
        done += count
      elif kind < 0.35:
        told[try_raw(rng, run)] += 1
        done += 1
      else:
        told[try_http(rng, client)] += 1
        done += 1
      tick(done)
    assert client.get("/healthz").text == "ok\n"
    with run.viewer() as viewer:
      viewer.block()
  return told


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--messages", type=int, default=10_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default="", help="file for the record")
  given = parser.parse_args()
  backend, began = FakeBackend(), time.monotonic()
  with (
    tempfile.TemporaryDirectory() as folder,
    running(backend, limits=QUICK, form=LOSSLESS, state_dir=Path(folder)) as run,
  ):
    told = fuzz(run, given.messages, given.seed, lambda done: None)
  for what, count in sorted(told.items()):
    print(f"{count:7} {what}")
  if backend.made != backend.closed:
    raise SystemExit(f"{backend.made} sessions made, {backend.closed} freed")
  values = {"messages": given.messages, "seconds": round(time.monotonic() - began, 1)}
  answers = {what.strip(): count for what, count in sorted(told.items())}
  values |= {"sessions_made": backend.made, "sessions_freed": backend.closed}
  write_record(given.out, "tests.serve.fuzz", values | {"answers": answers})
  print(f"{given.messages} messages, {backend.made} sessions made and freed")


if __name__ == "__main__":
  main()
