"""The default operations: matrix products and their gradients, attention against a plain loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model.ops import dense_attention, modulated_norm, plain_matmul, product
from longlive_jax.types import Array

RNG = np.random.default_rng(0)


def draw(*shape: int) -> Array:
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dots(jaxpr: Any) -> list[Any]:
  """All matrix products of a jaxpr, inner ones included."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(equation)
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += dots(inner)
  return found


def test_gradients_of_the_product_are_the_textbook_ones():
  x, w, g = draw(2, 3, 5), draw(5, 4), draw(2, 3, 4)
  y, pull = jax.vjp(product, x, w)
  dx, dw = pull(g)
  wide = [np.asarray(a, np.float64) for a in (x, w, g)]
  np.testing.assert_allclose(y, np.einsum("bsi,io->bso", wide[0], wide[1]), atol=1e-5)
  np.testing.assert_allclose(dx, np.einsum("bso,io->bsi", wide[2], wide[1]), atol=1e-5)
  np.testing.assert_allclose(dw, np.einsum("bsi,bso->io", wide[0], wide[2]), atol=1e-5)


def test_narrow_products_have_narrow_operands_and_wide_weight_gradients():
  x, w, bias = draw(2, 3, 5).astype(jnp.bfloat16), draw(5, 4), draw(4)

  def loss(x: Array, w: Array, bias: Array) -> Array:
    return jnp.sum(
      plain_matmul(x, w, bias, path="layers/ffn/up", key=None).astype(jnp.float32) ** 2
    )

  closed = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, w, bias)
  kinds = [
    (*(v.aval.dtype.name for v in dot.invars), dot.outvars[0].aval.dtype.name)
    for dot in dots(closed.jaxpr)
  ]
  narrow, weights, wide = ("bfloat16",) * 3, ("bfloat16", "bfloat16", "float32"), ("float32",) * 3
  assert sorted(kinds) == [narrow] * 2 + [weights] + [wide] * 3, "once for a CPU, once for the rest"
  dx, dw, db = jax.grad(loss, (0, 1, 2))(x, w, bias)
  assert (dx.dtype, dw.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


@pytest.mark.parametrize("lengths", [None, (3, 7)])
def test_attention_equals_a_loop_over_queries(lengths: tuple[int, ...] | None):
  q, k, v = draw(2, 5, 2, 4), draw(2, 7, 2, 4), draw(2, 7, 2, 4)
  out = dense_attention(q, k, v, None if lengths is None else jnp.asarray(lengths))
  for b, n, s in np.ndindex(2, 2, 5):
    seen = 7 if lengths is None else lengths[b]
    logits = np.asarray(k[b, :seen, n], np.float64) @ np.asarray(q[b, s, n], np.float64) / 2.0
    weights = np.exp(logits - logits.max())
    expected = weights @ np.asarray(v[b, :seen, n], np.float64) / weights.sum()
    np.testing.assert_allclose(out[b, s, n], expected, atol=1e-6)


def test_modulated_norm_normalises_then_modulates():
  x, scale, shift = draw(2, 3, 4, 8), draw(2, 3, 1, 8), draw(2, 3, 1, 8)
  wide = np.asarray(x, np.float64)
  normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
  expected = normal * (1 + np.asarray(scale)) + np.asarray(shift)
  np.testing.assert_allclose(modulated_norm(x, scale, shift, 1e-6), expected, atol=1e-5)
