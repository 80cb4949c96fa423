"""The choices in which implementations of the quantiser differ on special values.

On ordinary data they agree bit for bit. Ours saturates at 6, keeps the sign of a zero, gives
blocks whose scale underflows zero codes, and sums the error of a block from left to right with
fused multiply-adds, then over the rows of a 16x16 block as a butterfly.

Source: spec/nvfp4.md sections 1.7 and 2.3.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from longlive_jax.quant.formats import e2m1_decode, e2m1_encode
from longlive_jax.quant.ieee import square_add
from longlive_jax.quant.rounding import round_stochastic, uniform_noise
from longlive_jax.types import Array


def saturating(x: Array, noise: Array | None) -> tuple[Array, Array]:
  """Rounds to E2M1, to nearest or with `noise`; returns (float32 values, uint8 codes)."""
  if noise is not None:
    x = round_stochastic(x, noise)
  codes = e2m1_encode(x)
  return e2m1_decode(codes), codes


def in_order(residual: Array, error: str) -> Array:
  """Error of each block, its sums in the order stated above.

  Args:
    residual: float32 `[..., R, J, 16]`, R = 1 or 16 rows of a block.
    error: "square", "absolute" or "largest".

  Returns:
    float32 `[..., 1, J, 1]`.
  """
  if error == "largest":
    return jnp.max(jnp.abs(residual), (-3, -1), keepdims=True)
  total = jnp.zeros_like(residual[..., :1])
  for column in range(residual.shape[-1]):
    element = residual[..., column : column + 1]
    total = square_add(element, total) if error == "square" else total + jnp.abs(element)
  while total.shape[-3] > 1:
    half = total.shape[-3] // 2
    total = total[..., :half, :, :] + total[..., half:, :, :]
  return total


def any_order(residual: Array, error: str) -> Array:
  """`in_order` with sums as the compiler likes them."""
  if error == "largest":
    return jnp.max(jnp.abs(residual), (-3, -1), keepdims=True)
  each = residual * residual if error == "square" else jnp.abs(residual)
  return jnp.sum(each, (-3, -1), keepdims=True)


def nothing(x: Array) -> Array:
  """Zeros in place of finite x. Those of `zeros_like` are made, and kept, before a scan."""
  return x - x


@dataclasses.dataclass(frozen=True)
class Semantics:
  """How an element is rounded and how an error is summed.

  Attributes:
    element: (scaled float32, noise or None) -> (float32 values, uint8 codes).
    total: (residual, kind of error) -> error of each block, in exact arithmetic; see `in_order`.
    without_scale: elements of blocks whose scale is zero -> what is rounded in their place.
    noise: (key, shape) -> uniform numbers for the candidates 6 and 4.
  """

  element: Callable[[Array, Array | None], tuple[Array, Array]] = saturating
  total: Callable[[Array, str], Array] = in_order
  without_scale: Callable[[Array], Array] = nothing
  noise: Callable[[Array, tuple[int, ...]], tuple[Array, Array]] = uniform_noise


OURS = Semantics()
