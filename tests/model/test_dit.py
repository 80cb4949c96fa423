"""The transformer: sizes, embeddings, patches, and one network for every forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Model, Text, Vae
from longlive_jax.convert.keys_dit import dit_rows
from longlive_jax.model import masks
from longlive_jax.model.attention import BlockCausal, Cached, Full, TeacherForcing, block_borders
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.kv_cache import KVCache, SlotState, Window, admit, empty_cache
from longlive_jax.model.layers import patchify, sinusoid, unpatchify
from longlive_jax.model.module import count_parameters
from longlive_jax.model.rope import Rope, temporal_positions, video_rope
from longlive_jax.types import Array, PyTree

BATCH, BLOCKS, SIZE = 2, 3, 4  # samples, blocks of a clip, height and width of a latent
CFG = Model(
  width=32,
  ffn_width=48,
  heads=2,
  layers=2,
  frequency_width=16,
  block_latents=2,
  dtype="float32",
  text=Text(width=12, length=5),
  vae=Vae(latent_channels=3),
)
NETWORK = declare_dit(CFG)
TOKENS = (SIZE // CFG.patch) ** 2
LATENTS = BLOCKS * CFG.block_latents
BORDERS = block_borders(LATENTS, CFG.block_latents, TOKENS)


def normal(seed: int, *shape: int) -> Array:
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def params() -> PyTree:
  """Parameters away from their initial zeros, so that nothing is hidden."""
  leaves, tree = jax.tree.flatten(NETWORK.init(0))
  rng = np.random.default_rng(0)
  noisy = [np.asarray(a) + 0.2 * rng.standard_normal(a.shape, np.float32) for a in leaves]
  return jax.tree.unflatten(tree, noisy)


def rope_of(positions: np.ndarray) -> Rope:
  return video_rope(positions, SIZE // CFG.patch, SIZE // CFG.patch, CFG.head_dim)


def clip(seed: int) -> Array:
  return normal(seed, BATCH, LATENTS, SIZE, SIZE, CFG.vae.latent_channels)


def times(*values: float) -> Array:
  """Timesteps `[B, F]`, one value a block."""
  return jnp.tile(jnp.repeat(jnp.array(values), CFG.block_latents), (BATCH, 1))


def prompts(seed: int, count: int) -> Array:
  return normal(seed, BATCH * count, CFG.text.length, CFG.text.width)


@functools.partial(jax.jit, static_argnames="pieces")
def forced(
  params: PyTree,
  x: Array,
  t: Array,
  context: Array,
  text: Array,
  plan: TeacherForcing | masks.Masked,
  pieces: int = BLOCKS,
) -> Array:
  model = NETWORK.bind(params)
  return model(x, t, model.text_kv(text), plan, context=context, pieces=pieces)[0]


@jax.jit
def cached(
  params: PyTree, x: Array, t: Array, text: Array, cache: KVCache, plan: Cached
) -> tuple[Array, KVCache]:
  model = NETWORK.bind(params)
  return model(x, t, model.text_kv(text), plan, cache=cache)


@jax.jit
def causal(
  params: PyTree, x: Array, t: Array, text: Array, plan: BlockCausal | masks.Masked
) -> Array:
  model = NETWORK.bind(params)
  return model(x, t, model.text_kv(text), plan)[0]


def fresh_cache() -> KVCache:
  tokens = CFG.block_latents * TOKENS
  return empty_cache(CFG.layers, BATCH, BLOCKS, tokens, CFG.heads, CFG.head_dim, "float32")


def test_the_full_network_has_the_recorded_size():
  rows = dit_rows(Model())
  assert len(rows) == len({row.key for row in rows}) == 825
  assert count_parameters(declare_dit(Model()).abstract) == 4_999_787_712


def test_sinusoid_has_the_recorded_values():
  out = np.asarray(sinusoid(jnp.float32(937.0), 256))
  cosines = [0.6928306, 0.1534325, 0.6389480, -0.9985001, 0.9949350]
  sines = [0.7211004, -0.9881591, 0.7692500, 0.0547506, 0.1005207]
  at = np.array([0, 1, 2, 64, 127])
  np.testing.assert_allclose(out[at], cosines, atol=2e-7)
  np.testing.assert_allclose(out[128 + at], sines, atol=2e-7)


def test_sinusoid_of_fractions_is_exact_to_rounding():
  steps = np.random.default_rng(0).uniform(0, 1000, 500).astype(np.float32)
  steps = np.concatenate([steps, np.float32([0.0, 1000.0, 999.99994])])
  turn = steps.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
  expected = np.concatenate([np.cos(turn), np.sin(turn)], -1)
  np.testing.assert_allclose(sinusoid(jnp.asarray(steps), 256), expected, atol=3e-7)


def test_patchify_orders_features_channel_row_column():
  x = np.arange(2 * 2 * 4 * 6 * 3).reshape(2, 2, 4, 6, 3)
  out = np.asarray(patchify(jnp.asarray(x), 2))
  assert out.shape == (2, 2 * 2 * 3, 12)
  for f, i, j, c, q, r in np.ndindex(2, 2, 3, 3, 2, 2):
    token, feature = (f * 2 + i) * 3 + j, (c * 2 + q) * 2 + r
    assert out[1, token, feature] == x[1, f, 2 * i + q, 2 * j + r, c]


def test_unpatchify_orders_features_row_column_channel():
  tokens = np.arange(2 * 12 * 12).reshape(2, 12, 12)
  out = np.asarray(unpatchify(jnp.asarray(tokens), (2, 4, 6), 2))
  assert out.shape == (2, 2, 4, 6, 3)
  for f, i, j, c, q, r in np.ndindex(2, 2, 3, 3, 2, 2):
    token, feature = (f * 2 + i) * 3 + j, (q * 2 + r) * 3 + c
    assert out[1, f, 2 * i + q, 2 * j + r, c] == tokens[1, token, feature]


def test_block_by_block_against_the_cache_equals_teacher_forcing(params: PyTree):
  noisy, clean, text = clip(0), clip(1), prompts(2, BLOCKS)
  levels = (875.0, 400.0, 120.0)
  rope = rope_of(temporal_positions(0, LATENTS))
  expected = forced(params, noisy, times(*levels), clean, text, TeacherForcing(rope, BORDERS))
  cache, state = fresh_cache(), SlotState()
  shots = text.reshape(BATCH, BLOCKS, *text.shape[1:])
  for block in range(BLOCKS):
    own = slice(block * CFG.block_latents, (block + 1) * CFG.block_latents)
    state, slot = admit(state, block, float(own.start), Window(BLOCKS, 1))
    rope = rope_of(temporal_positions(own.start, CFG.block_latents))
    plan = Cached(state.level, rope, jnp.full(BATCH, slot))
    t = times(*levels)[:, own]
    ours, cache = cached(params, noisy[:, own], t, shots[:, block], cache, plan)
    np.testing.assert_allclose(ours, expected[:, own], atol=1e-5)
    _, cache = cached(params, clean[:, own], 0 * t, shots[:, block], cache, plan)


def test_block_plans_equal_masked_references(params: PyTree):
  noisy, clean, text = clip(3), clip(4), prompts(5, BLOCKS)
  t = times(900.0, 300.0, 600.0)
  rope = rope_of(temporal_positions(0, LATENTS))
  reference = masks.Masked(rope, masks.teacher_forcing_mask(BORDERS))
  ours = forced(params, noisy, t, clean, text, TeacherForcing(rope, BORDERS))
  expected = forced(params, noisy, t, clean, text, reference)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_later_blocks_do_not_change_earlier_ones(params: PyTree):
  x, t, text = clip(7), times(700.0, 700.0, 700.0), prompts(8, 1)
  plan = BlockCausal(rope_of(temporal_positions(0, LATENTS)), BORDERS)
  out = causal(params, x, t, text, plan)
  changed = causal(params, x.at[:, 4:].add(1.0), t, text, plan)
  np.testing.assert_array_equal(out[:, :4], changed[:, :4])
  assert float(jnp.max(jnp.abs(out[:, 4:] - changed[:, 4:]))) > 0.1


def test_a_batch_with_its_own_slots_equals_separate_runs(params: PyTree):
  x, text = clip(9)[:, : CFG.block_latents], prompts(10, 1)
  t = times(500.0)
  cache = jax.tree.map(lambda a: normal(11, *a.shape), fresh_cache())
  positions = np.array([[4.0, 5.0], [30.0, 31.0]])
  slots, lengths = (0, 1), jnp.array([3, 2]) * CFG.block_latents * TOKENS
  plan = Cached(3, rope_of(positions), jnp.array(slots), lengths)
  ours, stored = cached(params, x, t, text, cache, plan)
  for row in range(BATCH):
    one = slice(row, row + 1)
    own = jax.tree.map(lambda a, one=one: a[:, one], cache)
    plan = Cached(3, rope_of(positions[row]), jnp.array(slots[one]), lengths[one])
    alone, kept = cached(params, x[one], t[one], text[one], own, plan)
    np.testing.assert_allclose(ours[one], alone, atol=1e-5)
    np.testing.assert_allclose(stored.k[:, one], kept.k, atol=1e-5)


def test_velocities_depend_on_distances_in_time_only(params: PyTree):
  x, t, text = clip(12), times(800.0, 500.0, 200.0), prompts(13, 1)
  near, far = (
    causal(params, x, t, text, BlockCausal(rope_of(temporal_positions(start, LATENTS)), BORDERS))
    for start in (0, 40_000)
  )
  np.testing.assert_allclose(near, far, atol=1e-4)


def test_a_pass_without_head_fills_the_cache_and_returns_nothing(params: PyTree):
  x, t, text = clip(14)[:, : CFG.block_latents], times(0.0), prompts(15, 1)
  plan = Cached(1, rope_of(np.arange(2.0)), jnp.zeros(BATCH, jnp.int32))

  @jax.jit
  def run(params: PyTree, cache: KVCache) -> tuple[None, KVCache]:
    model = NETWORK.bind(params)
    return model(x, t, model.text_kv(text), plan, cache=cache, head=False)

  out, cache = run(params, fresh_cache())
  assert out is None
  _, expected = cached(params, x, t, text, fresh_cache(), plan)
  np.testing.assert_allclose(cache.k, expected.k, atol=1e-6)
  np.testing.assert_allclose(cache.v, expected.v, atol=1e-6)


def test_recomputed_layers_give_the_same_gradient(params: PyTree):
  x, t, text = clip(17)[:, :1], jnp.full((BATCH, 1), 300.0), prompts(16, 1)
  plan = Full(rope_of(np.zeros(1)))

  @functools.partial(jax.jit, static_argnames="remat")
  @functools.partial(jax.grad, argnums=1)
  def gradient(params: PyTree, x: Array, remat: str) -> Array:
    model = NETWORK.bind(params)
    return jnp.sum(model(x, t, model.text_kv(text), plan, remat=remat)[0] ** 2)

  plain = gradient(params, x, remat="none")
  for remat in ("dots", "full"):
    again = gradient(params, x, remat=remat)
    np.testing.assert_allclose(plain, again, atol=1e-5 * float(jnp.max(jnp.abs(plain))))


def test_fresh_networks_predict_zero_and_narrow_ones_answer_in_float32():
  cfg = Model(**{**vars(CFG), "dtype": "bfloat16"})
  network = declare_dit(cfg)
  fresh = network.init(1)
  again = declare_dit(cfg).init(1)
  jax.tree.map(np.testing.assert_array_equal, fresh, again)
  x, t = clip(19)[:, :1], jnp.full((BATCH, 1), 500.0)
  plan = Full(rope_of(np.zeros(1)))

  @jax.jit
  def run(params: PyTree) -> tuple[Array, Array]:
    model = network.bind(params)
    text = model.text_kv(prompts(20, 1))
    return model(x, t, text, plan)[0], text.k

  out, keys = run(fresh)
  assert out.dtype == jnp.float32 and keys.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, 0.0)
