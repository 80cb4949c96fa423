"""Attention of clips whose tokens are split over devices: DeepSpeed Ulysses.

A device owns whole blocks of a clip, context and target of each (in the plain layout: twice as many
blocks, of one of both). For self-attention one all-to-all turns tokens into heads, every device
runs the plan over the whole clip for its share of the heads, and a second one turns them back. Text
belongs to the blocks, so attention to it stays local.

    [2 B, S / P, N, D]  --all-to-all-->  [2 B, S, N / P, D]  --attend-->  --all-to-all-->  as before

In the rollout of distillation a device owns some latents of each block, and of what is kept of
earlier blocks its share of the heads, which never moves.

Source: spec/training.md section 5, spec/jax.md section 5.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.model.attention import Cross
from longlive_jax.model.grown import BlockKV, Grown
from longlive_jax.model.ops import Attend, Dense, Plan
from longlive_jax.types import CLIP, HALF, ROWS, SAMPLES, SEQ, Array

TOKENS = P(ROWS, SEQ)
KEPT = P(SAMPLES, None, CLIP)  # keys and values [B, S, N, D] of earlier blocks


def sequence_parallel(dense: Dense, mesh: Mesh) -> Attend:
  """The attention entry of clips that are split along "half" and "seq".

  Args:
    dense: attention on one device.
    mesh: see `parallel.mesh`.

  Returns:
    See `Ops.attend`. Self-attention plans are those without a cache, and `Grown`. The devices of a
    clip divide the heads; "seq" divides the blocks, and the prompts of a sample unless there is
    one.

  Sharding: q, k, v rows over data, fsdp and half, tokens over seq; the result likewise. What is
    kept of earlier blocks, heads over half and seq.
  """

  def attend(
    q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan
  ) -> tuple[Array, Any]:
    del layer
    if isinstance(plan, Grown):
      return to_earlier(dense, mesh, plan)(q, k, v, cache, plan)
    if cache is not None:
      raise ValueError("parallel.seq splits training clips, which have no cache")
    if isinstance(plan, Cross):
      return to_text(dense, mesh, plan)(q, k, v), None
    return among_tokens(dense, mesh, plan)(q, k, v, plan), None

  return attend


def among_tokens(dense: Dense, mesh: Mesh, plan: Plan) -> Any:
  """`(q, k, v, plan) -> [rows, S, N, D]` with two exchanges."""
  half = mesh.shape[HALF]

  def island(q: Array, k: Array, v: Array, plan: Plan) -> Array:
    qkv = to_heads(q, k, v)
    # plain: the one row holds all contexts, then all targets
    q, k, v = qkv.reshape(3, half * q.shape[0], -1, *qkv.shape[3:])
    out, _ = plan.attend(dense, q, k, v, None, 0)
    return to_tokens(out.reshape(out.shape[0] // half, -1, *out.shape[2:]))

  ins = (TOKENS,) * 3 + (places_of(plan),)
  return jax.shard_map(island, mesh=mesh, in_specs=ins, out_specs=TOKENS)


def to_earlier(dense: Dense, mesh: Mesh, plan: Grown) -> Any:
  """`(q, k, v, earlier blocks, plan) -> ([B, S, N, D], this block)` with two exchanges."""

  def island(
    q: Array, k: Array, v: Array, kept: tuple[BlockKV, ...], plan: Grown
  ) -> tuple[Array, BlockKV]:
    q, k, v = to_heads(q, k, v)
    out, own = plan.attend(dense, q, k, v, kept, 0)
    return to_tokens(out), own

  ins = (TOKENS,) * 3 + (KEPT, places_of(plan))
  return jax.shard_map(island, mesh=mesh, in_specs=ins, out_specs=(TOKENS, KEPT))


def to_heads(q: Array, k: Array, v: Array) -> Array:
  """`[3, B, S, N / P, D]` of q, k and v `[B, S / P, N, D]`, in one exchange."""
  qkv = jnp.stack([q, k, v])
  return jax.lax.all_to_all(qkv, CLIP, split_axis=3, concat_axis=2, tiled=True)


def to_tokens(out: Array) -> Array:
  """`[B, S / P, N, D]` of `[B, S, N / P, D]`."""
  return jax.lax.all_to_all(out, CLIP, split_axis=1, concat_axis=2, tiled=True)


def places_of(plan: Plan) -> Any:
  """Where the arrays of a plan are: one for all samples, or one a sample."""
  return jax.tree.map(lambda a: P(SAMPLES) if a.shape[0] > 1 else P(), plan)


def to_text(dense: Dense, mesh: Mesh, plan: Cross) -> Any:
  """`(q, k, v) -> [rows, S, N, D]`, each device with the prompts of its own blocks."""
  pieces = plan.pieces if plan.pieces == 1 else plan.pieces // mesh.shape[SEQ]
  local = Cross(pieces, plan.halves // mesh.shape[HALF])
  prompts = P(SAMPLES) if plan.pieces == 1 else P(SAMPLES, SEQ)

  def island(q: Array, k: Array, v: Array) -> Array:
    k, v = (a.reshape(-1, *a.shape[2:]) for a in (k, v))
    return local.attend(dense, q, k, v, None, 0)[0]

  islands = jax.shard_map(island, mesh=mesh, in_specs=(TOKENS, prompts, prompts), out_specs=TOKENS)

  def run(q: Array, k: Array, v: Array) -> Array:
    # a device may have several samples, and of each the prompts of its own blocks
    return islands(q, *(a.reshape(-1, plan.pieces, *a.shape[1:]) for a in (k, v)))

  return run
