"""Attention of clips whose tokens are split over devices: DeepSpeed Ulysses.

A device owns whole blocks of a clip, context and target of each (in the plain layout: twice as many
blocks, of one of both). For self-attention one all-to-all turns tokens into heads, every device
runs the plan over the whole clip for its share of the heads, and a second one turns them back. Text
belongs to the blocks, so attention to it stays local.

    [2 B, S / P, N, D]  --all-to-all-->  [2 B, S, N / P, D]  --attend-->  --all-to-all-->  as before

Source: spec/training.md section 5, spec/jax.md section 5.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.model.attention import Cross
from longlive_jax.model.ops import Attend, Dense, Plan
from longlive_jax.types import CLIP, HALF, ROWS, SAMPLES, SEQ, Array

TOKENS = P(ROWS, SEQ)


def sequence_parallel(dense: Dense, mesh: Mesh) -> Attend:
  """The attention entry of clips that are split along "half" and "seq".

  Args:
    dense: attention on one device.
    mesh: see `parallel.mesh`.

  Returns:
    See `Ops.attend`. Self-attention plans are those without a cache. The devices of a clip divide
    the heads; "seq" divides the blocks, and the prompts of a sample unless there is one.

  Sharding: q, k, v rows over data, fsdp and half, tokens over seq; the result likewise.
  """

  def attend(
    q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan
  ) -> tuple[Array, Any]:
    del layer
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
    qkv = jnp.stack([q, k, v])
    qkv = jax.lax.all_to_all(qkv, CLIP, split_axis=3, concat_axis=2, tiled=True)
    # plain: the one row holds all contexts, then all targets
    q, k, v = qkv.reshape(3, half * q.shape[0], -1, *qkv.shape[3:])
    out, _ = plan.attend(dense, q, k, v, None, 0)
    out = out.reshape(out.shape[0] // half, -1, *out.shape[2:])
    return jax.lax.all_to_all(out, CLIP, split_axis=1, concat_axis=2, tiled=True)

  # rotary tables: one for all samples, or one a sample
  specs = jax.tree.map(lambda a: P(SAMPLES) if a.shape[0] > 1 else P(), plan)
  return jax.shard_map(island, mesh=mesh, in_specs=(TOKENS,) * 3 + (specs,), out_specs=TOKENS)


def to_text(dense: Dense, mesh: Mesh, plan: Cross) -> Any:
  """`(q, k, v) -> [rows, S, N, D]`, each device with the prompts of its own blocks."""
  pieces = plan.pieces if plan.pieces == 1 else plan.pieces // mesh.shape[SEQ]
  local = Cross(pieces, plan.halves // mesh.shape[HALF])
  prompts = P(SAMPLES) if plan.pieces == 1 else P((*SAMPLES, SEQ))

  def island(q: Array, k: Array, v: Array) -> Array:
    return local.attend(dense, q, k, v, None, 0)[0]

  return jax.shard_map(island, mesh=mesh, in_specs=(TOKENS, prompts, prompts), out_specs=TOKENS)
