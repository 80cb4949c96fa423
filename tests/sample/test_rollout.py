"""The rollout of a batch: its samples are alone, whatever the others do; guidance, given latents,
prefixes, computing again, and what a state holds.
"""

import itertools

import jax
import numpy as np
import pytest

from longlive_jax.model import solvers
from longlive_jax.sample.block import Denoiser, Texts
from longlive_jax.sample.rollout import Engine, RolloutState
from longlive_jax.types import Array, PyTree
from tests.sample.tiny import BLOCK, engine, experiment
from tests.sample.uncached import Uncached

BATCH, BLOCKS = 3, 8
TOLERANCE = dict(atol=1e-5, rtol=1e-5)
RNG = np.random.default_rng(7)
PROMPTS = RNG.standard_normal((4, 24, 16)).astype(np.float32)
NOISE = RNG.standard_normal((BLOCKS, BATCH, BLOCK, 2, 4, 4)).astype(np.float32)
FIRST = RNG.standard_normal((BATCH, 1, 2, 4, 4)).astype(np.float32)

Made = tuple[Engine, PyTree]
# a block: prompt, cut and recache of each sample
STORY = [
  ([0, 1, 2], [False] * 3, [False] * 3),
  ([0, 1, 1], [False, True, False], [False] * 3),
  ([2, 1, 1], [False] * 3, [False, True, False]),
  ([2, 0, 1], [True, False, False], [False] * 3),
  ([0, 0, 1], [False] * 3, [True, False, True]),
  ([0, 2, 1], [False, True, True], [False] * 3),
  ([1, 2, 0], [False] * 3, [True, True, True]),
  ([1, 2, 0], [True, False, False], [False] * 3),
]


@pytest.fixture(scope="module")
def many() -> Made:
  return engine(experiment(recache_cuts=True), BATCH)


@pytest.fixture(scope="module")
def one() -> Made:
  return engine(experiment(recache_cuts=True))


@pytest.fixture(scope="module")
def guided() -> Made:
  return engine(experiment(guidance=2.5, window_latents=6))


def texts_of(made: Made, prompts: list[int]) -> Texts:
  """Text keys and values of a block; the last prompt is the negative one."""
  rollout, params = made
  texts = [rollout.text_kv(params, PROMPTS[prompts])]
  if rollout.branches > 1:
    texts.append(rollout.text_kv(params, PROMPTS[[-1] * len(prompts)]))
  return tuple(texts)


def nothing_known(rollout: Engine) -> tuple[np.ndarray, np.ndarray]:
  return np.zeros(rollout.block_shape, np.float32), np.zeros(rollout.block_shape[:2], bool)


def play(
  made: Made,
  story: list,
  noise: np.ndarray,
  state: RolloutState | None = None,
  first: np.ndarray | None = None,
) -> tuple[list[np.ndarray], RolloutState]:
  """Latents of each block, and the last state."""
  rollout, params = made
  state, outs = state or rollout.start(), []
  for block, (prompts, cut, recache) in enumerate(story):
    texts = texts_of(made, prompts)
    if any(recache):
      state = rollout.recache(params, state, texts, recache)
    known, mask = nothing_known(rollout)
    if first is not None and block == 0:
      known[:, :1], mask[:, 0] = first, True
    latents, state = rollout.next_block(params, state, noise[block], texts, cut, known, mask)
    outs.append(np.asarray(latents))
  return outs, state


def row_of(story: list, row: int) -> list:
  return [tuple([part[row]] for part in entry) for entry in story]


def uncached(made: Made, blocks: int = BLOCKS) -> Uncached:
  rollout, params = made
  return Uncached(rollout.experiment, rollout.denoiser.network, params, PROMPTS, blocks)


def kept_values(state: RolloutState, row: int) -> dict[int, tuple[np.ndarray, ...]]:
  """What a sample has in its filled slots: block -> keys and values of all branches."""
  return {
    block: tuple(
      np.asarray(part)[:, row, slot] for cache in state.caches for part in (cache.k, cache.v)
    )
    for slot, block in enumerate(state.states[row].slots.blocks)
  }


def check_same_state(ours: RolloutState, row: int, theirs: RolloutState, other: int = 0) -> None:
  """Two samples have the same account and the same keys and values, within rounding."""
  assert ours.block == theirs.block and ours.states[row] == theirs.states[other]
  mine, yours = kept_values(ours, row), kept_values(theirs, other)
  for block, parts in mine.items():
    for a, b in zip(parts, yours[block], strict=True):
      np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=f"block {block}")


def test_a_sample_of_a_batch_equals_that_sample_alone(many: Made, one: Made):
  together, state = play(many, STORY, NOISE)
  for row in range(BATCH):
    alone, own = play(one, row_of(STORY, row), NOISE[:, row : row + 1])
    for block, (a, b) in enumerate(zip(together, alone, strict=True)):
      np.testing.assert_allclose(a[row], b[0], **TOLERANCE, err_msg=f"{row=} {block=}")
    check_same_state(state, row, own)


