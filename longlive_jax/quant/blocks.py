"""The arithmetic of a block: its scale, its codes, and which of two candidates is better.

With C and M2 of the rule, `amax = max |x|`, and every step rounded to float32:

    enc = C / amax,  dec = 1 / enc          s = E4M3((max |block| / M2) * enc)
    q = E2M1(x * (1 / (dec * s)))           x is about q * s * amax / C

The adaptive rules also try the scale E4M3(1.5 * (max |block| / M2) * enc), estimate the error of
both, and keep the second only where it is strictly better.

Source: spec/nvfp4.md sections 1.6 and 2.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.quant.formats import BLOCK, e4m3_round
from longlive_jax.quant.ieee import divide, quotient
from longlive_jax.quant.rules import WIDER, Rule
from longlive_jax.quant.semantics import Semantics, any_order
from longlive_jax.types import Array


def fill(x: Array, rows: int) -> Array:
  """Zeros at the end of the last two axes, to whole blocks of `rows` x 16."""
  missing = (-x.shape[-2] % rows, -x.shape[-1] % BLOCK)
  if not any(missing):
    return x
  return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + tuple((0, m) for m in missing))


def into_blocks(x: Array, rows: int) -> Array:
  """`[..., M, N]` -> float32 `[..., M' / R, R, N' / 16, 16]`, R = rows."""
  x = fill(x, rows).astype(jnp.float32)
  return x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // BLOCK, BLOCK)


def choose(
  x: Array,
  amax: Array,
  rule: Rule,
  exact: bool,
  noise: tuple[Array | None, Array | None],
  semantics: Semantics,
) -> tuple[Array, Array, Array]:
  """(values, codes, scales) of blocks: the only candidate of a rule, or the better one."""
  alive, x, amax = normalised(x, amax)
  over = divide if exact else quotient
  enc = over(rule.c, amax)
  dec = over(1.0, enc)
  peak = jnp.max(jnp.abs(x), (-3, -1), keepdims=True)
  wanted = over(peak, rule.m2) * enc
  wanted = jnp.where(alive, wanted, 0.0)

  def attempt(target: Array, element_noise: Array | None) -> tuple[Array, Array, Array]:
    scales = e4m3_round(target)
    return (*scaled(x, scales, dec, exact, element_noise, semantics), scales)

  def error(values: Array, scales: Array) -> Array:
    estimate = over(values * scales * amax, rule.c)
    return (semantics.total if exact else any_order)(estimate - x, rule.error)

  six = attempt(wanted, noise[0])
  if not rule.error:
    return six
  four = attempt(wanted * WIDER, noise[1])
  better = error(four[0], four[2]) < error(six[0], six[2])
  values, codes, scales = (jnp.where(better, b, a) for a, b in zip(six, four, strict=True))
  return values, codes, scales


def normalised(x: Array, amax: Array) -> tuple[Array, Array, Array]:
  """Whether a tensor is not zero, and both times a power of two, so that amax is in [1, 4).

  That changes no bit of a code or a scale, but squares of errors stay in range.
  """
  alive = ~(amax < np.finfo(np.float32).tiny)  # NaN is alive
  amax = jnp.where(alive, amax, 1.0)
  exponent = (jax.lax.bitcast_convert_type(amax, jnp.uint32) >> 23) & 255
  opposite = jnp.maximum(254 - exponent.astype(jnp.int32), 1) << 23
  factor = jax.lax.bitcast_convert_type(opposite, jnp.float32)
  return alive, x * factor, amax * factor


def scaled(
  x: Array, scales: Array, dec: Array, exact: bool, noise: Array | None, semantics: Semantics
) -> tuple[Array, Array]:
  """(values, codes) of blocks with given scales."""
  alive = scales != 0.0
  unit = dec * scales + (~alive).astype(jnp.float32)  # 1 in place of 0
  inverse = (divide if exact else quotient)(1.0, unit)
  return semantics.element(jnp.where(alive, x * inverse, semantics.without_scale(x)), noise)
