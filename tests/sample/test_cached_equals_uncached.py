"""Block after block against the cache equals one forward over everything: any story, no tolerance
beyond float32 rounding.
"""

import copy
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Experiment
from longlive_jax.model.attention import BlockCausal, TeacherForcing, block_borders
from longlive_jax.model.rope import video_rope
from longlive_jax.sample.rollout import Engine
from longlive_jax.sample.schedule import Schedule
from longlive_jax.types import Array, PyTree
from tests.sample.tiny import BLOCK, engine, experiment
from tests.sample.uncached import Uncached

BLOCKS = 9
WINDOW = 4  # blocks
TOLERANCE = dict(atol=1e-5, rtol=1e-5)
PROMPTS = np.random.default_rng(3).standard_normal((4, 24, 16)).astype(np.float32)
NOISE = np.random.default_rng(4).standard_normal((BLOCKS, 1, BLOCK, 2, 4, 4)).astype(np.float32)

Made = tuple[Engine, PyTree]
Story = list[dict[str, object]]


@pytest.fixture(scope="module")
def absolute() -> Made:
  return engine(experiment())


@pytest.fixture(scope="module")
def relative() -> Made:
  return engine(experiment(relative_rope=True))


def under(made: Made, **sample: object) -> tuple[Engine, PyTree, Experiment]:
  """The same executables under another policy: the policy is the host's alone."""
  config = experiment(**sample)
  other = copy.copy(made[0])
  other.experiment, other.schedule = config, Schedule.of(config)
  return other, made[1], config


def play(made: Made, story: Story, noise: np.ndarray = NOISE) -> list[np.ndarray]:
  """Latents `[F, H, W, C]` of each block of a story, by the engine."""
  rollout, params = made
  state, outs = rollout.start(), []
  for block, entry in enumerate(story):
    texts = (rollout.text_kv(params, PROMPTS[[entry["prompt"]]]),)
    if entry.get("recache"):
      state = rollout.recache(params, state, texts, [True])
    known = np.zeros(rollout.block_shape, np.float32)
    mask = np.zeros(rollout.block_shape[:2], bool)
    cut = [bool(entry.get("cut"))]
    latents, state = rollout.next_block(params, state, noise[block], texts, cut, known, mask)
    outs.append(np.asarray(latents)[0])
  return outs


def random_story(seed: int) -> Story:
  rng = np.random.default_rng(seed)
  story: Story = []
  for block in range(BLOCKS):
    kind = rng.choice(["", "cut", "recache"], p=[0.5, 0.25, 0.25]) if block else ""
    story.append({"prompt": int(rng.integers(3)), **({str(kind): True} if kind else {})})
  return story


def check(made: Made, config: Experiment, story: Story) -> None:
  """Compares a story with the uncached one."""
  rollout, params = made
  naive = Uncached(config, rollout.denoiser.network, params, PROMPTS, BLOCKS)
  naive.__dict__["forward"] = shared_forward(rollout)
  for block, (ours, entry) in enumerate(zip(play(made, story), story, strict=True)):
    theirs = naive.block(NOISE[block, 0], **entry)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE, err_msg=f"block {block}")


@functools.cache
def shared_forward(rollout: Engine) -> object:
  """One executable for all stories: the plan is data."""
  config = rollout.experiment
  return Uncached(config, rollout.denoiser.network, None, PROMPTS, BLOCKS).forward