def test_a_batch_with_its_own_cuts_equals_the_uncached_ones(many: Made):
  together, _ = play(many, STORY, NOISE)
  for row in range(BATCH):
    naive = uncached(many)
    for block, ((prompt,), (cut,), (recache,)) in enumerate(row_of(STORY, row)):
      theirs = naive.block(NOISE[block, row], prompt, cut, recache)
      ours = together[block][row]
      np.testing.assert_allclose(ours, theirs, **TOLERANCE, err_msg=f"{row=} {block=}")


def test_the_samples_of_the_story_are_told_apart(many: Made):
  states = play(many, STORY[:4], NOISE)[1].states
  assert len(set(states)) == 3
  assert [state.slots.level for state in states] == [2, 4, 4]
  assert [state.cuts for state in states] == [1, 1, 0]
  assert [state.slots.pin for state in states] == [3, 1, -1]


def test_computing_again_under_the_same_prompt_changes_nothing_while_all_is_seen(one: Made):
  rollout, params = one
  story = [([0], [False], [False])] * 4
  _, before = play(one, story, NOISE[:, :1])
  values = kept_values(before, 0)
  after = rollout.recache(params, before, texts_of(one, [0]), [True])
  assert after.states == before.states and after.block == before.block
  for block, parts in kept_values(after, 0).items():
    for a, b in zip(parts, values[block], strict=True):
      np.testing.assert_allclose(a, b, **TOLERANCE)


def test_computing_again_keeps_the_sink_the_pin_and_the_samples_that_are_not_named(many: Made):
  rollout, params = many
  story = [(*entry[:2], [False] * 3) for entry in STORY[:6]]
  _, before = play(many, story, NOISE)
  values = [kept_values(before, row) for row in range(BATCH)]
  texts = texts_of(many, [3, 3, 3])
  after = rollout.recache(params, before, texts, [True, False, True])
  for row in range(BATCH):
    slots, old = after.states[row].slots, before.states[row].slots
    assert set(slots.blocks) == set(old.blocks) and slots.pin == old.pin
    assert dict(zip(slots.blocks, slots.positions, strict=True)) == dict(
      zip(old.blocks, old.positions, strict=True)
    )
    for block, parts in kept_values(after, row).items():
      same = all(np.array_equal(a, b) for a, b in zip(parts, values[row][block], strict=True))
      assert same == (row == 1 or block == 0), f"{row=} {block=}"


def test_computing_again_takes_a_pin_along(one: Made):
  rollout, params = one
  story = [([0], [block == 2], [False]) for block in range(7)]
  _, state = play(one, story, NOISE[:, :1])
  assert state.states[0].slots.pin == 2
  state = rollout.recache(params, state, texts_of(one, [1]), [True])
  assert state.states[0].slots.pin == 2
  _, state = play(one, [([1], [False], [False])], NOISE[7:, :1], state)
  assert 2 in state.states[0].slots.blocks and state.states[0].slots.pin == 2


def test_guidance_equals_the_formula(guided: Made):
  story = [([block % 3], [block == 2], [block == 4]) for block in range(6)]
  outs, _ = play(guided, story, NOISE[:, :1])
  naive = uncached(guided, 6)
  for block, ((prompt,), (cut,), (recache,)) in enumerate(story):
    theirs = naive.block(NOISE[block, 0], prompt, cut, recache)
    np.testing.assert_allclose(outs[block][0], theirs, **TOLERANCE, err_msg=f"block {block}")


def test_guidance_has_a_cache_for_each_branch(guided: Made):
  params = guided[1]
  outs, state = play(guided, [([0], [False], [False])] * 2, NOISE[:, :1])
  positive, negative = state.caches
  assert not np.allclose(positive.k, negative.k)
  # the negative cache is what the negative prompt alone would leave for the same latents
  plain = engine(experiment(window_latents=6))
  absorbed = plain[0].start()
  texts = (plain[0].text_kv(params, PROMPTS[[-1]]),)
  for block in outs:
    absorbed = plain[0].absorb(params, absorbed, block, texts, [False])
  np.testing.assert_allclose(negative.k[:, :, :2], absorbed.caches[0].k[:, :, :2], **TOLERANCE)
  np.testing.assert_allclose(negative.v[:, :, :2], absorbed.caches[0].v[:, :, :2], **TOLERANCE)


@pytest.mark.parametrize("name", ["one", "guided"])
def test_a_given_first_latent_is_kept_exactly_and_labelled_zero(
  name: str, request: pytest.FixtureRequest
):
  made = request.getfixturevalue(name)
  story = [([0], [False], [False])] * 3
  outs, _ = play(made, story, NOISE[:, :1], first=FIRST[:1])
  np.testing.assert_array_equal(outs[0][:, :1], FIRST[:1])
  naive = uncached(made)
  for block in range(3):
    first = FIRST[0] if block == 0 else None
    theirs = naive.block(NOISE[block, 0], 0, first=first)
    np.testing.assert_allclose(outs[block][0], theirs, **TOLERANCE)


