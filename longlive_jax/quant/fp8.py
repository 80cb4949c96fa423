"""FP8 W8A8 with dynamic scales: one for each token, one for each output channel.

    y = (x / s_x as E4M3) (w / s_w as E4M3) s_x s_w        s = max |row| / 448

For sampling: products run on FP8 units where a device has them, and weights take half the bytes of
bfloat16. It has no gradients; a recipe of its own, never a stand-in for NVFP4.

Source: spec/nvfp4.md sections 5.2 and 12.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from longlive_jax.model.ops import contract
from longlive_jax.types import Array

E4M3_MAX = 448.0


@functools.partial(register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
  """A matrix quantised by rows, `values * scales`.

  Attributes:
    values: float8_e4m3fn `[..., M, K]`.
    scales: float32 `[..., M, 1]`.
  """

  values: Array
  scales: Array


def quantise_rows(x: Array, *, stored: bool = False) -> Rows:
  """Quantises the rows of `[..., M, K]`; a row of zeros stays zero.

  Args:
    x: of any float dtype.
    stored: x is written once, in its own dtype, and read again to be divided. Otherwise a compiler
      may compute it twice, or keep it in float32: good for a norm, not for a wide activation.
  """
  wide = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(wide), -1, keepdims=True)
  if stored:
    x, largest = jax.lax.optimization_barrier((x, largest))
    wide = x.astype(jnp.float32)
  scales = jnp.where(largest > 0, largest, 1.0) / E4M3_MAX
  values = jnp.clip(wide / scales, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
  return Rows(values, scales)


def to_bytes(x: Array) -> Array:
  """Rows `[..., K]` in FP8 with their scales, uint8 `[..., K + 4]`: one array, to be sent."""
  rows = quantise_rows(x)
  scales = jax.lax.bitcast_convert_type(rows.scales, jnp.uint8).reshape(*x.shape[:-1], 4)
  return jnp.concatenate([jax.lax.bitcast_convert_type(rows.values, jnp.uint8), scales], -1)


def from_bytes(sent: Array, dtype: jax.typing.DTypeLike) -> Array:
  """The rows that `to_bytes` made, in `dtype`."""
  values = jax.lax.bitcast_convert_type(sent[..., :-4], jnp.float8_e4m3fn)
  scales = jax.lax.bitcast_convert_type(sent[..., -4:], jnp.float32)
  return (values.astype(jnp.float32) * scales[..., None]).astype(dtype)


def quantise_weight(w: Array) -> Rows:
  """A weight `[..., in, out]` by output channels, `[..., out, in]`."""
  return quantise_rows(jnp.swapaxes(w, -1, -2))


@jax.custom_vjp
def fp8_product(x: Array, w: Array | Rows) -> Array:
  """float32 `[T, out]` of `x [T, in]` and a weight `[in, out]`, or one quantised ahead.

  The sum of FP8 products leaves the device's FP8 unit in x's dtype: a float32 one takes longer to
  write than to compute.
  """
  right = w if isinstance(w, Rows) else quantise_weight(w)
  outputs, inputs = right.values.shape
  left = quantise_rows(x, stored=inputs > outputs)
  total = contract(left.values, right.values, (1, 1), x.dtype)
  return total.astype(jnp.float32) * left.scales * right.scales[:, 0]


def _forward(x: Array, w: Array | Rows) -> tuple[Array, None]:
  return fp8_product(x, w), None


def _backward(saved: None, g: Array) -> tuple[Array, Array]:
  del saved, g
  raise ValueError("quant.linears=fp8 has no gradients; train with nvfp4 or none")


fp8_product.defvjp(_forward, _backward)


def fp8_matmul(x: Array, w: Array | Rows, bias: Array | None) -> Array:
  """`x [..., in] @ w + bias` in x's dtype."""
  y = fp8_product(x.reshape(-1, x.shape[-1]), w)
  y = y if bias is None else y + bias
  return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
