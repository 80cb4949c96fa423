"""`quantise.py` in plain `jnp`, by its definition: divisions, thresholds, errors of the estimate.

    s = E4M3(peak / m2 * C / amax)     q = E2M1(x C / (s amax))     error = |q s - x C / amax|

Quotients are rounded as IEEE 754 says, errors are summed in float64, and 4 must beat 6 by more
than rounding explains.
"""

import jax
import jax.numpy as jnp

from longlive_jax.checks import check_divides
from longlive_jax.kernels.quantise_blocks import BLOCK, SMALLEST, WIDER, ScaleRule, divide
from longlive_jax.types import Array

_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PASSED = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # a tie goes to the even code
_CLOSE = {"square": 1e-6, "absolute": 4e-6, "largest": 1.5e-5}  # relative, of rounding


def _encode(magnitude: Array) -> Array:
  """int32 codes 0..7, to nearest, ties to the even code."""
  codes = jnp.zeros(magnitude.shape, jnp.int32)
  for i, threshold in enumerate(_PASSED):
    codes += (magnitude >= threshold if i % 2 else magnitude > threshold).astype(jnp.int32)
  return codes


def _e4m3(x: Array) -> Array:
  """Nearest E4M3 number, saturating, as float32."""
  return jnp.minimum(x, 448.0).astype(jnp.float8_e4m3fn).astype(jnp.float32)


def _error(values: Array, x: Array, kind: str) -> Array:
  """float32 error of `[..., 16]` blocks, summed in float64; both in units of `amax / C`."""
  with jax.enable_x64(True):
    wide = [jax.lax.convert_element_type(each, jnp.float64) for each in (values, x)]
    d = jax.lax.abs(jax.lax.sub(*wide))
    each = jax.lax.mul(d, d) if kind == "square" else d
    error = jnp.max(each, -1) if kind == "largest" else jnp.sum(each, -1)
    return jax.lax.convert_element_type(error, jnp.float32)


def _blocks(x: Array, amax: Array, rule: ScaleRule) -> tuple[Array, Array]:
  """(int32 codes `[M, N / 16, 16]`, float32 scales `[M, N / 16]`)."""
  check_divides("columns", x.shape[1], "block", BLOCK)
  x = x.astype(jnp.float32).reshape(x.shape[0], -1, BLOCK)
  dead = amax < SMALLEST
  enc = divide(rule.m2 * rule.m4, jnp.where(dead, 1.0, amax))
  peak = jnp.max(jnp.abs(x), -1)
  wanted = jnp.where(dead, 0.0, divide(peak, rule.m2) * enc)

  def attempt(target: Array) -> tuple[Array, Array, Array]:
    scales = _e4m3(target)
    unit = (divide(1.0, enc) * scales)[..., None]
    v = jnp.where(unit > 0, x * divide(1.0, jnp.where(unit > 0, unit, 1.0)), 0.0)
    codes = _encode(jnp.abs(v))
    values = jnp.asarray(_GRID, jnp.float32)[codes] * scales[..., None]
    signs = jnp.where(jnp.signbit(v) & (unit > 0), 8, 0)
    return codes + signs, scales, _error(values, jnp.abs(x) * enc, rule.error)

  codes, scales, error = attempt(wanted)
  if rule.error:
    other_codes, other_scales, other_error = attempt(wanted * WIDER)
    better = other_error < error * (1 - _CLOSE[rule.error])
    codes = jnp.where(better[..., None], other_codes, codes)
    scales = jnp.where(better, other_scales, scales)
  return codes, scales


def quantise_rows(x: Array, amax: Array, rule: ScaleRule) -> tuple[Array, Array]:
  """`quantise.quantise_rows`."""
  codes, scales = _blocks(x, amax, rule)
  codes = codes.reshape(x.shape[0], -1, 2)
  packed = codes[..., 0] | (codes[..., 1] << 4)
  return packed.astype(jnp.uint8), scales.astype(jnp.float8_e4m3fn)


def fake_quantise_rows(x: Array, amax: Array, rule: ScaleRule) -> Array:
  """`quantise.fake_quantise_rows`."""
  codes, scales = _blocks(x, amax, rule)
  values = jnp.asarray(_GRID, jnp.float32)[codes & 7] * scales[..., None]
  return jnp.where(codes & 8, -values, values).reshape(x.shape).astype(jnp.bfloat16)
