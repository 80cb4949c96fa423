"""Products with quantised operands: against dense products of dequantised matrices in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model.ops import PACKED
from longlive_jax.quant.matmul import (
  Recipe,
  _dgrad_wgrad,
  nvfp4_recipe,
  packed_input,
  prepare,
  quantise_weight,
  quantised_matmul,
  quantised_product,
)
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise
from longlive_jax.types import Array

T, IN, OUT = 48, 32, 64
NEAREST = nvfp4_recipe("static_6", "mse", "mse", square_weights=True, stochastic=False)


def draw(seed: int, *shape: int) -> Array:
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


X, W, G = draw(0, T, IN), draw(1, IN, OUT).astype(jnp.float32), draw(2, T, OUT)


def wide(a: Array) -> np.ndarray:
  return np.asarray(a.astype(jnp.float32), np.float64)


def value(x: Array, spec: Spec | None, flip: bool = False) -> np.ndarray:
  """What a quantised operand stands for, in float64; `[rows, contraction]`."""
  if spec is None:
    return wide(x.astype(jnp.bfloat16)).T if flip else wide(x.astype(jnp.bfloat16))
  q = quantise(x, dataclasses.replace(spec, transpose=flip))
  return wide(dequantise(q, jnp.float32))


def relative(a: Array, b: np.ndarray) -> float:
  return float(np.linalg.norm(wide(a) - b) / np.linalg.norm(b))


@functools.partial(jax.jit, static_argnums=0)
def vjp(recipe: Recipe, key: Array | None = None) -> tuple[Array, Array, Array]:
  y, pull = jax.vjp(lambda x, w: quantised_product(recipe, x, w, key), X, W)
  return y, *pull(G.astype(jnp.float32))


@pytest.mark.parametrize("recipe", [NEAREST, Recipe(), Recipe(w=Spec("mse")), Recipe(g=Spec())])
def test_each_product_is_that_of_its_dequantised_operands(recipe: Recipe):
  y, dx, dw = vjp(recipe)
  assert relative(y, value(X, recipe.x) @ value(W, recipe.w, True).T) < 1e-6
  assert relative(dx, value(G, recipe.g) @ value(W, recipe.w).T) < 3e-3  # rounded to bfloat16
  again = X if recipe.x is None else dequantise(quantise(X, recipe.x), jnp.bfloat16)
  expected = value(again, recipe.x_wgrad, True) @ value(G, recipe.g_wgrad, True).T
  assert relative(dw, expected) < 1e-6
  assert (dx.dtype, dw.dtype) == (X.dtype, W.dtype)


def test_quantised_gradients_are_near_the_dense_ones():
  y, dx, dw = vjp(NEAREST)
  assert relative(y, wide(X) @ wide(W)) < 0.17
  assert relative(dx, wide(G) @ wide(W).T) < 0.2
  assert relative(dw, wide(X).T @ wide(G)) < 0.22


def test_the_hadamard_transform_must_turn_both_operands():
  turned, straight = Spec("mse", hadamard=True), Spec("mse")
  assert turned in (NEAREST.x_wgrad, NEAREST.g_wgrad)
  with pytest.raises(ValueError, match="both operands of wgrad"):
    Recipe(x_wgrad=straight, g_wgrad=turned)
  assert not nvfp4_recipe("mse", "", "mse").g_wgrad.hadamard


def test_stochastic_gradients_differ_by_key_and_average_to_the_dense_ones():
  recipe = nvfp4_recipe("", "", "static_4", stochastic=True)
  keys = jax.random.split(jax.random.key(5), 256)
  for which, dense in ((1, wide(G) @ wide(W.astype(jnp.bfloat16)).T), (2, wide(X).T @ wide(G))):
    draws = jax.jit(jax.vmap(lambda key, which=which: vjp(recipe, key)[which]))(keys)
    assert not np.array_equal(draws[0], draws[1])
    mean = draws.astype(jnp.float32).mean(0)
    assert relative(mean, dense) < 0.1 * relative(draws[0], dense)


def test_stochastic_rounding_without_a_key_names_the_setting():
  with pytest.raises(ValueError, match=r"quant\.gradient_rounding=stochastic needs a key"):
    vjp(nvfp4_recipe())


def test_a_quantised_weight_is_used_as_it_is_and_not_trained():
  weight = quantise_weight(W, Spec("mse", exact=True))
  assert weight.shape == (OUT, IN)
  y, pull = jax.vjp(lambda x, w: quantised_product(NEAREST, x, w), X, weight)
  stands_for = wide(dequantise(weight, jnp.float32))
  assert relative(y, value(X, NEAREST.x) @ stands_for.T) < 1e-6
  dx, dw = pull(G.astype(jnp.float32))
  assert relative(dx, value(G, NEAREST.g) @ stands_for) < 3e-3
  assert all(leaf.dtype == jax.dtypes.float0 or not leaf.any() for leaf in jax.tree.leaves(dw))


def test_stacked_weights_have_an_amax_each_and_scan():
  stack = jnp.stack([W, 8 * W, W])
  weights = quantise_weight(stack, Spec("mse"))
  np.testing.assert_allclose(weights.amax, jnp.max(jnp.abs(stack), (1, 2)))

  @jax.jit
  def run(weights: object) -> Array:
    step = lambda _, w: (None, quantised_product(NEAREST, X, w))  # noqa: E731
    return jax.lax.scan(step, None, weights)[1]

  for i, y in enumerate(run(weights)):
    alone = quantised_product(NEAREST, X, quantise_weight(stack[i], Spec()))
    np.testing.assert_allclose(y, alone, rtol=1e-5, atol=1e-5)


def residual_bytes(recipe: Recipe) -> int:
  """Bytes that the backward pass of one product keeps besides its weight."""
  _, pull = jax.vjp(lambda x: quantised_product(recipe, x, W, None), X)
  kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= T and leaf.shape != W.shape]
  return sum(leaf.nbytes for leaf in kept)


def test_packed_inputs_are_what_the_backward_pass_keeps():
  dense, packed = residual_bytes(Recipe()), residual_bytes(NEAREST)
  assert dense == 2 * X.size
  assert packed == X.size * 9 // 16


def test_gradients_are_those_of_an_input_that_is_not_packed():
  packed = packed_input(X.astype(jnp.bfloat16), NEAREST)
  gradients = [
    _dgrad_wgrad(NEAREST, jnp.float32, (kept, W, None, None, jnp.zeros(())), G)
    for kept in (packed, dequantise(packed, jnp.bfloat16))
  ]
  for ours, theirs in zip(*gradients, strict=True):
    assert (ours is None) == (theirs is None)
    assert ours is None or np.array_equal(ours, theirs)


def test_an_input_that_is_prepared_once_serves_several_products():
  def loss(x: Array, w: Array, once: bool) -> Array:
    ready = prepare(NEAREST, x) if once else x
    ys = [quantised_matmul(NEAREST, ready, each, None, None) for each in (w, 2 * w)]
    return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in ys)

  ours, theirs = (jax.grad(loss, (0, 1))(X, W, once) for once in (True, False))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_policy_saves_the_packed_inputs_by_name():
  policy = jax.checkpoint_policies.save_only_these_names(PACKED)
  plain = lambda x: quantised_product(NEAREST, jnp.sin(x), W, None)  # noqa: E731
  saved = jax.checkpoint(plain, policy=policy)
  _, pull = jax.vjp(saved, X)
  kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.uint8]
  assert sorted(leaf.shape for leaf in kept) == [(T, IN // 16), (T, IN // 2)]  # scales and codes
  expected = jax.grad(lambda x: jnp.sum(plain(x)))(X)
  np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(saved(x)))(X), expected)


def test_bias_and_leading_axes():
  x, bias = X.reshape(2, 3, 8, IN), jnp.arange(OUT, dtype=jnp.float32)
  y = quantised_matmul(NEAREST, x, W, bias, None)
  assert y.shape == (2, 3, 8, OUT) and y.dtype == jnp.bfloat16
  expected = quantised_product(NEAREST, X, W, None) + bias
  np.testing.assert_array_equal(y.reshape(T, OUT), expected.astype(jnp.bfloat16))
