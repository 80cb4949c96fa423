"""Sampling on several devices: each has some latents of every block, and heads of every cache.

All passes over a block are one `shard_map` island. Everything in it but self-attention belongs to
a token: embedding, norms, products, attention to text, the solver's step. A device does it for the
latents that it has; the compiler splits nothing, and kernels run on what is there. Self-attention
turns latents into heads with one all-to-all, attends with the whole block to the device's share of
the cache, and turns heads back with a second one (Ulysses). What is cached never moves. Scales that
NVFP4 has for a whole tensor are the largest of all devices.

    [B, S / P, N, D]  --all-to-all-->  [B, S, N / P, D]  --attend-->  --all-to-all-->  as before

Queries, keys and values travel by themselves, each while the next is computed, in pieces `[P, ...]`
that are written once more before they leave; of one video they lie as they are read when they come.

Source: spec/inference.md section 6, spec/jax.md section 5.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.model.attention import Cross
from longlive_jax.model.ops import Attend, Dense, Ops, Plan
from longlive_jax.types import SEQ, Array, PyTree

LATENTS = P(None, SEQ)  # [B, F, ...]


@dataclasses.dataclass(frozen=True)
class Travel:
  """How queries, keys, values and results `[..., D]` are sent: `pack(x)`, `unpack(sent, dtype)`."""

  pack: Callable[[Array], Array] = lambda x: x
  unpack: Callable[[Array, Any], Array] = lambda sent, dtype: sent


AS_THEY_ARE = Travel()


def shared_ops(ops: Ops, mesh: Mesh, travel: Travel = AS_THEY_ARE) -> Ops:
  """The same operations on a part of a block's latents, for `island`.

  Args:
    ops: of one device.
    mesh: its axis "seq" divides the latents of a block and the heads.
    travel: how they are exchanged.
  """
  return dataclasses.replace(ops, attend=exchanged(ops.dense, travel), mesh=mesh)


def exchanged(dense: Dense, travel: Travel = AS_THEY_ARE) -> Attend:
  """The attention entry inside an island: two exchanges, but for the attention to text."""

  def attend(
    q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan
  ) -> tuple[Array, Any]:
    if isinstance(plan, Cross):
      return plan.attend(dense, q, k, v, cache, layer)
    v, k, q = (to_heads(x, travel) for x in (v, k, q))
    out, cache = plan.attend(dense, q, k, v, cache, layer)
    return to_tokens(out, travel), cache

  return attend


def to_heads(x: Array, travel: Travel = AS_THEY_ARE) -> Array:
  """`[B, S, N / P, D]` of `[B, S / P, N, D]`."""
  batch, tokens, heads, dim = x.shape
  pieces = jax.lax.axis_size(SEQ)
  x = x.reshape(batch, tokens, pieces, heads // pieces, dim)
  found = _exchange(jnp.moveaxis(x, 2, 0), travel)  # [P, B, S / P, N / P, D]
  return jnp.moveaxis(found, 0, 1).reshape(batch, pieces * tokens, heads // pieces, dim)


def to_tokens(x: Array, travel: Travel = AS_THEY_ARE) -> Array:
  """`[B, S / P, N, D]` of `[B, S, N / P, D]`."""
  batch, tokens, heads, dim = x.shape
  pieces = jax.lax.axis_size(SEQ)
  x = x.reshape(batch, pieces, tokens // pieces, heads, dim)
  found = _exchange(jnp.moveaxis(x, 1, 0), travel)  # [P, B, S / P, N / P, D]
  return jnp.moveaxis(found, 0, 2).reshape(batch, tokens // pieces, pieces * heads, dim)


def _exchange(x: Array, travel: Travel) -> Array:
  """The piece for this device of every device, of the pieces `[P, ..., D]` that each has."""
  sent = jax.lax.all_to_all(travel.pack(x), SEQ, split_axis=0, concat_axis=0, tiled=True)
  return travel.unpack(sent, x.dtype)


def island(
  function: Callable[..., PyTree], mesh: Mesh | None, inputs: PyTree, outputs: PyTree
) -> Callable[..., PyTree]:
  """The function on what each device has, without gradients.

  Args:
    function: of arrays.
    mesh: None = the function as it is.
    inputs: PartitionSpecs of its arguments, or prefixes of their trees.
    outputs: of its results.
  """
  if mesh is None:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def place_caches(caches: PyTree, mesh: Mesh) -> tuple[PyTree, PyTree]:
  """Shapes of caches, in tuples, with their placement.

  Returns:
    (shapes with shardings, PartitionSpecs).
  """
  specs = jax.tree.map(
    lambda cache: cache.specs(SEQ), caches, is_leaf=lambda x: not isinstance(x, tuple)
  )

  def placed(a: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(placed, caches, specs), specs
