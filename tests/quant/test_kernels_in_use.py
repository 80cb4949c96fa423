"""Layers and caches that quantise and read by kernels: the same numbers as without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from longlive_jax.config import Quant
from longlive_jax.kernels import matmul_choice
from longlive_jax.kernels.matmul_choice import use_kernels
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.parallel.share import LATENTS, island
from longlive_jax.quant.kv import QuantisedKVCache, empty_quantised_cache
from longlive_jax.quant.matmul import (
  input_operand,
  kernel_takes,
  nvfp4_recipe,
  packed_input,
  prepare,
  quantised_matmul,
)
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.policy import recipe_of
from longlive_jax.types import SEQ, Array
from tests.kernels.mosaic import interpreted

RECIPE = nvfp4_recipe("static_6", "mse", "", kernels=True)
PLAIN = dataclasses.replace(RECIPE, kernels=False)
BLOCK_SHAPE = (2, 16, 2, 64)  # B, S_b, N, D: a slot is 2048 elements


def draw(*shape: int, seed: int = 0) -> Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def same_bits(a: Array, b: Array) -> None:
  np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b, np.float32))


def test_inputs_of_layers():
  x = draw(64, 64)
  both = jax.jit(
    lambda x, recipe: (input_operand(x, recipe), packed_input(x, recipe)), static_argnums=1
  )
  with interpreted():
    ours, packed = both(x, RECIPE)
  theirs, plain = both(x, PLAIN)
  same_bits(ours.values, theirs.values)
  assert ours.unit == theirs.unit
  np.testing.assert_array_equal(packed.codes, plain.codes)
  same_bits(packed.scales, plain.scales)
  assert (packed.shape, packed.rule, packed.blocks) == (plain.shape, plain.rule, plain.blocks)


def test_a_shared_input_can_be_differentiated():
  """Kernels have no derivative: the gradient goes around them. Traced only."""

  def loss(x: Array, w: Array) -> Array:
    return jnp.sum(quantised_matmul(RECIPE, prepare(RECIPE, x), w, None, None) ** 2)

  shapes = [jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)] * 2
  assert [a.shape for a in jax.eval_shape(jax.grad(loss, (0, 1)), *shapes)] == [(64, 64)] * 2


@jax.jit
def exchange(
  cache: QuantisedKVCache, first: tuple[Array, Array], second: tuple[Array, Array]
) -> tuple[QuantisedKVCache, Array, Array]:
  """Two blocks into two slots of layer 1; what the second attends to, without being kept."""
  layer, slots = jnp.int32(1), jnp.zeros(2, jnp.int32)
  cache, _, _ = cache.exchange(layer, slots, *first, 1, True)
  cache, _, _ = cache.exchange(layer, slots + 1, *second, 2, True)
  return cache.exchange(layer, slots + 2, *second, 3, False)


@pytest.mark.parametrize("smoothing", ["none", "tokens"])
def test_cache(smoothing):
  samples, tokens, heads, dim = BLOCK_SHAPE
  shape = (2, samples, 3, tokens, heads, dim)
  blocks = [draw(*BLOCK_SHAPE, seed=seed) for seed in range(4)]
  first, second = (blocks[0], 3.0 * blocks[1]), (blocks[2], blocks[3])
  with interpreted():
    ours = exchange(
      empty_quantised_cache(shape, "bfloat16", "mse", smoothing, kernels=True), first, second
    )
  theirs = exchange(empty_quantised_cache(shape, "bfloat16", "mse", smoothing), first, second)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    same_bits(a, b)


def test_what_kernels_cannot_take_is_left_to_jnp():
  takes = draw(8, 32)
  assert kernel_takes(takes, Spec("mae"))
  assert not kernel_takes(takes.astype(jnp.float32), Spec("mae"))
  assert not kernel_takes(draw(8, 24), Spec("mae"))
  for other in ({"hadamard": True}, {"two_d": True}, {"stochastic": True}, {"exact": True}):
    assert not kernel_takes(takes, Spec("mae", **other))
  x = draw(8, 24)
  same_bits(input_operand(x, RECIPE).values, input_operand(x, PLAIN).values)


def test_without_a_gpu_no_kernel_is_used():
  assert not use_kernels("auto") and not use_kernels("off")
  assert not recipe_of(Quant(linears="nvfp4")).kernels
  with pytest.raises(ValueError, match="quant.kernels=on needs a GPU"):
    use_kernels("on")


@pytest.mark.parametrize(
  ("setting", "count", "used"),
  [("auto", 1, True), ("auto", 2, False), ("on", 2, True), ("off", 1, False)],
)
def test_a_hopper_gpu_uses_them(monkeypatch, setting, count, used):
  monkeypatch.setattr(matmul_choice, "kernel_for", lambda device: matmul_choice.HOPPER)
  monkeypatch.setattr(jax, "devices", lambda: [object()] * count)
  assert use_kernels(setting) is used
  assert use_kernels(setting, local=True) is (setting != "off")


def test_devices_that_share_a_block_call_them_on_what_they_have():
  """Lowered only."""
  mesh = make_mesh(1, seq=2, devices=jax.devices()[:2])
  recipe = dataclasses.replace(RECIPE, x=Spec("mse", axis=SEQ))
  cache = empty_quantised_cache((2, 1, 2, 32, 4, 64), "bfloat16", "mse", "none", True, SEQ)
  heads, specs = PartitionSpec(None, None, SEQ), cache.specs(SEQ)

  def layer(x: Array, w: Array) -> tuple[Array, Array]:
    shared = prepare(recipe, x)
    return tuple(quantised_matmul(recipe, each, w, None, None) for each in (x, shared))

  def keep(cache: QuantisedKVCache, k: Array) -> tuple[QuantisedKVCache, Array, Array]:
    return cache.exchange(0, jnp.zeros(1, jnp.int32), k, k, 2, True)

  for function, inputs, outputs, shapes in (
    (layer, (LATENTS, PartitionSpec()), LATENTS, [(1, 64, 64), (64, 32)]),
    (keep, (specs, heads), (specs, heads, heads), [cache, (1, 32, 4, 64)]),
  ):
    given = [draw(*s) if isinstance(s, tuple) else s for s in shapes]
    run = jax.jit(island(function, mesh, inputs, outputs))
    assert "mosaic_gpu" in run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
