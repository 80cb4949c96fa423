"""Attention plans: which keys a query sees, as a few dense calls without any mask.

Teacher forcing runs one dense call per block: the context queries of block i see context blocks
0..i, its target queries see context blocks 0..i-1 and target block i. Both have as many keys, and
both halves are pairs of rows all through the network: wherever a clip's tokens are split over
devices, a device holds context and target of the same blocks (the balanced layout). In
cached sampling every query of a block sees all filled slots.

Source: spec/models.md section 3, spec/jax.md sections 4.2 and 4.3.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from longlive_jax.model.kv_cache import Cache
from longlive_jax.model.ops import Dense
from longlive_jax.model.rope import Rope, rotate
from longlive_jax.types import Array

Borders = tuple[int, ...]


def block_borders(latents: int, block_latents: int, latent_tokens: int, first: int = 0) -> Borders:
  """Token borders (0, ..., S) of the blocks of a clip.

  Args:
    latents: F.
    block_latents: latents a block.
    latent_tokens: tokens a latent.
    first: latents of a separate first block; 0 = none.

  Raises:
    ValueError: the blocks do not fill the clip.
  """
  if (latents - first) % block_latents or latents <= first:
    raise ValueError(
      f"a clip of {latents} latents is not {first} + a multiple of"
      f" model.block_latents={block_latents}"
    )
  ends = range(first, latents + 1, block_latents)
  borders = tuple(end * latent_tokens for end in ends)
  return (0, *borders) if first else borders


@functools.partial(register_dataclass, data_fields=["rope"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Full:
  """Every token sees every token (the bidirectional network)."""

  rope: Rope

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]:
    return dense(rotate(q, self.rope), rotate(k, self.rope), v), cache


@functools.partial(register_dataclass, data_fields=["rope"], meta_fields=["borders"])
@dataclasses.dataclass(frozen=True)
class BlockCausal:
  """A token sees its own block and all earlier ones."""

  rope: Rope
  borders: Borders

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]:
    q, k = rotate(q, self.rope), rotate(k, self.rope)
    pairs = zip(self.borders[:-1], self.borders[1:], strict=True)
    parts = [dense(q[:, start:end], k[:, :end], v[:, :end]) for start, end in pairs]
    return jnp.concatenate(parts, 1), cache


@functools.partial(register_dataclass, data_fields=["rope"], meta_fields=["borders"])
@dataclasses.dataclass(frozen=True)
class TeacherForcing:
  """Rows are (context, target) pairs of the same clip, `[2 B, S, N, D]`, at the same positions.

  Attributes:
    rope: of S tokens.
    borders: token borders of the blocks.
  """

  rope: Rope
  borders: Borders

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]:
    rope = self.rope
    if rope.cos.shape[0] > 1:
      rope = Rope(jnp.repeat(rope.cos, 2, 0), jnp.repeat(rope.sin, 2, 0))
    q, k, v = apart(rotate(q, rope)), apart(rotate(k, rope)), apart(v)
    outs = []
    for start, end in zip(self.borders[:-1], self.borders[1:], strict=True):

      def seen(pairs: Array, start: int = start, end: int = end) -> Array:
        context, target = pairs[::2], pairs[1::2]
        return pair(
          context[:, :end], jnp.concatenate([context[:, :start], target[:, start:end]], 1)
        )

      outs.append(dense(q[:, start:end], seen(k), seen(v)))
    return jnp.concatenate(outs, 1), cache


@jax.custom_vjp
def apart(x: Array) -> Array:
  """x, whose gradient is finished before anything is computed of it.

  The gradients of keys and values are sums over blocks of as many shapes; a GPU compiler that fuses
  these sums with what comes after them, reductions over tokens, makes both slow.
  """
  return x


def _apart(x: Array) -> tuple[Array, None]:
  return x, None


def _finished(_: None, g: Array) -> tuple[Array]:
  return (jax.lax.optimization_barrier(g),)


apart.defvjp(_apart, _finished)


def pair(a: Array, b: Array) -> Array:
  """Two `[B, ...]` -> `[2 B, ...]`, sample-major."""
  return jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])


@functools.partial(register_dataclass, data_fields=[], meta_fields=["pieces", "halves"])
@dataclasses.dataclass(frozen=True)
class Cross:
  """Attention to text: the tokens are cut into `pieces` runs, one prompt each.

  q is `[B * halves, S, N, D]`, k and v are `[B * pieces, L, N, D]`, all sample-major: with two
  halves context and target see the same prompts. No text is masked.
  """

  pieces: int = 1
  halves: int = 1

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]:
    runs = q.reshape(-1, self.halves, self.pieces, q.shape[1] // self.pieces, *q.shape[2:])
    runs = jnp.swapaxes(runs, 1, 2)  # [B, pieces, halves, S / pieces, N, D]
    out = dense(runs.reshape(k.shape[0], -1, *q.shape[2:]), k, v)
    return jnp.swapaxes(out.reshape(runs.shape), 1, 2).reshape(q.shape), cache


@functools.partial(
  register_dataclass,
  data_fields=["rope", "slot", "lengths", "window_rope"],
  meta_fields=["level", "keep"],
)
@dataclasses.dataclass(frozen=True)
class Cached:
  """One block against the slot cache: writes its own keys and values, then sees all filled slots.

  Attributes:
    level: slots that are read, the lowest first; own slot included.
    rope: of the block's own tokens; with `window_rope` of its queries. None = queries and keys
      come rotated.
    slot: int32 `[B]`, where each sample's block is written.
    lengths: optional int32 `[B]`, filled tokens, where samples differ in filled slots.
    window_rope: with relative positions, the rotation of all `level` slots; the cache then
      holds keys that are not rotated.
    keep: whether later blocks will see the keys and values of this pass.
  """

  level: int
  rope: Rope | None
  slot: Array
  lengths: Array | None = None
  window_rope: Rope | None = None
  keep: bool = True

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Cache, layer: Array | int
  ) -> tuple[Array, Cache]:
    turned = k if self.rope is None else rotate(k, self.rope)
    own = turned if self.window_rope is None else k
    cache, keys, values = cache.exchange(layer, self.slot, own, v, self.level, self.keep)
    if self.window_rope is not None:
      keys = rotate(keys, self.window_rope)
    q = q if self.rope is None else rotate(q, self.rope)
    return dense(q, keys, values, self.lengths), cache
