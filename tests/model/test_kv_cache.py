"""The slot policy against recorded traces and a simulation of the original's buffer; the store."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model.kv_cache import (
  SlotState,
  Window,
  admit,
  empty_cache,
  keep_sink,
  pin_block,
  stored_as,
)

FOUR = Window(slots=4, sink=1)  # 32 latents, sink of 8, blocks of 8

# blocks seen while block n is denoised, by hand from the traces in latents
TRACES = {
  "multi-shot, cuts at 2 and 5": (
    FOUR,
    (2, 5),
    ["0", "01", "012", "0123", "0234", "0245", "0456", "0567", "0578", "0589"],
  ),
  "sink, no multi-shot": (
    FOUR,
    (),
    ["0", "01", "012", "0123", "0234", "0345", "0456", "0567", "0678", "0789"],
  ),
  "no sink": (
    Window(4, 0),
    (),
    ["0", "01", "012", "0123", "1234", "2345", "3456", "4567", "5678", "6789"],
  ),
  "cut at 1": (
    FOUR,
    (1,),
    ["0", "01", "012", "0123", "0134", "0145", "0156", "0167", "0178", "0189"],
  ),
  "cut at 2": (FOUR, (2,), ["0", "01", "012", "0123", "0234", "0245", "0256", "0267"]),
  "cuts at 1, 3 and 6": (
    FOUR,
    (1, 3, 6),
    ["0", "01", "012", "0123", "0234", "0345", "0356", "0567", "0678", "0689"],
  ),
  "cuts at 3 and 5": (FOUR, (3, 5), ["0", "01", "012", "0123", "0234", "0345", "0456", "0567"]),
  "window of three": (Window(3, 1), (), ["0", "01", "012", "023", "034", "045"]),
}


def digits(blocks: tuple[int, ...]) -> str:
  return "".join(str(block) for block in sorted(blocks))


def drive(
  window: Window, cuts: tuple[int, ...], count: int, recache: bool = False
) -> list[tuple[SlotState, SlotState, SlotState]]:
  """(while denoised, during the clean pass, after) of each block; every cut pins."""
  state, out = SlotState(), []
  for block in range(count):
    seen, _ = admit(state, block, 8.0 * block, window)
    clean = seen
    if recache and block in cuts:
      clean, _ = admit(keep_sink(seen, window), block, 8.0 * block, window)
    state = pin_block(clean, block) if block in cuts else clean
    out.append((seen, clean, state))
  return out


@pytest.mark.parametrize("name", TRACES)
def test_visible_blocks_follow_the_recorded_trace(name: str):
  window, cuts, expected = TRACES[name]
  seen = [digits(steps[0].blocks) for steps in drive(window, cuts, len(expected))]
  assert seen == expected


def test_pin_ranks_follow_the_recorded_trace():
  ranks = []
  for _, _, state in drive(FOUR, (2, 5), 10):
    ranks.append(8 * sorted(state.blocks).index(state.pin) if state.pin >= 0 else -1)
  assert ranks == [-1, -1, 16, 16, 8, 24, 16, 8, 8, 8]


def test_recache_at_a_cut_keeps_the_sink_and_the_cut_block():
  steps = drive(FOUR, (4,), 8, recache=True)
  assert [digits(seen.blocks) for seen, _, _ in steps[4:]] == ["0234", "045", "0456", "0467"]
  assert digits(steps[4][1].blocks) == "04"


def test_positions_stay_with_their_blocks():
  cuts, state, count = (3, 5), SlotState(), 0
  for block in range(8):
    count += block in cuts
    state, slot = admit(state, block, 8.0 * block + 8.0 * count, FOUR)
    assert state.blocks[slot] == block
    state = pin_block(state, block) if block in cuts else state
  assert dict(zip(state.blocks, state.positions, strict=True)) == {0: 0, 5: 56, 6: 64, 7: 72}


def test_only_the_slot_of_the_evicted_block_changes():
  for before, after in zip(drive(FOUR, (2, 5), 9), drive(FOUR, (2, 5), 10)[1:], strict=True):
    old, new = before[2].blocks, after[0].blocks
    assert sum(a != b for a, b in zip(old, new, strict=False)) + len(new) - len(old) == 1


def test_order_is_the_rank_in_time():
  state = SlotState((0, 7, 5, 6), (0.0, 56.0, 40.0, 48.0))
  assert state.order() == (0, 3, 1, 2)


@dataclasses.dataclass
class Buffer:
  """The original's buffer, one entry a latent, rolled as in spec/models.md section 3.6.4."""

  capacity: int
  sink: int
  shared: int
  end: int = 0
  filled: int = 0
  pin: int = -1
  pin_length: int = 0

  def __post_init__(self):
    self.entries: list[int] = [-1] * self.capacity

  def protected(self) -> int:
    if self.pin >= 0 and self.pin_length > 0:
      return self.shared + self.pin_length * (self.pin == self.shared)
    return max(self.shared, self.sink)

  def call(self, start: int, count: int) -> list[int]:
    """Runs a forward of `count` latents from `start` on; returns the latents it sees."""
    stop, keep, before = start + count, self.protected(), self.end
    if stop > before and count + self.filled > self.capacity:
      gone = count + self.filled - self.capacity
      slide = self.filled - gone - keep
      self.entries[keep : keep + slide] = self.entries[keep + gone : keep + gone + slide]
      self.filled += stop - before - gone
      if self.pin >= 0 and self.pin_length > 0 and self.pin >= keep:
        self.pin -= gone
    else:
      self.filled += stop - before
    self.end = stop
    self.entries[self.filled - count : self.filled] = range(start, stop)
    return self.entries[: self.filled]

  def rewind(self, start: int) -> None:
    self.filled, self.end, self.pin, self.pin_length = self.shared, start, -1, 0

  def hold(self, count: int) -> None:
    self.pin, self.pin_length = self.filled - count, min(self.sink, count)


