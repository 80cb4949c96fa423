"""Attention with FP8 products: queries, keys and values as E4M3, a scale for each tensor.

    p = exp(q k^T / sqrt(D) - max)        o = E4M3(448 p) / 448  v / sum p        o as E4M3

For sampling: both products run on FP8 units, where cuDNN has them; elsewhere the same numbers are
computed in float32. The scale of o is that of v, for no mean of values is larger than the largest.
Keys and values that come in E4M3, from a cache that stores them so, are used as they are; queries
then have no scale either, for they are normalised as keys are.
Attention to few keys, as those of a prompt, is left as it is.

Source: spec/nvfp4.md section 12.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.model.ops import cudnn_attention, dense_attention, is_costly
from longlive_jax.quant.fp8 import E4M3_MAX, Rows
from longlive_jax.types import Array

E4M3 = jnp.float8_e4m3fn


def unit_of(x: Array) -> Array:
  """The float32 number that E4M3 numbers of a tensor are multiplied with."""
  largest = jnp.max(jnp.abs(x.astype(jnp.float32)))
  return jnp.where(largest > 0, largest, 1.0) / E4M3_MAX


def narrow(x: Array, unit: Array) -> Array:
  """x as E4M3 numbers of a unit; those that are given are of unit 1."""
  if x.dtype == E4M3:
    return x
  return jnp.clip(x.astype(jnp.float32) / unit, -E4M3_MAX, E4M3_MAX).astype(E4M3)


@jax.custom_vjp
def fp8_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
  """`dense_attention` with FP8 products; see the module.

  Args:
    q: `[B, S, N, D]` bfloat16; on a GPU D is a multiple of 16.
    k, v: `[B, S_k, N, D]`, bfloat16 or E4M3.
    lengths: must be None: all keys are seen.

  Returns:
    `[B, S, N, D]` in q's dtype.

  Raises:
    ValueError: lengths are given: samples of a batch have filled slots of their own.
  """
  if not is_costly(q.shape[1], k.shape[1]):
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    dense = cudnn_attention if jax.default_backend() == "gpu" else dense_attention
    return dense(q, k, v, lengths)
  if lengths is not None:
    raise ValueError("model.attention=fp8 makes one video at a time: use a batch of one, or cudnn")
  out, unit = _attended(q, k, v)
  return (out.astype(jnp.float32) * unit).astype(q.dtype)


def fp8_attention_rows(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Rows | Array:
  """`fp8_attention` whose result is not widened: values `[B, S, N, D]`, scales `[B, S, 1]`.

  A linear layer multiplies them as they are. Attention to few keys gives an array.
  """
  if lengths is not None or not is_costly(q.shape[1], k.shape[1]):
    return fp8_attention(q, k, v, lengths)
  out, unit = _attended(q, k, v)
  return Rows(out, jnp.broadcast_to(unit, (*q.shape[:2], 1)))


def _attended(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """E4M3 numbers of the result, and their unit."""
  return (_by_cudnn if jax.default_backend() == "gpu" else reference)(q, k, v)


def _forward(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, None]:
  return fp8_attention(q, k, v, lengths), None


def _backward(saved: None, g: Array) -> tuple[Array, Array, Array, None]:
  del saved, g
  raise ValueError("model.attention=fp8 has no gradients; train with auto, cudnn or jnp")


fp8_attention.defvjp(_forward, _backward)


def _by_cudnn(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  # it has no public name; imported here, so that nothing else depends on it
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  units, result = units_of(q, k, v)
  one = np.ones((1, 1, 1, 1), np.float32)
  params: Any = dict.fromkeys(cudnn.fp8_params_keys, jnp.asarray(one))
  for name, unit in zip("qkv", units, strict=True):
    params[f"descale_{name}"] = unit.reshape(1, 1, 1, 1)
  params["scale_s"] = jnp.asarray(one * E4M3_MAX)
  params["descale_s"] = jnp.asarray(one / E4M3_MAX)
  params["scale_o"] = 1.0 / result.reshape(1, 1, 1, 1)
  out, *_ = cudnn.dot_product_attention(
    *(narrow(x, unit) for x, unit in zip((q, k, v), units, strict=True)),
    scale=q.shape[-1] ** -0.5,
    use_fp8=True,
    fp8_params=params,
  )
  return out, result


def units_of(q: Array, k: Array, v: Array) -> tuple[list[Array], Array]:
  """Units of queries, keys and values, and that of the result."""
  if k.dtype == E4M3:
    return [jnp.float32(1.0)] * 3, unit_of(v)
  units = [unit_of(x) for x in (q, k, v)]
  return units, units[2]


def reference(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """The same numbers summed in float32, in another order."""
  units, result = units_of(q, k, v)
  wide = [narrow(x, unit).astype(jnp.float32) for x, unit in zip((q, k, v), units, strict=True)]
  scale = units[0] * units[1] * q.shape[-1] ** -0.5
  scores = jnp.einsum("bsnd,btnd->bnst", wide[0], wide[1], precision="highest") * scale
  p = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
  rounded = (p * E4M3_MAX).astype(E4M3).astype(jnp.float32) / E4M3_MAX
  out = jnp.einsum("bnst,btnd->bsnd", rounded, wide[2], precision="highest")
  out = out * (units[2] / result) / jnp.swapaxes(jnp.sum(p, -1, keepdims=True), 1, 2)
  return narrow(out, jnp.float32(1.0)), result
