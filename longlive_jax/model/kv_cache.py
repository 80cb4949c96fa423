"""The key-value cache: a fixed set of slots, each holding one block, and the eviction policy.

Keys are stored after their rotation, so the order of slots is irrelevant: nothing is ever shifted
or copied. Which block sits in which slot is decided on the host by pure functions of
`SlotState`; the device only writes at a slot and reads the lowest `level` slots.

Source: spec/inference.md sections 1.5, 1.6 and 2.4; spec/models.md section 3.6.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass

from longlive_jax.types import Array

FP8 = "float8_e4m3fn"


class Unwritten(Protocol):
  """Keys or values of a block that are finished as they are written."""

  def into(self, store: Array, layer: Array | int, slot: Array) -> Array:
    """The store `[layers, B, K, S_b, N, D]` with the block in `slot [B]` of a layer."""
    ...


@functools.partial(register_dataclass, data_fields=["k", "v"], meta_fields=["seen"])
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values `[layers, B, K, S_b, N, D]`; S_b tokens of a block.

  In FP8 they are stored without a scale: E4M3 numbers are as exact from 1/64 to 448, and keys are
  normalised. A block then attends to itself as it is stored, too.

  Attributes:
    k, v: what is stored.
    seen: dtype in which they are read; "" = as they are stored.
  """

  k: Array
  v: Array
  seen: str = ""

  def write(
    self, layer: Array | int, slot: Array, k: Array | Unwritten, v: Array | Unwritten
  ) -> "KVCache":
    """Writes a block's keys and values `[B, S_b, N, D]` into slot `[B]` of a layer, in place."""

    def put(store: Array, new: Array | Unwritten) -> Array:
      if not isinstance(new, jax.Array):
        return new.into(store, layer, slot)
      new = stored_as(new, store.dtype)[None, :, None]
      for sample in range(new.shape[1]):
        at = (layer, sample, slot[sample], 0, 0, 0)
        store = jax.lax.dynamic_update_slice(store, new[:, sample : sample + 1], at)
      return store

    return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

  def read(self, layer: Array | int, level: int) -> tuple[Array, Array]:
    """Keys and values `[B, level * S_b, N, D]` of the lowest `level` slots of a layer."""

    def take(store: Array) -> Array:
      _, batch, _, tokens, heads, dim = store.shape
      size = (1, batch, level, tokens, heads, dim)
      part = jax.lax.dynamic_slice(store, (layer, 0, 0, 0, 0, 0), size)
      return part.reshape(batch, level * tokens, heads, dim).astype(self.seen or part.dtype)

    return take(self.k), take(self.v)

  def exchange(
    self,
    layer: Array | int,
    slot: Array,
    k: Array | Unwritten,
    v: Array | Unwritten,
    level: int,
    keep: bool,
  ) -> tuple["KVCache", Array, Array]:
    """Takes a block in and gives what it attends to.

    Args:
      layer: which.
      slot: int32 `[B]`, where each sample's block belongs.
      k, v: of the block, `[B, S_b, N, D]`.
      level: slots that are attended to, the lowest first; the block's own among them.
      keep: whether later blocks will see this pass; a plain cache writes in any case.

    Returns:
      (cache, keys, values), the last two `[B, level * S_b, N, D]`.
    """
    del keep
    cache = self.write(layer, slot, k, v)
    return cache, *cache.read(layer, level)

  def specs(self, axis: str) -> "KVCache":
    """Where its arrays are split if the heads are split over a mesh axis."""
    heads: Any = P(None, None, None, None, axis)
    return dataclasses.replace(self, k=heads, v=heads)


class Cache(Protocol):
  """What attention and placement need of a cache; see `KVCache`."""

  def exchange(
    self, layer: Array | int, slot: Array, k: Array, v: Array, level: int, keep: bool
  ) -> tuple[Any, Array, Array]: ...

  def specs(self, axis: str) -> Any: ...


@functools.partial(jax.jit, static_argnums=1)
def stored_as(x: Array, dtype: jax.typing.DTypeLike) -> Array:
  """x in the dtype of a cache; what FP8 cannot hold becomes the largest number that it can."""
  if jnp.dtype(dtype) == FP8:
    largest = float(jnp.finfo(FP8).max)
    x = jnp.clip(x, -largest, largest)
  return x.astype(dtype)


def empty_cache(
  layers: int,
  batch: int,
  slots: int,
  block_tokens: int,
  heads: int,
  head_dim: int,
  dtype: str,
  seen: str = "",
) -> KVCache:
  """A cache of zeros, stored in `dtype`; `seen` as in `KVCache`."""
  shape = (layers, batch, slots, block_tokens, heads, head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), seen)


@dataclasses.dataclass(frozen=True)
class Window:
  """The policy's constants, in blocks: all slots, and how many first blocks are kept for good."""

  slots: int
  sink: int


@dataclasses.dataclass(frozen=True)
class SlotState:
  """Where one sample's blocks are.

  Attributes:
    blocks: block index held by each filled slot, lowest slot first; filled slots are a prefix.
    positions: first temporal position (latents, shot offset included) of each filled slot's block.
    pin: block that is kept since the last cut; -1 = none.
  """

  blocks: tuple[int, ...] = ()
  positions: tuple[float, ...] = ()
  pin: int = -1

  @property
  def level(self) -> int:
    """Filled slots."""
    return len(self.blocks)

  def order(self) -> tuple[int, ...]:
    """Rank in time of the block of each filled slot."""
    return tuple(sorted(self.blocks).index(block) for block in self.blocks)


def admit(state: SlotState, block: int, position: float, window: Window) -> tuple[SlotState, int]:
  """Gives a new block a slot: the lowest free one, or that of the oldest unprotected block.

  Args:
    state: before the block; the block must not be cached yet.
    block: its index in the video.
    position: first temporal position of the block.
    window: policy.

  Returns:
    (state that holds the block, its slot).
  """
  if state.level < window.slots:
    slot = state.level
    blocks, positions = (*state.blocks, block), (*state.positions, position)
  else:
    free = [b for b in state.blocks if b >= window.sink and b != state.pin]
    slot = state.blocks.index(min(free))
    blocks = (*state.blocks[:slot], block, *state.blocks[slot + 1 :])
    positions = (*state.positions[:slot], position, *state.positions[slot + 1 :])
  return dataclasses.replace(state, blocks=blocks, positions=positions), slot


def keep_sink(state: SlotState, window: Window) -> SlotState:
  """Forgets all but the sink, whose blocks are in the lowest slots; releases the pin."""
  count = sum(1 for block in state.blocks if block < window.sink)
  return SlotState(state.blocks[:count], state.positions[:count])


def pin_block(state: SlotState, block: int) -> SlotState:
  """Keeps `block` until the next cut; the previous pin becomes an ordinary block."""
  return dataclasses.replace(state, pin=block)
