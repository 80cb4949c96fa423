"""Error recycling: buckets, what a full one gives up, decisions of steps, and going on."""

import random

import numpy as np
import pytest

from longlive_jax.config.schema import Recycling
from longlive_jax.train.error_bank import ErrorBank, Recycler, bucket_of

SHAPE = (2, 4, 1, 1, 3)  # two samples of two blocks


def error(value: float) -> np.ndarray:
  return np.full((2, 1, 1, 3), value, np.float32)


def values(bank: ErrorBank, bucket: int) -> list[float]:
  return [float(kept[0, 0, 0, 0]) for kept in bank.entries.get(bucket, [])]


def test_a_bucket_holds_twenty_levels():
  cfg = Recycling()
  assert [bucket_of(cfg, i) for i in (0, 19, 20, 500, 999)] == [0, 0, 1, 25, 49]


@pytest.mark.parametrize("replacement", ["oldest", "random"])
def test_what_a_full_bucket_gives_up(replacement):
  bank = ErrorBank(Recycling(bucket_size=3, replacement=replacement), random.Random(0))
  for value in range(5):
    bank.add(error(value), 5)
  assert bank.added == 5 and len(values(bank, 0)) == 3
  if replacement == "oldest":
    assert values(bank, 0) == [2, 3, 4]
  else:
    assert 4 in values(bank, 0)


def test_errors_come_from_their_own_bucket_and_are_modulated_once():
  bank = ErrorBank(Recycling(modulation=0.3), random.Random(1))
  assert bank.sample(0) is None and bank.sample_any() is None
  bank.add(error(1.0), 0)
  bank.add(error(100.0), 999)
  drawn = np.stack([bank.sample(10) for _ in range(200)])
  assert np.ptp(drawn, (1, 2, 3, 4)).max() == 0, "one factor for a whole block"
  assert 0.7 <= drawn.min() < 0.75 and 1.25 < drawn.max() <= 1.3
  assert bank.sample(500) is None
  some = [float(bank.sample_any().mean()) for _ in range(200)]
  assert 60 < sum(value > 50 for value in some) < 140


def steps(recycler: Recycler, count: int) -> list[list[np.ndarray | None]]:
  """Injections of steps whose errors are their number."""
  found, indices = [], np.repeat(np.asarray([[3, 700], [350, 999]]), 2, 1)
  for step in range(count):
    injection = recycler.draw(indices, SHAPE)
    found.append([*injection.arrays(), np.asarray(injection.clean)])
    made = np.full(SHAPE, step + 1.0, np.float32)
    recycler.keep(injection, indices, made, -made)
  return found


def test_shares_of_steps_are_those_asked_for():
  cfg = Recycling(noise_share=0.5, bucket_size=20)
  found = steps(Recycler(cfg, 0, 2), 2000)[10:]
  noise, latents, context = (np.mean([each[i] is not None for each in found]) for i in range(3))
  clean = np.mean([bool(each[3]) for each in found])
  expected = (0.8 * 0.5, 0.8 * 0.9, 0.8 * 0.9, 0.2)
  np.testing.assert_allclose((noise, latents, context, clean), expected, atol=0.04)
  assert all(each[0] is None or each[0].max() < 0 for each in found), "noise has its own bank"
  assert all(each[:3] == [None] * 3 for each in found if each[3])


def test_a_run_that_is_restored_goes_on_bit_by_bit():
  cfg = Recycling(bucket_size=5, noise_share=0.5)
  whole = steps(Recycler(cfg, 7, 2), 60)[30:]
  first = Recycler(cfg, 7, 2)
  steps(first, 30)
  second = Recycler(cfg, 0, 2)
  second.restore(first.state())
  indices = np.repeat(np.asarray([[3, 700], [350, 999]]), 2, 1)
  for step, wanted in enumerate(whole, 31):
    injection = second.draw(indices, SHAPE)
    for ours, theirs in zip(injection.arrays(), wanted[:3], strict=True):
      assert (ours is None) == (theirs is None)
      assert ours is None or np.array_equal(ours, theirs)
    made = np.full(SHAPE, float(step), np.float32)
    second.keep(injection, indices, made, -made)
