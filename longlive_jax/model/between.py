"""What a transformer layer does between its matrix products.

`Between` says it in plain `jnp`, of which a compiler makes several passes over memory where a row
is reduced. `OnePass` takes one pass each, by kernels, where rows fit them, and has no gradients.
Either is used through `Ops.between`. Sums and norms are of `[B, S, E]`; what modulates is
`[B, F, 1, E]` for F runs of tokens, or `[E]`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from longlive_jax.kernels.row_jobs import Product, add_norm_rows, norm_rows, rms_rows
from longlive_jax.kernels.rows import PART, takes
from longlive_jax.model.attention import Cached
from longlive_jax.model.kv_cache import KVCache, stored_as
from longlive_jax.model.layers import gelu, rms_norm
from longlive_jax.model.ops import Ops, Plan, affine_norm, contract
from longlive_jax.model.rope import Rope, rotate
from longlive_jax.types import SEQ, Array

Paths = tuple[str, ...]


@functools.partial(register_dataclass, data_fields=["x", "y", "gate"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sum:
  """Tokens `x + y * gate` before they are added, so that what comes next can do it."""

  x: Array
  y: Array | Product
  gate: Array


@functools.partial(register_dataclass, data_fields=["scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Beside:
  """In place of the kernel of keys, or values: its columns are beside those of the queries'.

  Attributes:
    scales: of the columns, float32 `[E]`.
  """

  scales: Array


@dataclasses.dataclass(frozen=True)
class Keys:
  """Keys of one video that are normalised, and turned, as they are written; see `Unwritten`.

  Attributes:
    product: `[1, S, E]`.
    weight, eps, turn: as for `Between.rms`.
    heads: N.
  """

  product: Array | Product
  weight: Array
  eps: float
  turn: Rope | None
  heads: int

  def into(self, store: Array, layer: Array | int, slot: Array) -> Array:
    """`[layers, 1, K, S, N, D]` with these keys in `slot [1]` of a layer."""
    y, (slots, tokens, _, dim) = opened(self.product), store.shape[2:]
    shape, made = y.shape, None
    if takes(shape, y.values.dtype):
      place = store.reshape(-1, shape[-1]), (layer * slots + slot) * tokens
      made = rms_rows(y, self.weight, self.eps, turned_rows(self.turn, shape), place)
    if made is not None:
      return made[0].reshape(store.shape)
    keys = OnePass().rms(self.product, self.weight, self.eps, self.turn)
    keys = stored_as(keys.reshape(1, 1, 1, tokens, self.heads, dim), store.dtype)
    return jax.lax.dynamic_update_slice(store, keys, (layer, 0, slot[0], 0, 0, 0))


class Between:
  """The plain definitions."""

  def product(self, ops: Ops, x: Any, w: Any, bias: Array | None, *, path: str) -> Array | Product:
    """A linear layer of an input that is prepared; what comes next may have to finish it."""
    return ops.matmul(x, w, bias, path=path, key=ops.key_of(path))

  def prepare(self, ops: Ops, x: Array, paths: Paths) -> Any:
    """An input of the linear layers of some paths."""
    return ops.prepare(x, paths)

  def joined(self, ops: Ops, out: Any, shape: tuple[int, ...], paths: Paths) -> Any:
    """What attention gives, `[B, S, N, D]`, as an input `[B, S, E]` of the layers of some paths."""
    return self.prepare(ops, out.reshape(shape), paths)

  def enter(
    self, ops: Ops, x: Array | Sum, affine: tuple[Array, Array], eps: float, paths: Paths
  ) -> tuple[Array, Any]:
    """Tokens, and the `norm` of them with (factor, shift)."""
    if isinstance(x, Sum):
      return self.add_norm(ops, x.x, x.y, x.gate, affine, eps, paths)
    return x, self.norm(ops, x, *affine, eps, paths)

  def total(self, x: Array | Sum) -> Array:
    """Tokens that are added."""
    return self.add(x.x, x.y, x.gate) if isinstance(x, Sum) else x

  def norm(self, ops: Ops, x: Array, factor: Array, shift: Array, eps: float, paths: Paths) -> Any:
    """`LayerNorm(x) * factor + shift`, prepared for the layers of some paths."""
    y = affine_norm(grouped(x, factor), factor, shift, eps).reshape(x.shape)
    return ops.prepare(y, paths)

  def add(self, x: Array, y: Array | Product, gate: Array | None = None) -> Array:
    """x + y * gate, float32 until it is rounded; no gate is 1."""
    y = whole(y)
    if gate is None:
      return x + y
    wide = grouped(x, gate).astype(jnp.float32) + grouped(y, gate) * gate
    return wide.astype(x.dtype).reshape(x.shape)

  def add_norm(
    self,
    ops: Ops,
    x: Array,
    y: Array | Product,
    gate: Array | None,
    affine: tuple[Array, Array],
    eps: float,
    paths: Paths,
  ) -> tuple[Array, Any]:
    """What `add` gives, and the `norm` of it with (factor, shift)."""
    x = self.add(x, y, gate)
    return x, self.norm(ops, x, *affine, eps, paths)

  def activate(self, ops: Ops, y: Array | Product, path: str) -> Any:
    """GELU, prepared for the layer of a path."""
    return ops.prepare(gelu(whole(y)), (path,))

  def rms(self, y: Array | Product, weight: Array, eps: float, turn: Rope | None = None) -> Array:
    """`y / rms(y) * weight` over the last axis, then the rotation of its heads, if any."""
    normal = rms_norm(whole(y), weight, eps)
    if turn is None:
      return normal
    heads = normal.reshape(*normal.shape[:2], -1, 2 * turn.cos.shape[-1])
    return rotate(heads, turn).reshape(normal.shape)

  def turns(self, ops: Ops, plan: Plan, x: Array) -> tuple[Rope | None, Plan]:
    """The rotation that queries and keys get with their norm, and what is left of the plan."""
    del ops, x
    return None, plan

  def writes_keys(self, ops: Ops, plan: Plan, cache: Any, layer: Array | int) -> bool:
    """Whether keys can come as `Keys`."""
    del ops, plan, cache, layer
    return False


class OnePass(Between):
  """By kernels, for bfloat16."""

  def product(self, ops: Ops, x: Any, w: Any, bias: Array | None, *, path: str) -> Array | Product:
    if not (isinstance(x, jax.Array) and isinstance(w, jax.Array) and takes(w.shape, x.dtype)):
      return super().product(ops, x, w, bias, path=path)
    x, w = apart(x, w.astype(x.dtype))
    return Product(contract(x, w, (x.ndim - 1, 0), x.dtype), bias)

  def quantises(self, paths: Paths) -> bool:
    """Whether the layers of these paths take rows of FP8."""
    del paths
    return False

  def packed(self, ops: Ops, found: Sequence[Array], shape: tuple[int, ...], paths: Paths) -> Any:
    """What kernels return, rows and perhaps their scales, as an input of the layers of `paths`."""
    return ops.prepare(found[0].reshape(shape), paths)

  def norm(self, ops: Ops, x: Array, factor: Array, shift: Array, eps: float, paths: Paths) -> Any:
    made = None
    if takes(x.shape, x.dtype):
      made = norm_rows(flat(x), flat(factor), flat(shift), eps, self.quantises(paths))
    if made is None:
      return super().norm(ops, x, factor, shift, eps, paths)
    return self.packed(ops, made, x.shape, paths)

  def add_norm(
    self,
    ops: Ops,
    x: Array,
    y: Array | Product,
    gate: Array | None,
    affine: tuple[Array, Array],
    eps: float,
    paths: Paths,
  ) -> tuple[Array, Any]:
    made = None
    if takes(x.shape, x.dtype):
      gates = None if gate is None else flat(gate)
      factor, shift = (flat(each) for each in affine)
      quantise = self.quantises(paths)
      made = add_norm_rows(flat(x), opened(y), gates, factor, shift, eps, quantise)
    if made is None:
      return super().add_norm(ops, x, y, gate, affine, eps, paths)
    return made[0].reshape(x.shape), self.packed(ops, made[1:], x.shape, paths)

  def activate(self, ops: Ops, y: Array | Product, path: str) -> Any:
    """In the form that XLA gives to cuBLAS with the product: nothing is written in between."""
    values, bias, scaled = opened(y).values, opened(y).bias, opened(y).rows is not None
    if scaled or bias is None or not takes(values.shape, values.dtype):
      return super().activate(ops, y, path)
    biased = values + bias.astype(values.dtype)
    return ops.prepare(jax.nn.gelu(biased, approximate=True), (path,))

  def rms(self, y: Array | Product, weight: Array, eps: float, turn: Rope | None = None) -> Array:
    y, made = opened(y), None
    if takes(y.shape, y.values.dtype):
      made = rms_rows(y, weight, eps, turned_rows(turn, y.shape))
    return super().rms(y, weight, eps, turn) if made is None else made[0].reshape(y.shape)

  def turns(self, ops: Ops, plan: Plan, x: Array) -> tuple[Rope | None, Plan]:
    if not isinstance(plan, Cached) or plan.rope is None or plan.window_rope is not None:
      return None, plan
    rope = plan.rope
    if PART % (2 * rope.cos.shape[-1]):
      return None, plan
    if ops.mesh is not None:  # this device's tokens
      at = x.shape[1] * jax.lax.axis_index(SEQ)
      rope = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, x.shape[1], 1), rope)
    return rope, dataclasses.replace(plan, rope=None)

  def writes_keys(self, ops: Ops, plan: Plan, cache: Any, layer: Array | int) -> bool:
    # of separate layers: with a slice of a stack XLA makes the kernel a fusion, which writes anew
    here = isinstance(layer, int) and isinstance(plan, Cached) and isinstance(cache, KVCache)
    turned = here and ops.mesh is None and plan.rope is plan.window_rope is None
    return turned and cache.k.shape[1] == 1


def apart(x: Array, w: Array) -> tuple[Array, Array]:
  """Operands of one product of several that share x.

  A compiler would join them, and each time copy their weights side by side and the results apart,
  for kernels.
  """
  return jax.lax.optimization_barrier((x, w))


def grouped(x: Array, by: Array) -> Array:
  """`[B, S, E]` as `[B, F, S / F, E]` where `by` is `[B, F, 1, E]`; else as it is."""
  return x if by.ndim == 1 else x.reshape(*by.shape[:2], -1, x.shape[-1])


def flat(x: Array) -> Array:
  """`[..., E]` as `[T, E]`."""
  return x.reshape(-1, x.shape[-1])


def turned_rows(rope: Rope | None, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
  """Cosines and sines `[T, D / 2]` of the rows of `[B, S, E]`."""
  if rope is None:
    return None
  wide = (*shape[:2], rope.cos.shape[-1])
  cos, sin = (flat(jnp.broadcast_to(each, wide)) for each in (rope.cos, rope.sin))
  return cos, sin


def whole(y: Array | Product) -> Array:
  """A product as an array."""
  return y.whole() if isinstance(y, Product) else y


def opened(y: Array | Product) -> Product:
  """A finished product as one that lacks nothing."""
  return y if isinstance(y, Product) else Product(y)


_PLAIN = Between()


def between_of(ops: Ops) -> Between:
  """What happens between products by `Ops.between`."""
  return ops.between or _PLAIN
