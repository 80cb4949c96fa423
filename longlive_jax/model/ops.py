"""The seam through which precision, kernels and parallelism enter the network.

`Ops` is built once (a fresh closure per call retraces) and passed to every forward. The defaults
here are the plain references: everything faster must have the same signature.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from longlive_jax.types import Array

# names by which rematerialisation policies know what a layer computes
PRODUCT, ATTENDED, INPUT, PACKED = "product", "attended", "input", "packed_input"


class Matmul(Protocol):
  """`(x [..., in], w [in, out], bias [out] or None, path, key) -> [..., out]` in x's dtype."""

  def __call__(
    self, x: Array, w: Array, bias: Array | None, *, path: str, key: Array | None
  ) -> Array: ...


class Prepare(Protocol):
  """`(x, paths of the linear layers that share it) -> x`, or what `matmul` takes in its place."""

  def __call__(self, x: Array, paths: tuple[str, ...]) -> Any: ...


class Dense(Protocol):
  """Attention without structure, see `dense_attention`."""

  def __call__(self, q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array: ...


class Plan(Protocol):
  """Which keys a query sees; see `model/attention.py`."""

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]: ...


Attend = Callable[[Array, Array, Array, Any, Array | int, Plan], tuple[Array, Any]]


def row_major(x: Array) -> Array:
  """x in the default layout; else what reads it may have it copied, whole stacks beforehand."""
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


Axes = tuple[int, ...]


def contract(
  a: Array,
  b: Array,
  axes: tuple[int, int] | tuple[Axes, Axes],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Array:
  """Sum of products over an axis, or several, of each operand; the other axes of a, then of b.

  The sum is float32, the result `dtype`. Operands enter as they are. A CPU widens them first: that
  changes nothing, for float32 holds the product of two bfloat16 numbers, and its own bfloat16
  product lacks some shapes.
  """
  of_a, of_b = ((axis,) if isinstance(axis, int) else axis for axis in axes)
  dimensions = ((of_a, of_b), ((), ()))

  def narrow(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)

  def wide(a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    y = jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
    return y.astype(dtype)

  if a.dtype == b.dtype == jnp.float32:
    return narrow(a, b)
  return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


@jax.custom_vjp
def product(x: Array, w: Array) -> Array:
  """`x [..., in] @ w [in, out]` in x's dtype, summed in float32.

  Its three products (fprop, dgrad, wgrad) all take operands in x's dtype: derived automatically,
  dgrad and wgrad would multiply a float32 cotangent, at a fraction of the speed. A float32 result
  would be written and read again at twice the bytes.
  """
  return contract(x, w.astype(x.dtype), (x.ndim - 1, 0), x.dtype)


def _fprop(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
  return product(x, w), (x, w)


def _dgrad_wgrad(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, w = saved
  narrow = g.astype(x.dtype)
  dx = contract(narrow, w.astype(x.dtype), (g.ndim - 1, 1), x.dtype)
  tokens = tuple(range(x.ndim - 1))  # not reshaped to one axis, over which devices may be split
  return dx, contract(x, narrow, (tokens, tokens)).astype(w.dtype)


product.defvjp(_fprop, _dgrad_wgrad)


def plain_matmul(x: Array, w: Array, bias: Array | None, *, path: str, key: Array | None) -> Array:
  """Matrix product in x's dtype with float32 accumulation; path and key are not used."""
  del path, key
  y = product(x, w)
  return checkpoint_name((y if bias is None else y + bias).astype(x.dtype), PRODUCT)


def plain_prepare(x: Array, paths: tuple[str, ...]) -> Array:
  """x as it is, under its name."""
  del paths
  return checkpoint_name(x, INPUT)


def dense_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
  """Softmax attention in plain `jnp`, every query sees every key.

  Args:
    q: `[B, S, N, D]`.
    k: `[B, S_k, N, D]`.
    v: same shape as k.
    lengths: optional int32 `[B]`, only the first keys of each sample count.

  Returns:
    `[B, S, N, D]` in q's dtype. Logits and softmax are float32.
  """
  logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * (q.shape[-1] ** -0.5)
  if lengths is not None:
    seen = jnp.arange(k.shape[1]) < lengths[:, None]
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
  weights = jax.nn.softmax(logits, -1).astype(v.dtype)
  out = jnp.einsum("bnqk,bknd->bqnd", weights, v, preferred_element_type=jnp.float32)
  out = out.astype(q.dtype)
  return checkpoint_name(out, ATTENDED) if is_costly(q.shape[1], k.shape[1]) else out


def is_costly(queries: int, keys: int) -> bool:
  """Whether an attention is worth keeping for the backward pass: not that to a short text."""
  return keys >= queries


def cudnn_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
  """`dense_attention` on the GPU through cuDNN; bfloat16 or float16 only."""
  return jax.nn.dot_product_attention(
    q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
  )


def attend_with(dense: Dense) -> Attend:
  """The attention entry that runs a plan's dense calls with `dense`."""

  def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan) -> Any:
    return plan.attend(dense, q, k, v, cache, layer)

  return attend


plain_attend = attend_with(dense_attention)


def normalise(x: Array, eps: float) -> Array:
  """LayerNorm without affine over the last axis; float32 result."""
  wide = x.astype(jnp.float32)
  centred = wide - jnp.mean(wide, -1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)


def affine_norm(x: Array, factor: Array, shift: Array, eps: float) -> Array:
  """`LayerNorm(x) * factor + shift` over the last axis, in float32 until the end."""
  return (normalise(x, eps) * factor + shift).astype(x.dtype)


def modulated_norm(x: Array, scale: Array, shift: Array, eps: float) -> Array:
  """`LayerNorm(x) * (1 + scale) + shift` over the last axis.

  Args:
    x: `[B, F, S_f, E]`, tokens grouped by latent.
    scale: `[B, F, 1, E]` float32.
    shift: same shape.
    eps: of the norm.

  Returns:
    Same shape and dtype as x; arithmetic in float32.
  """
  return affine_norm(x, 1.0 + scale, shift, eps)


@dataclasses.dataclass(frozen=True)
class Ops:
  """How the network multiplies and attends.

  Attributes:
    matmul, attend: the functions.
    prepare: work on the input of linear layers that is done once for all that share it.
    dense: attention without structure, which `attend` is made of.
    between: what happens between the products of a layer, see `model/between.py`; None = plain.
    key: of whatever they draw in this step, such as the noise of stochastic rounding; None = they
      draw nothing.
    mesh: of devices that share each block of a video along "seq": the operations see a part of its
      latents, inside `parallel.share.island`; None = they see all.
  """

  matmul: Matmul = plain_matmul
  attend: Attend = plain_attend
  prepare: Prepare = plain_prepare
  dense: Dense = dense_attention
  between: Any = None
  key: Array | None = None
  mesh: Mesh | None = None

  def with_key(self, key: Array | None) -> "Ops":
    """The same with a key."""
    return dataclasses.replace(self, key=key)

  def in_layer(self, index: Array | int) -> "Ops":
    """The same with the key of one of the stacked layers."""
    return self if self.key is None else self.with_key(jax.random.fold_in(self.key, index))

  def key_of(self, path: str) -> Array | None:
    """The key of the layer at a path."""
    return None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(path.encode()))


REFERENCE = Ops()
