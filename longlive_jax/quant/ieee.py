"""Float32 arithmetic rounded as IEEE 754 says, inside `jit` and on every backend.

XLA multiplies by the reciprocal where it divides by something uniform, GPUs divide to 2 ulp, and
a product may be fused into a sum: a third of all `x / 6` are wrong in the last bit. These compute
in float64 and round once; that a quotient of float32 numbers is rounded twice does no harm.
`jax.enable_x64` is needed for the tracing only, so the caller's precision stays as it is.

`quotient` does nearly as well in float32, for where float64 is slow or missing.

Source: spec/nvfp4.md section 9.3.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.types import Array


def _wide(x: Array) -> Array:
  return jax.lax.convert_element_type(x, jnp.float64)


def _narrow(x: Array) -> Array:
  return jax.lax.convert_element_type(x, jnp.float32)


def divide(a: Array | float, b: Array | float) -> Array:
  """`a / b` of float32 numbers, correctly rounded; shapes broadcast."""
  a, b = jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
  with jax.enable_x64(True):
    return _narrow(jax.lax.div(_wide(a), _wide(b)))


def quotient(a: Array | float, b: Array | float) -> Array:
  """`divide` in float32 alone, wrong by an ulp for one in millions; operands must be finite.

  Args:
    a: float32 or a constant.
    b: float32, or a constant of at most 12 significant bits.
  """
  a = jnp.asarray(a, jnp.float32)
  return refine(a * np.float32(1 / b) if isinstance(b, float) else a / b, a, b)


def refine(guess: Array, a: Array, b: Array | float) -> Array:
  """`a / b` from a guess that is a few ulp off; see `quotient`.

  The remainder `a - guess * b` is exact, since the products of halves of the bits are, whether or
  not they are fused into the sums.
  """
  high, low = _halves(guess)
  if isinstance(b, float):
    return guess + ((a - high * b) - low * b) * np.float32(1 / b)
  b_high, b_low = _halves(b)
  return guess + (((a - high * b_high) - high * b_low) - low * b_high - low * b_low) / b


def _halves(x: Array) -> tuple[Array, Array]:
  """12 bits of x, to nearest, and the rest."""
  bits = ((jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x800) >> 12) << 12
  high = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return high, x - high


def square_add(a: Array, total: Array) -> Array:
  """`a * a + total` with one rounding, as a fused multiply-add."""
  with jax.enable_x64(True):
    wide = _wide(a)
    return _narrow(jax.lax.add(jax.lax.mul(wide, wide), _wide(total)))


def check_device(count: int = 2**20, seed: int = 0) -> None:
  """Compares `divide` on the default device with the host's division, for random numbers.

  Args:
    count: how many numbers.
    seed: of the numbers.

  Raises:
    RuntimeError: a quotient differs: exact quantisation would not be exact here.
  """
  draw = np.random.default_rng(seed)
  x = np.exp(draw.uniform(-20, 20, count)).astype(np.float32)
  for name, top, bottom in (("x / 6", x, np.float32(6)), ("1 / x", np.float32(1), x)):
    ours = np.asarray(jax.jit(divide)(top, bottom))
    wrong = int(np.sum(ours != top / bottom))
    if wrong:
      raise RuntimeError(
        f"{name} is wrongly rounded on {jax.devices()[0]} for {wrong} of {count} numbers;"
        " quantise there with exact=False, or elsewhere"
      )
