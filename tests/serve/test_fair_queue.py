"""Turns: who wants block after block gets as many as others who do, whatever the rest is up to."""

import asyncio
import dataclasses
import time

import pytest

from longlive_jax.serve.engine import Engine
from longlive_jax.serve.limits import Limits, Rate
from tests.serve.fake import FakeBackend
from tests.serve.load import MOST_RATIO, crowd, ratio, view
from tests.serve.running import QUICK, running, wait_for


def test_a_crowd_is_served_fairly_and_freed(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("longlive_jax.serve.service.TEND_SECONDS", 0.05)
  backend = FakeBackend(block_seconds=0.002)
  limits = dataclasses.replace(QUICK, sessions=40, resume_seconds=0.3, seconds=100_000.0)
  clients = crowd(16, seed=5, pace=0.02)
  with running(backend, limits=limits) as run:
    url = f"ws://127.0.0.1:{run.port}/v1/realtime"
    asyncio.run(view(url, clients, 5.0))
    wait_for(lambda: not run.service.sessions.live and backend.closed == backend.made)
    assert run.service.websockets == 0
  shares = [client.blocks for client in clients if client.kind == "steady"]
  assert not [error for client in clients for error in client.errors]
  assert min(shares) > 20 and ratio(clients) <= MOST_RATIO, shares
  assert sum(client.vanished for client in clients) > 20
  slow = [client.blocks for client in clients if client.kind == "slow"]
  assert 0 < max(slow) < min(shares)
  assert sum(client.sessions for client in clients) == backend.made


def test_videos_and_viewers_take_turns():
  backend = FakeBackend(block_seconds=0.002)
  limits = dataclasses.replace(QUICK, ahead=10_000, videos_at_once=2)
  with running(backend, limits=limits) as run, run.http() as client:
    for seed in (1, 2):
      client.post("/v1/videos", json={"prompt": "a", "seconds": 60, "seed": seed})
    with run.viewer(seed=3), run.viewer(seed=4):
      start = len(backend.log)
      wait_for(lambda: len(backend.log) > start + 120)
  seeds = [seed for seed, _ in backend.log[start : start + 120]]
  counts = [seeds.count(seed) for seed in (1, 2, 3, 4)]
  assert max(counts) <= MOST_RATIO * min(counts), counts


def test_a_call_comes_before_blocks_that_wait():
  async def main() -> list[str]:
    engine, done = Engine(), []

    async def blocks(name: str) -> None:
      for _ in range(3):
        await engine.block(lambda: (time.sleep(0.01), done.append(name)))

    tasks = [asyncio.create_task(blocks(name)) for name in "abc"]
    await asyncio.sleep(0.001)
    assert engine.waiting == 2
    await engine.attempt(lambda: done.append("call"))
    await asyncio.gather(*tasks)
    await engine.stop()
    return done

  assert asyncio.run(main()) == ["a", "call", "b", "c", *"abcabc"]


def test_a_turn_that_is_given_up_is_not_lost():
  async def main() -> int:
    engine = Engine()
    first = asyncio.create_task(engine.block(lambda: time.sleep(0.02)))
    second = asyncio.create_task(engine.block(lambda: 2))
    third = asyncio.create_task(engine.block(lambda: 3))
    await asyncio.sleep(0.001)
    second.cancel()
    first.cancel()
    turn = await third
    assert engine.waiting == 0
    await engine.stop()
    return turn.done.result()

  assert asyncio.run(main()) == 3


def test_errors_of_the_model_are_values():
  async def main() -> BaseException | None:
    engine = Engine()

    def fail() -> None:
      raise KeyboardInterrupt

    turn = await engine.block(fail)
    assert (await engine.attempt(lambda: 5)).result() == 5
    await engine.stop()
    return turn.done.exception()

  assert isinstance(asyncio.run(main()), KeyboardInterrupt)


def test_a_rate_is_kept_on_average():
  now = 0.0
  rate = Rate(10.0, lambda: now)
  assert [rate.take() for _ in range(21)] == [True] * 20 + [False]
  now = 0.1
  assert [rate.take(), rate.take()] == [True, False]
  now = 1000.0
  assert sum(rate.take() for _ in range(100)) == 20


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_a_limit_that_cannot_be(name):
  with pytest.raises(ValueError, match=f"--{name}=-1 must be at least"):
    _ = dataclasses.replace(Limits(), **{name: -1})
