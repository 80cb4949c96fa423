"""The arithmetic of 16-element blocks in registers: scale, codes, and the better of two candidates.

Arrays are `[T, 16]`, a block a row; what belongs to a block is `[T]`. Only additions, products,
comparisons and bit operations, so that a GPU, its interpreter and XLA agree on every bit but for
the order of the error sums; no division, since GPUs divide to 2 ulp.

E2M1 has the step `2^(e - 1)` between `2^e` and `2^(e + 1)`, and 1/2 below 1. A float32 number `t`
of `2^(22 + e)` has that step too, so with `M = 2^22 2^e` (e = 0 below 1)

    t = v + M      q = t - M      code = (low bits of t) + 2 e      d = q - v

rounds v to nearest, ties to even, in one addition. E4M3 scales are rounded alike, with 2^20. The
error of a candidate is a sum over `d` times its scale, so x is never dequantised.

`1 / (dec * s)` has eight mantissas for all s; they come from a table, which makes it exact.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.types import Array

BLOCK = 16
TABLE = 9  # enc, then 1 / (dec * (1 + m / 8)) for m = 0..7
SMALLEST = 2.0**-100  # tensors below are zero: the reciprocals of their scales would overflow
WIDER = 1.5
_EXPONENT = 0x7F800000
_E2M1_UNIT, _E2M1_MAX = 2.0**22, 6.0
_E4M3_UNIT, _E4M3_MAX = 2.0**20, 448.0
_E4M3_TINY, _E4M3_STEP = 2.0**-6, 2.0**-9
# v is 5 * 2^-24 off at most, so errors up to this come from an exact candidate; then 6 is kept.
_NOISE = {"square": 2.0**-32, "absolute": 2.0**-14, "largest": 2.0**-18}
# Errors that differ by less than rounding are the same; then 6 is kept too.
_CLOSE = {"square": 1 - 2.0**-20, "absolute": 1 - 2.0**-18, "largest": 1 - 2.0**-16}


class ScaleRule(Protocol):
  """What the kernels need of a scale rule: where maxima land, and what decides; see `quant.rules`.

  It must be hashable. `error` is "square", "absolute", "largest", or "" for a single candidate.
  """

  @property
  def m2(self) -> float: ...

  @property
  def m4(self) -> float: ...

  @property
  def error(self) -> str: ...


class Candidate(NamedTuple):
  """Blocks quantised with one scale each.

  Attributes:
    shifted: float32 `[T, 16]`, t of the module's equation, of the magnitudes.
    values: float32 `[T, 16]`, q of the magnitudes.
    scales: float32 `[T]`, E4M3 numbers.
    error: float32 `[T]`, in units of a value's scale.
  """

  shifted: Array
  values: Array
  scales: Array
  error: Array


def divide(a: Array | float, b: Array | float) -> Array:
  """`a / b` of float32 numbers, correctly rounded on any backend; for a handful of numbers."""
  a, b = jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  with jax.enable_x64(True):
    wide = [jax.lax.convert_element_type(each, jnp.float64) for each in (a, b)]
    return jax.lax.convert_element_type(jax.lax.div(*wide), jnp.float32)


def table(amax: Array, rule: ScaleRule) -> Array:
  """float32 `[9]`: what blocks need to know of their tensor; zeros where it is too small."""
  alive = ~(amax < SMALLEST)
  amax = jnp.where(alive, amax, 1.0)
  enc = divide(rule.m2 * rule.m4, amax)
  mantissas = jnp.asarray(1 + np.arange(8) / 8, jnp.float32)
  inverses = divide(1.0, divide(1.0, enc) * mantissas)
  return jnp.where(alive, jnp.concatenate([enc[None], inverses]), 0.0)


def bits(x: Array) -> Array:
  """float32 as int32."""
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def number(x: Array) -> Array:
  """int32 as float32."""
  return jax.lax.bitcast_convert_type(x, jnp.float32)


def spread(each: Array) -> Array:
  """`[T]` -> `[T, 16]`."""
  return jax.lax.broadcast_in_dim(each, (each.shape[0], BLOCK), (0,))


def round_e4m3(x: Array) -> Array:
  """Nearest E4M3 number of x >= 0, saturating; NaN stays."""
  x = jnp.minimum(x, _E4M3_MAX)
  unit = number(bits(jnp.maximum(x, _E4M3_TINY)) & _EXPONENT) * _E4M3_UNIT
  return (x + unit) - unit


def inverse_scale(scales: Array, entries: list[Array]) -> Array:
  """`1 / (dec * s)` for s > 0, correctly rounded. `entries` are a table as scalars."""
  pattern = bits(scales)
  level = entries[1:]
  for bit in (20, 21, 22):  # the three bits of the mantissa, the lowest first
    odd = (pattern & (1 << bit)) != 0
    pairs = zip(level[::2], level[1::2], strict=True)
    level = [jnp.where(odd, _full(b, scales), _full(a, scales)) for a, b in pairs]
  power = number((254 << 23) - (pattern & _EXPONENT))
  return level[0] * power


def _full(x: Array, like: Array) -> Array:
  return x if x.shape else jnp.broadcast_to(x, like.shape)


def sixth(x: Array) -> Array:
  """`x / 6` for x >= 0: from a guess, plus its exact remainder.

  The minimum changes nothing but keeps compilers from fusing the guess's product into sums, where
  it would not be rounded.
  """
  guess = jnp.minimum(x * np.float32(1 / 6), np.finfo(np.float32).max)
  high = number(((bits(guess) + 0x800) >> 12) << 12)
  return guess + ((x - high * 6.0) - (guess - high) * 6.0) * np.float32(1 / 6)


def attempt(magnitude: Array, wanted: Array, entries: list[Array], kind: str) -> Candidate:
  """Quantises blocks `[T, 16]` of magnitudes with the E4M3 scales nearest to `wanted` `[T]`."""
  scales = round_e4m3(wanted)
  dead = scales == 0.0  # then elements are measured by the smallest scale, and rounded to 0
  measure = jnp.where(dead, _E4M3_STEP, scales)
  v = magnitude * spread(inverse_scale(measure, entries))
  inside = jnp.minimum(v, _E2M1_MAX)
  least = spread(jnp.where(dead, 16.0, 1.0))
  unit = number(bits(jnp.maximum(inside, least)) & _EXPONENT) * _E2M1_UNIT
  shifted = inside + unit
  values = shifted - unit
  d = values - v
  if kind == "square":
    error = jnp.sum(d * d, axis=1) * measure * measure
  elif kind == "absolute":
    error = jnp.sum(jnp.abs(d), axis=1) * measure
  else:
    error = jnp.max(jnp.abs(d), axis=1) * measure
  return Candidate(shifted, values, scales, error)


def choose(magnitude: Array, entries: list[Array], rule: ScaleRule) -> Candidate:
  """Quantises blocks: the only candidate of a rule, or the better one.

  Args:
    magnitude: float32 `[T, 16]`, `|x|`.
    entries: `table` as nine scalars.
    rule: scale rule.
  """
  peak = jnp.max(magnitude, axis=1)
  wanted = (sixth(peak) if rule.m2 == 6.0 else peak * np.float32(1 / rule.m2)) * entries[0]
  six = attempt(magnitude, wanted, entries, rule.error)
  if not rule.error:
    return six
  four = attempt(magnitude, wanted * WIDER, entries, rule.error)
  noise = six.scales * _NOISE[rule.error]
  noise = noise * six.scales if rule.error == "square" else noise
  better = (four.error < six.error * _CLOSE[rule.error]) & (six.error > noise)
  wide = spread(better)
  return Candidate(
    shifted=jnp.where(wide, four.shifted, six.shifted),
    values=jnp.where(wide, four.values, six.values),
    scales=jnp.where(better, four.scales, six.scales),
    error=jnp.where(better, four.error, six.error),
  )


def codes(chosen: Candidate, x: Array) -> Array:
  """int32 `[T, 16]` E2M1 codes 0..15; x float32 has the signs. Blocks of scale 0 are zero."""
  pattern = bits(chosen.shifted)
  magnitude = (pattern + (pattern >> 22) + 6) & 7  # 6 + exponents = 0 mod 8
  sign = bits(x) & spread(sign_mask(chosen))
  return magnitude | ((sign >> 28) & 8)


def scaled_values(chosen: Candidate, x: Array) -> Array:
  """float32 `[T, 16]` of `q * s` with the signs of x; 6 significant bits."""
  sign = bits(x) & spread(sign_mask(chosen))
  return number(bits(chosen.values * spread(chosen.scales)) | sign)


def sign_mask(chosen: Candidate) -> Array:
  """int32 `[T]`: the sign bit where a scale is not zero."""
  return jnp.where(chosen.scales == 0.0, np.int32(0), np.int32(-(2**31)))
