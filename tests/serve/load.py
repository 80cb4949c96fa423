"""A crowd of viewers: a third reads slowly, a third vanishes at random, the others want all.

  python -m tests.serve.load --clients=16 --minutes=10 --out=benchmarks/results/serve_load_cpu.json

Starts `launch.serve` with the tiny model (or takes `--url`) and says what each of the others got,
how memory went, and whether every session was freed. `test_fair_queue` does the same for seconds
with a model that costs nothing.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from longlive_jax.serve.frames import unpack
from tests.serve.record import write_record

MOST_RATIO = 1.3  # between the shares of those who want all
MOST_GROWTH = 1.1  # of memory, between the halves of the time after the first minute
TICKS_A_MINUTE = 6
PROMPTS = ("one red circle, over snow", "one purple triangle moving up, over sand")


@dataclasses.dataclass
class Client:
  """One viewer.

  Attributes:
    kind: "steady", "slow" or "vanishing".
    rng: of its moods.
    blocks: received.
    errors: that nobody asked for.
    sessions: begun.
  """

  kind: str
  rng: random.Random
  pace: float
  blocks: int = 0
  sessions: int = 0
  vanished: int = 0
  session: str = ""
  errors: list[str] = dataclasses.field(default_factory=list)

  async def run(self, url: str, until: float) -> None:
    """Views until the time is over."""
    while time.monotonic() < until:
      try:
        async with connect(url, compression=None, proxy=None, max_size=None) as socket:
          await self._view(socket, until)
      except ConnectionClosed as end:
        code = end.rcvd.code if end.rcvd else 1006
        if code not in (1000, 1006) and not (code == 4429 and self.kind == "vanishing"):
          self.errors.append(f"closed with {code}")
      except (OSError, TimeoutError, InvalidStatus) as error:
        self.errors.append(repr(error))
      await asyncio.sleep(self.rng.uniform(0, 2 * self.pace))

  async def _view(self, socket: ClientConnection, until: float) -> None:
    resumes = bool(self.session) and self.rng.random() < 0.5
    first = {"type": "start", "prompt": PROMPTS[0]}
    if resumes:
      first = {"type": "resume_session", "id": self.session}
    await socket.send(json.dumps(first))
    leaves_at = self.rng.randint(1, 6) if self.kind == "vanishing" else 10**9
    seen, frames_end = 0, 0
    while time.monotonic() < until:
      async with asyncio.timeout(60):
        message = await socket.recv()
      if isinstance(message, str):
        self._note(json.loads(message))
        continue
      packed = unpack(message)
      frames_end = packed.first_frame + len(packed.images)
      if not packed.last:
        continue
      self.blocks, seen = self.blocks + 1, seen + 1
      if seen >= leaves_at:
        self.vanished += 1
        socket.transport.abort()  # without a word
        return
      if self.kind == "slow":
        await asyncio.sleep(20 * self.pace)
      if self.rng.random() < 0.1:
        kind = self.rng.choice(("prompt", "cut"))
        await socket.send(json.dumps({"type": kind, "text": self.rng.choice(PROMPTS)}))
      await socket.send(json.dumps({"type": "played", "position": frames_end}))
    await socket.send(json.dumps({"type": "stop"}))
    async with asyncio.timeout(60):
      async for message in socket:
        if isinstance(message, str):
          self._note(json.loads(message))  # it may have begun only now

  def _note(self, event: dict) -> None:
    if event["type"] == "session":
      self.sessions += event["id"] != self.session
      self.session = event["id"]
    elif event["type"] == "error":
      known = ("unknown_session", "too_many_sessions")
      if not (self.kind == "vanishing" and event["code"] in known):
        self.errors.append(f"{event['code']}: {event['message']}")
      self.session = ""


def crowd(count: int, seed: int, pace: float) -> list[Client]:
  """Viewers of all kinds."""
  kinds = ["slow"] * (count // 3) + ["vanishing"] * (count // 3)
  kinds += ["steady"] * (count - len(kinds))
  return [Client(kind, random.Random(seed + place), pace) for place, kind in enumerate(kinds)]


async def view(
  url: str, clients: list[Client], seconds: float, tick: Callable[[], None] = lambda: None
) -> None:
  """Lets all of them view for a while; counts blocks after a tenth of it."""
  until = time.monotonic() + seconds
  tasks = [asyncio.create_task(client.run(url, until)) for client in clients]
  await asyncio.sleep(seconds / 10)
  for client in clients:
    client.blocks = 0
  while time.monotonic() < until:
    await asyncio.sleep(min(60 / TICKS_A_MINUTE, seconds / 10))
    await asyncio.to_thread(tick)
  await asyncio.gather(*tasks)


def ratio(clients: list[Client]) -> float:
  """The largest share of a steady client over the smallest."""
  shares = [client.blocks for client in clients if client.kind == "steady"]
  return max(shares) / max(1, min(shares))


def metric(url: str, name: str) -> float:
  """A value of `/metrics`, summed over its labels."""
  with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
    text = answer.read().decode()
  found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M)
  return sum(map(float, found))


def held(url: str) -> int:
  """Sessions that the server has."""
  states = ("awake", "parked", "disk")
  return int(sum(metric(url, f"longlive_sessions_{state}") for state in states))


def growth(memory: list[float]) -> float:
  """The most memory of the second half over the most of the first, the first minute left out."""
  later = memory[min(TICKS_A_MINUTE, len(memory) - 2) :]
  return max(later[len(later) // 2 :]) / max(later[: len(later) // 2])


def serve(arguments: list[str]) -> tuple[subprocess.Popen, str]:
  """Starts the real server; returns it and its address once it is ready."""
  command = [sys.executable, "-m", "launch.serve", "--port=0", *arguments]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert process.stdout
  for line in process.stdout:
    print(line, end="", flush=True)
    if match := re.search(r"ready.*(http://\S+)", line):
      return process, match[1]
  raise SystemExit(f"the server ended with {process.wait()}")


def figures(clients: list[Client], memory: list[float]) -> dict:
  """What a record says of a run; the last memory is after it."""
  names = ("kind", "blocks", "sessions", "vanished", "errors")
  return {
    "clients": [{name: getattr(client, name) for name in names} for client in clients],
    "ratio_of_shares": round(ratio(clients), 3),
    "memory_mib": [round(each) for each in memory],
    "memory_growth": round(growth(memory[:-1]), 3),
  }


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--clients", type=int, default=16)
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--url", default="", help="a server that runs, instead of a new one")
  parser.add_argument("--out", default="", help="file for the record")
  given = parser.parse_args()
  process, url = None, given.url
  if not url:
    limits = [f"--sessions={2 * given.clients}", "--resume_seconds=20", "--seconds=100000"]
    process, url = serve(["--config=configs/tiny.py", *limits])
  clients = crowd(given.clients, given.seed, 1.0)
  memory: list[float] = []
  sessions: list[int] = []

  def tick() -> None:
    memory.append(metric(url, "process_resident_memory_bytes") / 2**20)
    sessions.append(held(url))
    blocks = sum(client.blocks for client in clients)
    print(f"{blocks} blocks, {sessions[-1]} sessions, {memory[-1]:.0f} MiB", flush=True)

  socket = url.replace("http", "ws", 1) + "/v1/realtime"
  asyncio.run(view(socket, clients, 60 * given.minutes, tick))
  for client in clients:
    told = f"{client.sessions} sessions, vanished {client.vanished} times"
    print(f"{client.kind:10} {client.blocks:6} blocks, {told} {'; '.join(client.errors[:3])}")
  deadline, left = time.monotonic() + 60, 1
  while left and time.monotonic() < deadline:
    time.sleep(1)
    left = held(url)
  time.sleep(3)
  memory.append(metric(url, "process_resident_memory_bytes") / 2**20)
  print(f"shares {ratio(clients):.2f}, {left} sessions left")
  print(f"memory {growth(memory[:-1]):.3f} of what it was, {memory[-1]:.0f} MiB at the end")
  if process:
    process.terminate()
    print(f"the server ended with {process.wait()}")
  code = process.returncode if process else None
  counts = {"sessions_held": sessions, "sessions_left": left, "exit_code_of_server": code}
  write_record(given.out, "tests.serve.load", figures(clients, memory) | counts)
  failed = any(client.errors for client in clients) or left or code
  kept = memory[-1] > memory[0]  # of sessions that are no more
  if failed or kept or ratio(clients) > MOST_RATIO or growth(memory[:-1]) > MOST_GROWTH:
    raise SystemExit("not as it should be")


if __name__ == "__main__":
  main()