def random_story(rng: np.random.Generator) -> tuple[Window, int, bool, bool, tuple[int, ...]]:
  """(window, latents a block, pins, recache, cuts) of a run that the original handles."""
  size, sink = int(rng.integers(1, 5)), int(rng.integers(0, 3))
  pins = sink > 0 and bool(rng.integers(2))
  recache = pins and bool(rng.integers(2))
  window = Window(int(rng.integers(sink + pins + 1, sink + 6)), sink)
  first = sink if recache else 1
  cuts = rng.choice(np.arange(first, 14), size=int(rng.integers(0, 7)), replace=False)
  return window, size, pins, recache, tuple(sorted(cuts.tolist()))


@pytest.mark.parametrize("seed", range(100))
def test_policy_equals_the_rolled_buffer_of_the_original(seed: int):
  window, size, pins, recache, cuts = random_story(np.random.default_rng(seed))
  sink = window.sink * size
  buffer, state = Buffer(window.slots * size, sink, sink if pins else 0), SlotState()
  for block in range(14):
    state, _ = admit(state, block, 0.0, window)
    for _ in range(2):  # a second pass over the block changes nothing
      check_same(buffer.call(block * size, size), state, size)
    if block in cuts and recache:
      buffer.rewind(block * size)
      state, _ = admit(keep_sink(state, window), block, 0.0, window)
    check_same(buffer.call(block * size, size), state, size)
    if block in cuts and pins:
      buffer.hold(size)
      state = pin_block(state, block)
    if state.pin >= 0:
      assert buffer.pin == sorted(state.blocks).index(state.pin) * size


def check_same(latents: list[int], state: SlotState, size: int) -> None:
  """The buffer holds the blocks of the slots, in the order of time."""
  expected = [block * size + i for block in sorted(state.blocks) for i in range(size)]
  assert latents == expected


def test_write_fills_one_slot_a_sample_and_read_takes_the_lowest():
  cache = empty_cache(2, 2, 3, 4, 2, 6, "float32")
  k = jax.random.normal(jax.random.key(0), (2, 4, 2, 6))
  cache = jax.jit(lambda c, s: c.write(1, s, k, 2 * k))(cache, jnp.array([2, 0]))
  for store, new in ((cache.k, k), (cache.v, 2 * k)):
    expected = np.zeros(store.shape, np.float32)
    expected[1, 0, 2], expected[1, 1, 0] = new[0], new[1]
    np.testing.assert_array_equal(store, expected)
  keys, values = cache.read(1, 1)
  np.testing.assert_array_equal(keys[1], k[1])
  assert keys.shape == values.shape == (2, 4, 2, 6)
  assert not np.any(keys[0]) and not np.any(cache.read(0, 3)[0])


def test_a_narrow_cache_stores_narrow_keys():
  cache = empty_cache(1, 1, 1, 2, 1, 4, "bfloat16")
  k = jnp.full((1, 2, 1, 4), 1.001, jnp.float32)
  cache = cache.write(0, jnp.zeros(1, jnp.int32), k, k)
  assert cache.k.dtype == jnp.bfloat16
  np.testing.assert_array_equal(cache.k.astype(jnp.float32), 1.0)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", jnp.float8_e4m3fn, jnp.dtype("float8_e4m3fn")])
def test_what_fp8_cannot_hold_is_the_largest_that_it_can(dtype):
  found = stored_as(jnp.asarray([6e4, -jnp.inf, 3.0], jnp.bfloat16), dtype)
  assert found.dtype == jnp.float8_e4m3fn
  np.testing.assert_array_equal(found.astype(jnp.float32), [448.0, -448.0, 3.0])
