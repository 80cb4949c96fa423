"""The key-value cache in NVFP4: the slots of the plain cache at 0.28 of its bytes.

A block `[S_b, N, D]` is quantised as a matrix of `S_b * N` rows along the head dimension, with one
amax. A block attends to itself as it is, and to earlier blocks as they were stored, so only the
pass that leaves a block for good is quantised at all.

Keys may be smoothed. "tokens" takes each head's mean over the tokens off before a block is
quantised and puts it back when it is read: the numbers to be quantised are smaller, the meaning is
the same. "original" reproduces a defect of the original for bit parity: the block's own keys lose
their mean over channels while it attends to itself, stored keys do not.

Source: spec/nvfp4.md section 7.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass

from longlive_jax.kernels.dequantise import dequantise_slots, fits
from longlive_jax.kernels.quantise import quantise_rows
from longlive_jax.quant.matmul import kernel_takes
from longlive_jax.quant.nvfp4 import Spec, dequantise, largest, over_devices, quantise, unit_of
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.quant.rules import find_rule
from longlive_jax.types import Array, PyTree


@functools.partial(
  register_dataclass,
  data_fields=["codes", "scales", "amax", "mean"],
  meta_fields=["rule", "kernels", "axis"],
)
@dataclasses.dataclass(frozen=True)
class Store:
  """The slots of keys, or of values; R = S_b * N rows.

  Devices that split the heads have the rows of their own heads: the whole array has those of the
  first device first.

  Attributes:
    codes: uint8 `[layers, B, K, R, D / 2]`.
    scales: float8_e4m3fn `[layers, B, K, R, D / 16]`.
    amax: float32 `[layers, B, K]`.
    mean: what was taken off, `[layers, B, K, N, D]` in the compute dtype; None = nothing.
    rule: scale rule.
    kernels: write and read by Pallas kernels, where they can.
    axis: mesh axis over which heads are split, inside `shard_map`; a block still has one amax.
  """

  codes: Array
  scales: Array
  amax: Array
  mean: Array | None
  rule: str
  kernels: bool = False
  axis: str = ""

  def write(self, layer: Array | int, slot: Array, x: Array) -> "Store":
    """Quantises a block `[B, S_b, N, D]` into slot `[B]` of a layer, in place."""
    mean = None
    if self.mean is not None:
      mean = jnp.mean(x.astype(jnp.float32), 1).astype(self.mean.dtype)
      x = (x.astype(jnp.float32) - mean.astype(jnp.float32)[:, None]).astype(x.dtype)
    q = self._quantise(x.reshape(x.shape[0], -1, x.shape[-1]))

    def put(store: Array, new: Array) -> Array:
      for sample in range(new.shape[0]):
        at = (layer, sample, slot[sample], *(0,) * (store.ndim - 3))
        store = jax.lax.dynamic_update_slice(store, new[None, sample : sample + 1, None], at)
      return store

    new = dataclasses.replace(self, codes=q.codes, scales=q.scales, amax=q.amax, mean=mean)
    return jax.tree.map(put, self, new)

  def _quantise(self, x: Array) -> QTensor:
    """`[B, R, D]` with an amax a sample."""
    spec = Spec(self.rule, axis=self.axis)
    if not (self.kernels and kernel_takes(x[0], spec)):
      return quantise(x, dataclasses.replace(spec, lead=1))
    rule, amax = find_rule(self.rule), over_devices(largest(x, 1), spec)
    parts = [quantise_rows(*each, rule) for each in zip(x, amax, strict=True)]
    codes, scales = (jnp.stack(arrays) for arrays in zip(*parts, strict=True))
    return QTensor(codes, scales, amax, self.rule)

  def read(self, layer: Array | int, level: int, heads: int, dtype: jnp.dtype) -> Array:
    """The lowest `level` slots of a layer, `[B, level, S_b, N, D]`."""

    def take(store: Array) -> Array:
      size = (1, store.shape[1], level, *store.shape[3:])
      return jax.lax.dynamic_slice(store, (layer, *(0,) * (store.ndim - 1)), size)[0]

    if self.kernels and self.mean is None and dtype == jnp.bfloat16 and self._fits():
      unit = unit_of(QTensor(self.codes, self.scales, self.amax, self.rule))
      out = dequantise_slots(self.codes, self.scales, unit, jnp.asarray(layer), level)
      return out.reshape(*out.shape[:2], -1, heads, out.shape[-1])
    q = QTensor(take(self.codes), take(self.scales), take(self.amax), self.rule)
    if self.mean is None:
      return dequantise(q, dtype).reshape(*q.shape[:2], -1, heads, q.shape[-1])
    blocks = dequantise(q, jnp.float32).reshape(*q.shape[:2], -1, heads, q.shape[-1])
    return (blocks + take(self.mean).astype(jnp.float32)[:, :, None]).astype(dtype)

  def specs(self, axis: str) -> "Store":
    """Where its arrays are split if the heads are split over a mesh axis."""
    by_heads = P(None, None, None, axis)
    mean = None if self.mean is None else by_heads
    return dataclasses.replace(self, codes=by_heads, scales=by_heads, amax=P(), mean=mean)

  def _fits(self) -> bool:
    return fits(self.codes.shape[-2], 2 * self.codes.shape[-1])


@functools.partial(register_dataclass, data_fields=["k", "v"], meta_fields=["smoothing"])
@dataclasses.dataclass(frozen=True)
class QuantisedKVCache:
  """Same use as `model.kv_cache.KVCache`.

  Attributes:
    k, v: stores.
    smoothing: "none", "tokens" or "original".
  """

  k: Store
  v: Store
  smoothing: str = "none"

  def exchange(
    self, layer: Array | int, slot: Array, k: Array, v: Array, level: int, keep: bool
  ) -> tuple["QuantisedKVCache", Array, Array]:
    """See `KVCache.exchange`; without `keep` nothing is stored."""
    cache = self
    if keep:
      stores = (self.k.write(layer, slot, k), self.v.write(layer, slot, v))
      cache = dataclasses.replace(self, k=stores[0], v=stores[1])
    own = without_channel_mean(k) if self.smoothing == "original" else k
    keys, values = (
      overlay(store.read(layer, level, x.shape[2], x.dtype), slot, x)
      for store, x in ((cache.k, own), (cache.v, v))
    )
    return cache, keys, values

  def specs(self, axis: str) -> "QuantisedKVCache":
    """See `KVCache.specs`."""
    return dataclasses.replace(self, k=self.k.specs(axis), v=self.v.specs(axis))


def without_channel_mean(k: Array) -> Array:
  """Keys less their mean over channels, both rounded to their dtype, as in the original."""
  mean = jnp.mean(k.astype(jnp.float32), -1, keepdims=True).astype(k.dtype)
  return k - mean


def overlay(blocks: Array, slot: Array, own: Array) -> Array:
  """Puts each sample's own block `[B, S_b, N, D]` into its slot and joins the slots."""
  for sample in range(own.shape[0]):
    at = (sample, slot[sample], 0, 0, 0)
    blocks = jax.lax.dynamic_update_slice(blocks, own[sample : sample + 1, None], at)
  return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def empty_quantised_cache(
  shape: tuple[int, int, int, int, int, int],
  dtype: str,
  rule: str,
  smoothing: str = "none",
  kernels: bool = False,
  axis: str = "",
) -> QuantisedKVCache:
  """A cache that holds zeros.

  Args:
    shape: (layers, B, K, S_b, N, D) of the plain cache; D a multiple of 16.
    dtype: of keys and values as attention sees them.
    rule: scale rule.
    smoothing: see above.
    kernels, axis: see `Store`.
  """
  layers, batch, slots, tokens, heads, dim = shape

  def store(with_mean: bool) -> Store:
    rows = (layers, batch, slots, tokens * heads)
    return Store(
      codes=jnp.zeros((*rows, dim // 2), jnp.uint8),
      scales=jnp.zeros((*rows, dim // 16), jnp.float8_e4m3fn),
      amax=jnp.zeros(rows[:3], jnp.float32),
      mean=jnp.zeros((*rows[:3], heads, dim), dtype) if with_mean else None,
      rule=rule,
      kernels=kernels,
      axis=axis,
    )

  return QuantisedKVCache(store(smoothing == "tokens"), store(False), smoothing)


def regrouped(caches: PyTree, heads: int, before: int, after: int) -> PyTree:
  """Caches as another number of devices has them: the rows of a store in the order of theirs.

  Args:
    caches: of the host, in any tree; those that are not quantised stay as they are.
    heads: of all devices together.
    before, after: devices that split the heads; 1 = rows are in the order of tokens.
  """

  def rows(a: Any) -> Any:
    *lead, count, width = a.shape
    by_device = a.reshape(*lead, before, count // heads, heads // before, width)
    by_token = np.moveaxis(by_device, -4, -3)
    by_device = by_token.reshape(*lead, count // heads, after, heads // after, width)
    return np.moveaxis(by_device, -3, -4).reshape(a.shape)

  def regroup(cache: Any) -> Any:
    if before == after or not isinstance(cache, QuantisedKVCache):
      return cache
    k, v = (
      dataclasses.replace(store, codes=rows(store.codes), scales=rows(store.scales))
      for store in (cache.k, cache.v)
    )
    return dataclasses.replace(cache, k=k, v=v)

  return jax.tree.map(regroup, caches, is_leaf=lambda x: isinstance(x, QuantisedKVCache))
