"""The host's account of a rollout, against a simulation that keeps blocks in order of time.

The device is played by `Memory`: it knows nothing but the tables that it is handed.
"""

import dataclasses

import numpy as np
import pytest

from longlive_jax.sample.schedule import SampleState, Schedule, States, Tables
from tests.sample.tiny import experiment

BLOCKS = 14
HEAD_DIM, THETA = 12, 10000.0
TIME_PAIRS = 2  # of the 6 pairs of a head of 12


def schedule(**sample: object) -> Schedule:
  return Schedule.of(experiment(**sample))


@dataclasses.dataclass
class Naive:
  """One sample: the cached blocks in order of time, oldest first."""

  slots: int
  sink: int
  size: int
  pins: bool
  recache: bool
  offset: float
  kept: list[int] = dataclasses.field(default_factory=list)
  pin: int = -1
  cuts: int = 0

  def enter(self, block: int, cut: bool) -> float:
    """Evicts if it must; returns the block's first position."""
    self.cuts += cut
    if len(self.kept) == self.slots:
      self.kept.remove(next(b for b in self.kept if b >= self.sink and b != self.pin))
    self.kept.append(block)
    return self.size * block + self.offset * self.cuts

  def settle(self, block: int, cut: bool) -> None:
    if cut and self.recache and block >= self.sink:
      self.kept, self.pin = [b for b in self.kept if b < self.sink] + [block], -1
    if cut and self.pins:
      self.pin = block


