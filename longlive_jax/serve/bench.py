"""What the server costs: one script, made by the library alone and for a viewer of the server.

Ways: "stream" (`Sampler.stream`, as `launch.sample` makes a video), "session" (a `Session`, one
block after the other) and "api" (the real server on the loopback interface, and one viewer that
takes every block at once). Weights, device and process are the same; the ways take turns, round by
round. All end with uint8 frames on the host; of the server's, as encoded files that the viewer got.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from websockets.sync.client import connect

from longlive_jax.data.prompts import Script
from longlive_jax.eval.bench import Record, setting
from longlive_jax.eval.bench_rollout import script_of, sizes_of
from longlive_jax.sample.sampler import Sampler
from longlive_jax.sample.session import Session
from longlive_jax.serve.adapter import SamplerBackend
from longlive_jax.serve.contract import Facts
from longlive_jax.serve.frames import Form, unpack
from longlive_jax.serve.limits import Limits
from longlive_jax.serve.server import Server, listen
from longlive_jax.serve.service import Setup

WAYS = ("stream", "session", "api")
LIMITS = Limits(sessions=1, seconds=1e6, messages_a_second=1e6)
PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Pass:
  """A script that was made once.

  Attributes:
    first: seconds from the prompt to the first frames; None where they are held back.
    ends: seconds from the prompt to all frames of each block.
    model: seconds of each block in the model's thread, if it has one.
    encoded: seconds of encoding each block, if it is encoded.
  """

  first: float | None
  ends: list[float]
  model: list[float] = dataclasses.field(default_factory=list)
  encoded: list[float] = dataclasses.field(default_factory=list)


def by_stream(sampler: Sampler, script: Script) -> Pass:
  """By the sampler, which computes a block while the one before is brought to the host."""
  began, ends = time.perf_counter(), []
  for _ in sampler.stream(script):
    ends.append(time.perf_counter() - began)
  return Pass(None, ends)


def by_session(sampler: Sampler, script: Script, keep: int) -> Pass:
  """By a session that keeps as many restore points as those of the server."""
  began, ends = time.perf_counter(), []
  (shot,) = script.shots
  session = Session(sampler, seed=script.seed, keep=keep)
  session.push(shot.prompt)
  for _ in range(shot.blocks or 0):
    session.next_block()
    ends.append(time.perf_counter() - began)
  session.close()
  return Pass(ends[0], ends)


def by_api(url: str, script: Script, facts: Facts) -> Pass:
  """By the server, for a viewer that says at once that it has played what it got.

  Raises:
    ValueError: the server refuses.
  """
  (shot,) = script.shots
  blocks, ends, found = shot.blocks or 0, [], Pass(None, [])
  with connect(url, proxy=None, compression=None, max_size=None) as socket:
    began = time.perf_counter()
    socket.send(json.dumps({"type": "start", "prompt": shot.prompt, "seed": script.seed}))
    while len(ends) < blocks or len(found.model) < blocks:
      message = socket.recv(timeout=PATIENCE_SECONDS)
      now = time.perf_counter() - began
      if isinstance(message, bytes):
        found = found if found.first else dataclasses.replace(found, first=now)
        if unpack(message).last:
          ends.append(now)
          if len(ends) <= blocks - LIMITS.ahead:  # or it would make more than are asked for
            played = {"type": "played", "position": facts.first_frame(len(ends))}
            socket.send(json.dumps(played))
        continue
      event = json.loads(message)
      if event["type"] == "error":
        raise ValueError(f"the server says: {event['message']}")
      if event["type"] == "stats":
        count = facts.first_frame(len(found.model) + 1) - facts.first_frame(len(found.model))
        found.model.append(count / event["model_fps"])
        found.encoded.append(max(0.0, event["latency_ms"] / 1e3 - found.model[-1]))
    socket.send(json.dumps({"type": "stop"}))
    for _ in socket:  # until the server ends it
      pass
  return dataclasses.replace(found, ends=ends)


@contextlib.contextmanager
def serving(backend: SamplerBackend, facts: Facts, form: Form, encoders: int) -> Iterator[str]:
  """Serves a model on a free port of the loopback interface; gives the address of the WebSocket."""
  listening = listen("127.0.0.1", 0)
  place = f"127.0.0.1:{listening.getsockname()[1]}"
  limits = dataclasses.replace(LIMITS, rewind_blocks=backend.rewind_blocks)
  url = f"http://{place}"
  server = Server(Setup(facts, lambda: backend, limits, form=form, encoders=encoders, url=url))
  thread = threading.Thread(target=server.serve_on, args=[listening], name="server")
  thread.start()
  try:
    while not (server.started and server.service.ready) and thread.is_alive():
      time.sleep(0.01)
    yield f"ws://{place}/v1/realtime"
  finally:
    server.should_exit = True
    thread.join()


def measure(
  sampler: Sampler, *, ways: tuple[str, ...], rounds: int, blocks: int, **server: Any
) -> Iterator[Record]:
  """Times each way.

  Args:
    sampler: weights of any kind.
    ways: of `WAYS`.
    rounds: of all ways in turn, each from a new prompt on; one more comes before, not timed.
    blocks: timed in each round, after the window is full.
    server: `form`, `encoders` and `rewind_blocks` of the server.

  Yields:
    A record for each way.
  """
  keep, passes = server["rewind_blocks"], {way: [] for way in ways}
  facts, backend = Facts.of(sampler.experiment), SamplerBackend(sampler, keep)
  logging.info("compiling")
  backend.warm_up()
  with serving(backend, facts, server["form"], server["encoders"]) as url:
    for number in range(rounds + 1):
      for way in ways if number % 2 else reversed(ways):
        name = f"{number}{way[:2]}"  # so that its text is encoded anew
        script = script_of(sampler.experiment, blocks if number else 2, name)
        if way == "stream":
          done = by_stream(sampler, script)
        elif way == "session":
          done = by_session(sampler, script, keep)
        else:
          done = by_api(url, script, facts)
        said = f"round {number} of {rounds}" if number else "warm-up"
        logging.info("%s: %s, %d blocks in %.1f s", said, way, len(done.ends), done.ends[-1])
        if number:
          passes[way].append(done)
  medians = {way: float(np.median(steady(done, blocks))) for way, done in passes.items()}
  for way, done in passes.items():
    yield {
      "case": "serve",
      "implementation": way,
      "sizes": sizes_of(sampler.experiment),
      "over": {other: medians[way] / medians[other] for other in medians},
      "rounds": rounds,
      "server": {**server, "form": dataclasses.asdict(server["form"])},
      **times_of(done, blocks, facts),
      **setting(),
    }


def times_of(passes: list[Pass], blocks: int, facts: Facts) -> Record:
  """What a record says of all passes of one way."""
  seconds = steady(passes, blocks)
  low, median, high = np.percentile(seconds, [10, 50, 90])
  return {
    "median_seconds": median,
    "p10_seconds": low,
    "p90_seconds": high,
    "repeats": len(seconds),
    "frames_per_second": facts.block_frames / median,
    "first_frames_seconds": [one.first for one in passes if one.first],
    "model_seconds": middle([one.model[-blocks:] for one in passes]),
    "encode_seconds": middle([one.encoded[-blocks:] for one in passes]),
    "peak_bytes_in_use": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
  }


def steady(passes: list[Pass], blocks: int) -> list[float]:
  """Seconds from one of the last blocks to the next."""
  return [float(x) for one in passes for x in np.diff(one.ends)[-blocks:]]


def middle(lists: list[list[float]]) -> float | None:
  """The median of all numbers, if there are any."""
  flat = [x for one in lists for x in one]
  return float(np.median(flat)) if flat else None