POLICIES = {
  "as shipped": {},
  "no sink, no pin, no offset": dict(sink_latents=0, pin_shots=False, shot_offset_latents=0.0),
  "a sink of two blocks": dict(sink_latents=4, shot_offset_latents=2.5),
  "positions scaled": dict(t_scale=0.5, pin_shots=False),
  "cuts forget": dict(recache_cuts=True),
  "cuts forget, nothing is kept": dict(recache_cuts=True, pin_shots=False, sink_latents=0),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_story_equals_the_uncached_one(absolute: Made, policy: str):
  rollout, params, config = under(absolute, **POLICIES[policy])
  for seed in range(3):
    check((rollout, params), config, random_story(seed))


@pytest.mark.parametrize("policy", [{}, dict(recache_cuts=True, t_scale=0.5)])
def test_a_story_with_relative_positions_equals_the_uncached_one(relative: Made, policy: dict):
  rollout, params, config = under(relative, relative_rope=True, **policy)
  check((rollout, params), config, random_story(5))


def test_the_uncached_reference_notices_a_wrong_policy(absolute: Made):
  rollout, params, _ = under(absolute)
  story: Story = [{"prompt": 0, "cut": block == 2} for block in range(BLOCKS)]
  for wrong in ({"pin_shots": False}, {"shot_offset_latents": 7.0}, {"sink_latents": 0}):
    with pytest.raises(AssertionError, match="block"):
      check((rollout, params), experiment(**wrong), story)


def whole_clip(config: Experiment) -> TeacherForcing:
  """Teacher forcing over as many blocks as the window holds, no cuts."""
  latents = WINDOW * BLOCK
  rope = video_rope(np.arange(latents), 1, 2, config.model.head_dim, config.model.rope_theta)
  return TeacherForcing(rope, block_borders(latents, BLOCK, config.latent_tokens))


def flat(blocks: np.ndarray | list[np.ndarray]) -> np.ndarray:
  """`[blocks, F, ...]` to `[1, blocks * F, ...]`."""
  return np.concatenate(list(blocks))[None]


def test_rollout_equals_teacher_forcing_when_the_window_holds_everything(absolute: Made):
  rollout, params = absolute
  config, plan = rollout.experiment, whole_clip(rollout.experiment)
  story: Story = [{"prompt": block % 3} for block in range(WINDOW)]
  clean = flat(play(absolute, story))
  prompts = PROMPTS[[entry["prompt"] for entry in story]]

  @jax.jit
  def velocity(params: PyTree, x: Array, t: Array) -> Array:
    model = rollout.denoiser.network.bind(params)
    text = model.text_kv(prompts)
    return model(x, t, text, plan, context=clean, pieces=WINDOW)[0]

  # all blocks at once: each is given the finished blocks before it
  x = flat(NOISE[:WINDOW, 0])
  for level, after in euler(config):
    times = jnp.full(x.shape[:2], 1000.0 * level, jnp.float32)
    x = x + np.float32(after - level) * np.asarray(velocity(params, x, times))
  np.testing.assert_allclose(clean, x, **TOLERANCE)


def test_rollout_equals_the_block_causal_forward(absolute: Made):
  rollout, params = absolute
  config, forced = rollout.experiment, whole_clip(rollout.experiment)
  plan = BlockCausal(forced.rope, forced.borders)
  story: Story = [{"prompt": block % 3} for block in range(WINDOW)]
  clean = play(absolute, story)
  prompts = PROMPTS[[entry["prompt"] for entry in story]]

  @jax.jit
  def velocity(params: PyTree, x: Array, t: Array) -> Array:
    model = rollout.denoiser.network.bind(params)
    return model(x, t, model.text_kv(prompts), plan, pieces=WINDOW)[0]

  for block in range(WINDOW):
    own = NOISE[block, 0]
    for level, after in euler(config):
      x = np.stack([*clean[:block], own, *NOISE[block + 1 : WINDOW, 0]])
      times = np.repeat(1000.0 * level * (np.arange(WINDOW) >= block), BLOCK)[None]
      v = velocity(params, flat(x), times.astype(np.float32))
      own = own + np.float32(after - level) * np.asarray(v)[0, block * BLOCK :][:BLOCK]
    np.testing.assert_allclose(clean[block], own, **TOLERANCE, err_msg=f"block {block}")


def euler(config: Experiment) -> list[tuple[float, float]]:
  """(sigma, next sigma) of each step."""
  u, shift = np.linspace(1.0, 0.0, config.sample.steps + 1), config.model.shift
  sigmas = shift * u / (1 + (shift - 1) * u)
  return list(itertools.pairwise(sigmas))


def test_a_block_reaches_all_later_blocks_and_no_earlier_one(absolute: Made):
  story: Story = [{"prompt": 0} for _ in range(BLOCKS)]
  before = play(absolute, story)
  for changed in (0, 1, BLOCKS - 2):
    noise = NOISE.copy()
    noise[changed] += 1.0
    same = [np.array_equal(a, b) for a, b in zip(before, play(absolute, story, noise), strict=True)]
    assert same == [block < changed for block in range(BLOCKS)]
