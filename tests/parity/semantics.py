"""Special values and sums as the other implementations treat them: spec/nvfp4.md 1.7 and 2.3."""

import jax
import jax.numpy as jnp

from longlive_jax.quant.formats import E2M1_MAX, SIGN, e2m1_encode
from longlive_jax.quant.semantics import Semantics
from longlive_jax.types import Array

LANES, ACCUMULATORS = 8, 4  # of the vector unit that the recorded sums were made on


def unlimited(x: Array, noise: Array | None) -> tuple[Array, Array]:
  """Rounds on a grid that goes on to 8, which has no code; -0.0 loses its sign."""
  magnitude = jnp.abs(x)
  step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
  scaled = magnitude / step  # by powers of two
  rounded = jnp.round(scaled if noise is None else scaled + (noise - 0.5)) * step
  if noise is not None:
    rounded = jnp.minimum(rounded, E2M1_MAX)
  sign = jnp.where(x < 0, -1.0, jnp.where(x > 0, 1.0, 0.0))
  values = sign * rounded  # the sign of a zero may come from the noise
  return values, jnp.where(rounded > E2M1_MAX, jnp.uint8(SIGN), e2m1_encode(values))


def in_lanes(residual: Array, error: str) -> Array:
  """Error of each block, summed as a vector unit does; see `in_order` of the library."""
  magnitude = jnp.abs(residual)
  if error == "largest":
    return jnp.max(magnitude, (-3, -1), keepdims=True)
  squared = jax.lax.optimization_barrier(residual * residual)  # or it is fused into the sum
  each = squared if error == "square" else magnitude
  each = jnp.swapaxes(each, -3, -2)  # [..., J, R, 16]: a block is contiguous
  vectors = each.reshape(*each.shape[:-2], -1, LANES)
  if vectors.shape[-2] == 2:
    lanes = vectors[..., 0, :] + vectors[..., 1, :]
  else:
    groups = vectors.reshape(*vectors.shape[:-2], -1, ACCUMULATORS, LANES)
    sums = groups[..., 0, :, :]
    for number in range(1, groups.shape[-3]):
      sums = sums + groups[..., number, :, :]
    lanes = ((sums[..., 0, :] + sums[..., 1, :]) + sums[..., 2, :]) + sums[..., 3, :]
  total = lanes[..., 0]
  for lane in range(1, LANES):
    total = total + lanes[..., lane]
  return total[..., None, :, None]


def beyond_all(x: Array) -> Array:
  """A block without a scale saturates where it is not zero."""
  return x * jnp.finfo(jnp.float32).max


def given_noise(six: Array, four: Array) -> Semantics:
  """`REFERENCE` with recorded noise, in the order of the blocks."""

  def noise(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    del key
    return jnp.asarray(six).reshape(shape), jnp.asarray(four).reshape(shape)

  return Semantics(unlimited, in_lanes, noise=noise)


REFERENCE = Semantics(unlimited, in_lanes)
CUDA = Semantics(without_scale=beyond_all)
TRITON = Semantics()