class Memory:
  """What the device holds: a block a slot, for each sample."""

  def __init__(self, batch: int, slots: int):
    self.blocks = np.full((batch, slots), -1)

  def write(self, tables: Tables, block: int) -> list[list[int]]:
    """Writes the block; returns what each sample sees, by slot."""
    tokens = 2 * 2
    rows = np.arange(len(self.blocks))
    self.blocks[rows, tables.slot] = block
    lengths = tables.lengths
    if lengths is None:
      lengths = np.full(len(rows), tables.level * tokens)
    assert max(lengths) == tables.level * tokens and not np.any(lengths % tokens)
    return [list(row[: n // tokens]) for row, n in zip(self.blocks, lengths, strict=True)]


def turns(positions: object) -> np.ndarray:
  """Complex turns `[..., P_t]` at temporal positions, in float64."""
  frequencies = [THETA ** (-j / TIME_PAIRS) for j in range(TIME_PAIRS)]
  return np.exp(1j * np.asarray(positions, np.float64)[..., None] * frequencies)


def complex_of(cos: object, sin: object) -> np.ndarray:
  return np.asarray(cos) + 1j * np.asarray(sin)


def follow(plan: Schedule, cuts: list[set[int]], blocks: int = BLOCKS) -> list[States]:
  """Runs a batch beside the simulation, compares everything; returns the states after blocks."""
  window, size = plan.window, plan.block_latents
  naive = [
    Naive(window.slots, window.sink, size, plan.pin, plan.recache_cuts, plan.offset) for _ in cuts
  ]
  memory, out = Memory(len(cuts), window.slots), []
  states: States = (SampleState(),) * len(cuts)
  for block in range(blocks):
    cut = [block in own for own in cuts]
    starts = [n.enter(block, c) for n, c in zip(naive, cut, strict=True)]
    states, tables = plan.enter(states, block, cut)
    check_tables(plan, tables, memory.write(tables, block), naive, starts)
    for sample, is_cut in zip(naive, cut, strict=True):
      sample.settle(block, is_cut)
    states, tables = plan.settle(states, block, cut)
    check_tables(plan, tables, memory.write(tables, block), naive, starts)
    assert [s.slots.pin for s in states] == [n.pin for n in naive]
    assert [s.cuts for s in states] == [n.cuts for n in naive]
    out.append(states)
  return out


def check_tables(
  plan: Schedule, tables: Tables, seen: list[list[int]], naive: list[Naive], starts: list[float]
) -> None:
  """What is seen, and how queries and keys are turned."""
  assert [sorted(blocks) for blocks in seen] == [sorted(n.kept) for n in naive]
  steps = np.arange(plan.block_latents)
  if plan.relative:
    starts = [plan.block_latents * (len(n.kept) - 1) for n in naive]
    keys = complex_of(tables.window_cos, tables.window_sin)
    keys = keys.reshape(len(seen), tables.level, plan.block_latents, TIME_PAIRS)
    for row, (blocks, sample) in enumerate(zip(seen, naive, strict=True)):
      for slot, block in enumerate(blocks):
        rank = sample.kept.index(block)
        expected = turns((plan.block_latents * rank + steps) * plan.t_scale)
        np.testing.assert_allclose(keys[row, slot], expected, atol=1e-6)
  else:
    assert tables.window_cos is None and tables.window_sin is None
  own = turns((np.asarray(starts)[:, None] + steps) * plan.t_scale)
  np.testing.assert_allclose(complex_of(tables.cos, tables.sin), own, atol=1e-6)


def test_the_worked_example_of_three_shots():
  plan = schedule(window_latents=8, sink_latents=2, shot_offset_latents=2.0)
  states = follow(plan, [{3, 5}], 8)
  # blocks of 2 and an offset of 2 where the original has 8 and 8
  expected = [0, 2, 4, 8, 10, 14, 16, 18]
  for block, (state,) in enumerate(states):
    slots = state.slots
    assert slots.positions[slots.blocks.index(block)] == expected[block]
  assert [state.slots.pin for (state,) in states] == [-1, -1, -1, 3, 3, 5, 5, 5]
  seen = [sorted(state.slots.blocks) for (state,) in states]
  assert seen[3:] == [[0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5], [0, 4, 5, 6], [0, 5, 6, 7]]


def test_the_worked_example_of_a_cut_that_forgets():
  states = follow(schedule(recache_cuts=True), [{4}], 8)
  seen = ["".join(map(str, sorted(state.slots.blocks))) for (state,) in states]
  assert seen == ["0", "01", "012", "0123", "04", "045", "0456", "0467"]


def random_settings(rng: np.random.Generator) -> dict[str, object]:
  sink, pins = int(rng.integers(0, 3)), bool(rng.integers(2))
  return dict(
    window_latents=2 * int(rng.integers(sink + pins + 1, sink + 5)),
    sink_latents=2 * sink,
    pin_shots=pins,
    recache_cuts=bool(rng.integers(2)),
    shot_offset_latents=float(rng.choice([0.0, 8.0, 2.5])),
    t_scale=float(rng.choice([1.0, 0.5])),
    relative_rope=bool(rng.integers(3) == 0),
  )


def random_cuts(rng: np.random.Generator) -> set[int]:
  return set(rng.choice(np.arange(1, BLOCKS), int(rng.integers(0, 7)), replace=False).tolist())


@pytest.mark.parametrize("seed", range(60))
def test_a_random_story_follows_the_simulation(seed: int):
  rng = np.random.default_rng(seed)
  follow(schedule(**random_settings(rng)), [random_cuts(rng)])


@pytest.mark.parametrize("seed", range(40))
def test_samples_of_a_batch_follow_their_own_cuts(seed: int):
  rng = np.random.default_rng(100 + seed)
  plan = schedule(**random_settings(rng))
  cuts = [random_cuts(rng) for _ in range(3)]
  together = follow(plan, cuts)
  for row, own in enumerate(cuts):
    assert [states[row] for states in together] == [s for (s,) in follow(plan, [own])]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_seen_has_a_closed_form(seed: int):
  rng = np.random.default_rng(200 + seed)
  settings = random_settings(rng) | {"recache_cuts": False}
  plan, cuts = schedule(**settings), sorted(random_cuts(rng))
  window, states = plan.window, (SampleState(),)
  for block in range(BLOCKS):
    states, _ = plan.enter(states, block, [block in cuts])
    held = set(range(min(window.sink, block + 1))) | {block}
    earlier = [cut for cut in cuts if cut < block]
    held |= {earlier[-1]} if plan.pin and earlier else set()
    others = sorted(set(range(block)) - held, reverse=True)
    held |= set(others[: window.slots - len(held)])
    assert set(states[0].slots.blocks) == held
    states, _ = plan.settle(states, block, [block in cuts])


def test_a_cut_inside_the_sink_forgets_nothing_and_caches_no_block_twice():
  plan = schedule(sink_latents=4, window_latents=10, recache_cuts=True)
  states = follow(plan, [{1}], 6)
  assert [sorted(state.slots.blocks) for (state,) in states] == [
    [0],
    [0, 1],
    [0, 1, 2],
    [0, 1, 2, 3],
    [0, 1, 2, 3, 4],
    [0, 1, 3, 4, 5],
  ]


def test_levels_and_lengths_of_samples_that_differ():
  plan = schedule(recache_cuts=True)
  states: States = (SampleState(),) * 2
  for block in range(4):
    states, _ = plan.enter(states, block, [block == 3, False])
    states, tables = plan.settle(states, block, [block == 3, False])
  # the first sample has forgotten all but block 0, the second holds four blocks of 4 tokens
  assert tables.level == 4
  np.testing.assert_array_equal(tables.lengths, [8, 16])
  np.testing.assert_array_equal(tables.slot, [1, 3])
  assert tables.lengths.dtype == tables.slot.dtype == np.int32


def test_a_batch_of_one_needs_no_lengths():
  _, tables = schedule().enter((SampleState(),), 0, [False])
  assert tables.lengths is None and tables.level == 1


def test_positions_far_beyond_a_table_stay_exact():
  plan = schedule(shot_offset_latents=0.0)
  state = (SampleState(),)
  block = 10_000_000
  _, tables = plan.enter(state, block, [False])
  expected = turns(2 * block + np.arange(2))
  np.testing.assert_allclose(complex_of(tables.cos, tables.sin)[0], expected, atol=1e-6)


def test_states_are_values():
  plan, before = schedule(), (SampleState(),)
  plan.enter(before, 0, [False])
  assert before == (SampleState(),) and hash(before) == hash((SampleState(),))


def test_a_cut_for_every_sample_is_needed():
  with pytest.raises(ValueError, match="zip"):
    schedule().enter((SampleState(),) * 2, 0, [False])
