"""Cached attention without a cache: earlier blocks are given one by one, a new one is handed back.

A rollout that is differentiated must not write into a cache: each pass would keep a cache of its
own for the backward pass. Here the keys and values of a block are made once, are never changed, and
all later passes look at the same arrays.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.tree_util import register_dataclass

from longlive_jax.model.ops import Dense
from longlive_jax.model.rope import Rope, rotate
from longlive_jax.types import Array


class BlockKV(NamedTuple):
  """Keys and values of a block, `[layers, B, S_b, N, D]`; inside a layer without the first axis."""

  k: Array
  v: Array


@functools.partial(
  register_dataclass, data_fields=["rope", "order", "lengths", "window_rope"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Grown:
  """One block that sees itself and earlier blocks, in the order of the sampler's slots.

  The cache of a layer is a tuple of `BlockKV`, oldest block first; what comes back in its place is
  the `BlockKV` of this block.

  Attributes:
    rope: of the block's own tokens; with `window_rope` of its queries.
    order: int32 `[B, level]`, the block in each slot, an index into the earlier blocks and this one
      after them; None = all of them in order of time.
    lengths: optional int32 `[B]`, filled tokens, where samples differ in filled slots.
    window_rope: with relative positions, the rotation of all `level` slots; keys are then kept
      without their rotation.
  """

  rope: Rope
  order: Array | None = None
  lengths: Array | None = None
  window_rope: Rope | None = None

  def attend(
    self,
    dense: Dense,
    q: Array,
    k: Array,
    v: Array,
    cache: tuple[BlockKV, ...],
    layer: Array | int,
  ) -> tuple[Array, BlockKV]:
    """See `Ops.attend`."""
    del layer
    own = BlockKV(k if self.window_rope is not None else rotate(k, self.rope), v)
    keys, values = (self.seen(blocks) for blocks in zip(*cache, own, strict=True))
    if self.window_rope is not None:
      keys = rotate(keys, self.window_rope)
    return dense(rotate(q, self.rope), keys, values, self.lengths), own

  def seen(self, blocks: tuple[Array, ...]) -> Array:
    """Blocks `[B, S_b, N, D]` as `[B, level * S_b, N, D]` in the order of slots."""
    if self.order is None:
      return jnp.concatenate(blocks, 1)
    whole = jnp.stack(blocks, 1)
    picked = jnp.take_along_axis(whole, self.order[:, :, None, None, None], 1)
    return picked.reshape(picked.shape[0], -1, *picked.shape[3:])
