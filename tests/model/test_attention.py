"""Maskless plans against the dense masked reference; slots, lengths and prompts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model import masks
from longlive_jax.model.attention import (
  BlockCausal,
  Cached,
  Cross,
  Full,
  TeacherForcing,
  block_borders,
)
from longlive_jax.model.kv_cache import KVCache
from longlive_jax.model.ops import Plan, dense_attention
from longlive_jax.model.rope import Rope, rotate, video_rope
from longlive_jax.types import Array

HEADS, HEAD, ROWS, COLUMNS = 2, 16, 1, 3  # 3 tokens a latent
TOKENS = ROWS * COLUMNS


def draw(seed: int, batch: int, tokens: int) -> tuple[Array, Array, Array]:
  """Random q, k, v `[B, S, N, D]`."""
  return tuple(jax.random.normal(jax.random.key(seed), (3, batch, tokens, HEADS, HEAD)))


def rope_of(positions: np.ndarray) -> Rope:
  return video_rope(positions, ROWS, COLUMNS, HEAD)


def value_and_gradients(plan: Plan, seed: int, tokens: int) -> tuple[Array, tuple[Array, ...]]:
  """Output of a plan and the gradients of a random projection of it."""
  qkv, weights = draw(seed, 2, tokens), draw(seed + 1, 2, tokens)[0]

  def loss(qkv: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    out, _ = plan.attend(dense_attention, *qkv, None, 0)
    return jnp.sum(out * weights), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
  return out, gradients


PLANS: dict[str, tuple[type, Callable, int, int]] = {
  "teacher forcing": (TeacherForcing, masks.teacher_forcing_mask, 6, 0),
  "block causal": (BlockCausal, masks.block_causal_mask, 6, 0),
  "first latent apart": (BlockCausal, masks.block_causal_mask, 5, 1),
  "teacher forcing, first latent apart": (TeacherForcing, masks.teacher_forcing_mask, 5, 1),
}


@pytest.mark.parametrize("name", PLANS)
def test_blocks_equal_the_masked_reference_and_its_gradient(name: str):
  make, mask_of, latents, first = PLANS[name]
  borders = block_borders(latents, 2, TOKENS, first)
  rope = rope_of(np.arange(float(latents)))
  ours = value_and_gradients(make(rope, borders), 0, latents * TOKENS)
  expected = value_and_gradients(masks.Masked(rope, mask_of(borders)), 0, latents * TOKENS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, expected)


def test_full_plan_sees_everything():
  rope, (q, k, v) = rope_of(np.arange(2.0)), draw(3, 1, 2 * TOKENS)
  ours, _ = Full(rope).attend(dense_attention, q, k, v, None, 0)
  everything = np.ones((2 * TOKENS, 2 * TOKENS), bool)
  expected, _ = masks.Masked(rope, everything).attend(dense_attention, q, k, v, None, 0)
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_teacher_forcing_mask_allows_the_counted_pairs():
  for blocks in (1, 4, 12):
    mask = masks.teacher_forcing_mask(block_borders(blocks, 1, 1))
    assert mask.sum() == blocks**2 + blocks
    assert not mask[:blocks, blocks:].any()
    assert mask.diagonal().all()


def test_interleaved_mask_follows_the_index_formula():
  latents, block, ranks = 8, 2, 2
  borders = block_borders(latents, block, TOKENS)
  mask = masks.interleaved_mask(borders, ranks)
  local = latents // ranks * TOKENS
  index = np.arange(2 * latents * TOKENS)
  rank, within = index // (2 * local), index % (2 * local)
  target = within >= local
  blocks = (rank * (latents // ranks) + within % local // TOKENS) // block
  q, k = np.meshgrid(index, index, indexing="ij")
  late = np.where(target[k], blocks[k] == blocks[q], blocks[k] < blocks[q])
  expected = np.where(target[q], late, ~target[k] & (blocks[k] <= blocks[q]))
  np.testing.assert_array_equal(mask, expected)


def test_interleaved_order_refuses_ranks_that_do_not_divide():
  with pytest.raises(ValueError, match="parallel.seq=4"):
    masks.interleaved_order(6, 4)


def test_block_borders():
  assert block_borders(6, 2, 3) == (0, 6, 12, 18)
  assert block_borders(5, 2, 3, first=1) == (0, 3, 9, 15)


@pytest.mark.parametrize(("latents", "first"), [(5, 0), (6, 1), (0, 0), (1, 1)])
def test_block_borders_refuses_a_clip_that_is_not_whole_blocks(latents: int, first: int):
  with pytest.raises(ValueError, match="model.block_latents=2"):
    block_borders(latents, 2, 3, first)


def test_lengths_equal_slicing():
  q, k, v = draw(4, 3, 8)
  lengths = np.array([8, 3, 1])
  ours = dense_attention(q, k, v, jnp.asarray(lengths))
  for row, length in enumerate(lengths):
    one = slice(row, row + 1)
    expected = dense_attention(q[one], k[one, :length], v[one, :length])
    np.testing.assert_allclose(ours[one], expected, atol=1e-6)


def test_keys_beyond_the_length_do_not_leak_however_large():
  q, k, v = draw(5, 1, 4)
  clean = dense_attention(q, k, v, jnp.array([2]))
  k = k.at[:, 2:].set(1e30)
  np.testing.assert_array_equal(dense_attention(q, k, v, jnp.array([2])), clean)


def test_narrow_inputs_are_accumulated_in_float32():
  q, k, v = (a.astype(jnp.bfloat16) for a in draw(6, 1, 64))
  out = dense_attention(q, k, v)
  assert out.dtype == jnp.bfloat16
  wide = dense_attention(*(a.astype(jnp.float32) for a in (q, k, v)))
  np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=8e-3)


def test_each_run_of_tokens_sees_its_own_prompt():
  q = draw(7, 2, 6)[0]
  _, k, v = draw(8, 6, 5)
  ours, _ = Cross(3).attend(dense_attention, q, k, v, None, 0)
  for sample in range(2):
    for piece in range(3):
      run, prompt = slice(2 * piece, 2 * piece + 2), slice(3 * sample + piece, None)
      one = slice(sample, sample + 1)
      expected = dense_attention(q[one, run], k[prompt][:1], v[prompt][:1])
      np.testing.assert_allclose(ours[one, run], expected, atol=1e-6)


BLOCK = 2 * TOKENS  # tokens of a block of 2 latents


def filled_cache(seed: int, batch: int, slots: int) -> KVCache:
  """A cache of one layer with random content."""
  shape = (2, 1, batch, slots, BLOCK, HEADS, HEAD)
  return KVCache(*jax.random.normal(jax.random.key(seed), shape))


def attend_cached(plan: Cached, qkv: tuple[Array, ...], cache: KVCache) -> tuple[Array, KVCache]:
  return plan.attend(dense_attention, *qkv, cache, 0)


def test_the_order_of_slots_is_irrelevant():
  qkv, cache = draw(9, 1, BLOCK), filled_cache(10, 1, 3)
  rope = rope_of(np.array([8.0, 9.0]))
  ours, _ = attend_cached(Cached(3, rope, jnp.array([1])), qkv, cache)
  moved = jax.tree.map(lambda a: a[:, :, np.array([1, 2, 0])], cache)
  other, _ = attend_cached(Cached(3, rope, jnp.array([0])), qkv, moved)
  np.testing.assert_allclose(ours, other, atol=1e-6)


def test_a_pass_sees_its_own_keys_and_a_second_pass_replaces_them():
  first, second = draw(11, 1, BLOCK), draw(12, 1, BLOCK)
  plan = Cached(2, rope_of(np.array([2.0, 3.0])), jnp.array([1]))
  cache = filled_cache(13, 1, 3)
  _, once = attend_cached(plan, first, cache)
  ours, twice_written = attend_cached(plan, second, once)
  direct, once_written = attend_cached(plan, second, cache)
  np.testing.assert_array_equal(ours, direct)
  np.testing.assert_array_equal(twice_written.k, once_written.k)
  np.testing.assert_array_equal(twice_written.k[:, :, 0], cache.k[:, :, 0])
  keys = jnp.concatenate([cache.k[0, :, 0], rotate(second[1], plan.rope)], 1)
  values = jnp.concatenate([cache.v[0, :, 0], second[2]], 1)
  expected = dense_attention(rotate(second[0], plan.rope), keys, values)
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_samples_with_their_own_slots_equal_separate_runs():
  qkv, cache = draw(14, 2, BLOCK), filled_cache(15, 2, 4)
  positions = np.array([[4.0, 5.0], [20.0, 21.0]])
  slots, levels = (2, 1), (4, 2)
  lengths = jnp.array([level * BLOCK for level in levels])
  plan = Cached(4, rope_of(positions), jnp.array(slots), lengths)
  ours, stored = attend_cached(plan, qkv, cache)
  for row, (slot, level) in enumerate(zip(slots, levels, strict=True)):
    one = slice(row, row + 1)
    plan = Cached(level, rope_of(positions[row]), jnp.array([slot]))
    own = jax.tree.map(lambda a, one=one: a[:, one], cache)
    expected, alone = attend_cached(plan, tuple(a[one] for a in qkv), own)
    np.testing.assert_allclose(ours[one], expected, atol=1e-6)
    np.testing.assert_array_equal(stored.k[:, one], alone.k)
    np.testing.assert_array_equal(stored.v[:, one], alone.v)


def test_relative_positions_number_the_window_in_the_order_of_time():
  q, k, v = draw(16, 1, BLOCK)
  cache = filled_cache(17, 1, 3)
  ranks = np.array([0, 2, 1])  # slot 1 holds the newest block, the own one
  window = rope_of((2 * ranks[:, None] + np.arange(2.0)).reshape(-1))
  plan = Cached(3, rope_of(np.array([4.0, 5.0])), jnp.array([1]), None, window)
  ours, stored = attend_cached(plan, (q, k, v), cache)
  np.testing.assert_array_equal(stored.k[0, :, 1], k)
  order = [cache.k[0, :, 0], cache.k[0, :, 2], k]
  values = [cache.v[0, :, 0], cache.v[0, :, 2], v]
  whole = rope_of(np.arange(6.0))
  own = jax.tree.map(lambda a: a[:, 2 * BLOCK :], whole)
  keys = rotate(jnp.concatenate(order, 1), whole)
  expected = dense_attention(rotate(q, own), keys, jnp.concatenate(values, 1))
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_plans_are_pytrees_with_static_sizes():
  plan = Cached(2, rope_of(np.arange(2.0)), jnp.array([0]))
  moved = dataclasses.replace(plan, slot=jnp.array([1]))
  assert jax.tree.structure(plan) == jax.tree.structure(moved)
  wider = dataclasses.replace(plan, level=3)
  assert jax.tree.structure(plan) != jax.tree.structure(wider)