def test_the_noise_under_a_given_latent_does_not_matter(one: Made):
  story = [([0], [False], [False])] * 2
  noise = NOISE[:, :1].copy()
  outs, _ = play(one, story, noise, first=FIRST[:1])
  noise[0, :, 0] = 100.0
  again, _ = play(one, story, noise, first=FIRST[:1])
  for a, b in zip(outs, again, strict=True):
    np.testing.assert_array_equal(a, b)


def test_only_the_samples_of_the_mask_are_given(many: Made):
  rollout, params = many
  known, mask = nothing_known(rollout)
  known[:, :1], mask[1, 0] = FIRST, True
  args = texts_of(many, [0, 0, 0]), [False] * 3
  given, _ = rollout.next_block(params, rollout.start(), NOISE[0], *args, known, mask)
  free, _ = rollout.next_block(params, rollout.start(), NOISE[0], *args, *nothing_known(rollout))
  np.testing.assert_array_equal(given[1, 0], FIRST[1, 0])
  np.testing.assert_allclose(given[::2], free[::2], **TOLERANCE)
  assert not np.allclose(given[1, 1], free[1, 1])


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_steps_that_remember_ignore_what_they_computed_for_a_given_latent(one: Made, solver: str):
  rollout, params = one
  plan = solvers.plan(solver, 4, 3.0)
  denoiser = Denoiser(rollout.denoiser.network, rollout.denoiser.cfg, plan)
  _, tables = rollout.schedule.enter(rollout.start().states, 0, [False])
  known, mask = nothing_known(rollout)
  known[:, :1], mask[:, 0] = FIRST[:1], True
  run = jax.jit(denoiser.denoise)
  args = texts_of(one, [0]), rollout.start().caches, tables, known, mask
  latents, _ = run(params, NOISE[0, :1], *args)

  # the same steps by hand, on the free latents alone
  state = solvers.init(NOISE[0, :1, 1:])
  velocity = jax.jit(forward(one, tables))
  for i, timestep in enumerate(plan.timesteps):
    x = np.concatenate([FIRST[:1], state.x], 1)
    times = np.array([[0.0, timestep]], np.float32)
    v = velocity(params, x, times, args[0][0], rollout.start().caches[0])
    state = solvers.step(plan.row(i), state, v[:, 1:])
  np.testing.assert_array_equal(latents[:, :1], FIRST[:1])
  np.testing.assert_allclose(latents[:, 1:], state.x, **TOLERANCE)


def forward(made: Made, tables: object) -> object:
  rollout = made[0]

  def run(params: PyTree, x: Array, times: Array, text: object, cache: object) -> Array:
    plan = rollout.denoiser.plan(tables, x)
    return rollout.denoiser.network.bind(params)(x, times, text, plan, cache=cache)[0]

  return run


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_video_that_goes_on_equals_one_that_was_never_interrupted(one: Made, count: int):
  rollout, params = one
  story = [([0], [False], [False])] * BLOCKS
  outs, whole = play(one, story, NOISE[:, :1])
  state = rollout.start()
  for block in outs[:count]:
    state = rollout.absorb(params, state, block, texts_of(one, [0]), [False])
  _, direct = play(one, story[:count], NOISE[:, :1])
  check_same_state(state, 0, direct)
  rest, state = play(one, story[count:], NOISE[count:, :1], state)
  for a, b in zip(outs[count:], rest, strict=True):
    np.testing.assert_allclose(a, b, **TOLERANCE)
  check_same_state(state, 0, whole)


def test_cuts_of_a_prefix_count(one: Made):
  rollout, params = one
  story = [([0], [block == 1], [False]) for block in range(3)]
  outs, direct = play(one, story, NOISE[:, :1])
  state = rollout.start()
  for block, (_, cut, _) in zip(outs, story, strict=True):
    state = rollout.absorb(params, state, block, texts_of(one, [0]), cut)
  check_same_state(state, 0, direct)
  assert state.states[0].cuts == 1 and state.states[0].slots.pin == 1


def test_the_history_is_what_some_sample_still_caches(many: Made):
  outs: list[np.ndarray] = []
  state = many[0].start()
  for block in range(BLOCKS):
    more, state = play(many, [(*STORY[block][:2], [False] * 3)], NOISE[block:], state)
    outs += more
    held = set(itertools.chain(*(s.slots.blocks for s in state.states)))
    assert [number for number, _ in state.history] == sorted(held)
    for number, latents in state.history:
      np.testing.assert_array_equal(latents, outs[number])
  assert len(state.history) < BLOCKS


def test_slots_that_are_not_filled_are_never_read(one: Made):
  poisoned = one[0].start()
  caches = jax.tree.map(lambda a: np.full(a.shape, np.nan, a.dtype), poisoned.caches)
  poisoned = RolloutState(0, poisoned.states, caches)
  story = [([0], [False], [False])] * 3
  outs, _ = play(one, story, NOISE[:, :1], poisoned)
  clean, _ = play(one, story, NOISE[:, :1])
  for a, b in zip(outs, clean, strict=True):
    np.testing.assert_array_equal(a, b)
