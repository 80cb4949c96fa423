"""The quantised cache against quantising each block alone, and through whole rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model.kv_cache import empty_cache
from longlive_jax.quant.kv import QuantisedKVCache, empty_quantised_cache
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise
from longlive_jax.types import Array

LAYERS, B, SLOTS, TOKENS, HEADS, DIM = SHAPE = (2, 2, 3, 6, 2, 32)


def draw(seed: int, shift: float = 0.0) -> Array:
  return jax.random.normal(jax.random.key(seed), (B, TOKENS, HEADS, DIM), jnp.bfloat16) + shift


@jax.jit
def there_and_back(x: Array) -> Array:
  return dequantise(quantise(x, Spec("mse")), jnp.bfloat16)


def alone(x: Array, sample: int) -> np.ndarray:
  """One sample's block, quantised and back, in float32."""
  return np.asarray(there_and_back(x[sample].reshape(-1, DIM)).astype(jnp.float32)).reshape(
    x.shape[1:]
  )


def empty(smoothing: str = "none") -> QuantisedKVCache:
  return empty_quantised_cache(SHAPE, "bfloat16", "mse", smoothing)


@jax.jit
def put(cache: QuantisedKVCache, slot: Array, k: Array, v: Array) -> tuple[QuantisedKVCache, Array]:
  cache, keys, values = cache.exchange(1, slot, k, v, SLOTS, True)
  return cache, jnp.stack([keys, values])


def test_earlier_blocks_are_read_as_quantised_and_the_own_block_as_it_is():
  cache, slots = empty(), [(0, 2), (2, 0), (1, 1)]
  blocks = [(draw(2 * i), draw(2 * i + 1)) for i in range(3)]
  for slot, (k, v) in zip(slots, blocks, strict=True):
    cache, seen = put(cache, jnp.asarray(slot), k, v)
  seen = np.asarray(seen.astype(jnp.float32)).reshape(2, B, SLOTS, TOKENS, HEADS, DIM)
  for which in (0, 1):
    for sample in range(B):
      for i, slot in enumerate(slots):
        x = blocks[i][which]
        own = np.asarray(x[sample].astype(jnp.float32)) if i == 2 else alone(x, sample)
        np.testing.assert_array_equal(seen[which, sample, slot[sample]], own)
  assert not cache.k.codes[0].any(), "the other layer was written"


def test_a_pass_that_is_not_kept_leaves_the_cache_as_it_was():
  cache, _ = put(empty(), jnp.asarray([0, 0]), draw(0), draw(1))
  k, v = draw(2), draw(3)
  after, keys, values = cache.exchange(1, jnp.asarray([1, 1]), k, v, 2, False)
  jax.tree.map(np.testing.assert_array_equal, cache, after)
  np.testing.assert_array_equal(keys[:, TOKENS:], k)
  np.testing.assert_array_equal(values[:, TOKENS:], v)


def test_a_plain_cache_gives_the_same_up_to_quantisation():
  plain, packed = empty_cache(*SHAPE, "bfloat16"), empty()
  for i in range(3):
    k, v, slot = draw(i), draw(i + 9), jnp.asarray([i, i])
    plain, keys, _ = plain.exchange(1, slot, k, v, 3, True)
    packed, seen = put(packed, slot, k, v)
  wide = np.asarray(keys.astype(jnp.float32))
  error = np.linalg.norm(np.asarray(seen[0].astype(jnp.float32)) - wide) / np.linalg.norm(wide)
  assert 0.04 < error < 0.1


def test_smoothing_over_tokens_stores_what_is_left_and_means_the_same():
  k = draw(0, shift=8.0)
  errors = {}
  for smoothing in ("none", "tokens"):
    cache, _ = put(empty(smoothing), jnp.asarray([0, 0]), k, k)
    _, keys, _ = cache.exchange(1, jnp.asarray([1, 1]), k, k, 2, False)
    wide = np.asarray(keys[:, :TOKENS].astype(jnp.float32))
    errors[smoothing] = np.linalg.norm(wide - np.asarray(k.astype(jnp.float32)))
  assert errors["tokens"] < 0.3 * errors["none"]


def test_the_original_smoothing_takes_the_channel_mean_of_the_own_block_alone():
  k = draw(0, shift=1.0)
  cache, seen = put(empty("original"), jnp.asarray([0, 0]), k, k)
  own = np.asarray(seen[0, :, :TOKENS].astype(jnp.float32))
  wide = np.asarray(k.astype(jnp.float32))
  np.testing.assert_allclose(own, wide - wide.mean(-1, keepdims=True), atol=0.02)
  np.testing.assert_array_equal(seen[1, :, :TOKENS], k)
  _, keys, _ = cache.exchange(1, jnp.asarray([1, 1]), k, k, 2, False)
  np.testing.assert_array_equal(keys[0, :TOKENS].astype(jnp.float32), alone(k, 0))


@pytest.mark.parametrize(("smoothing", "share"), [("none", 0.2815), ("tokens", 0.5)])
def test_bytes(smoothing: str, share: float):
  plain = sum(a.nbytes for a in jax.tree.leaves(empty_cache(*SHAPE, "bfloat16")))
  packed = sum(a.nbytes for a in jax.tree.leaves(empty(smoothing)))
  assert packed <= share * plain + 8 * LAYERS * B * SLOTS
