"""Attention of clips whose tokens are split over devices: DeepSpeed Ulysses in the balanced layout.

A device owns whole blocks of a clip, context and target of each. For self-attention one all-to-all
turns tokens into heads, every device runs the plan over the whole clip for its share of the heads,
and a second one turns them back. Text belongs to the blocks, so attention to it stays local.

    [2 B, S / P, N, D]  --all-to-all-->  [2 B, S, N / P, D]  --attend-->  --all-to-all-->  as before

Source: spec/training.md section 5, spec/jax.md section 5.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.model.attention import Cross
from longlive_jax.model.ops import Attend, Dense, Plan
from longlive_jax.types import SAMPLES, SEQ, Array

ROWS = P(SAMPLES, SEQ)


def sequence_parallel(dense: Dense, mesh: Mesh) -> Attend:
  """The attention entry of clips that are split along "seq".

  Args:
    dense: attention on one device.
    mesh: with the axes "data", "fsdp" and "seq".

  Returns:
    See `Ops.attend`. Self-attention plans are those without a cache. "seq" divides the heads, the
    blocks, and the prompts of a sample unless there is one.

  Sharding: q, k, v rows over data and fsdp, tokens over seq; the result likewise.
  """
  ranks = mesh.shape[SEQ]

  def attend(
    q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan
  ) -> tuple[Array, Any]:
    del layer
    if cache is not None:
      raise ValueError("parallel.seq splits training clips, which have no cache")
    if isinstance(plan, Cross):
      return to_text(dense, mesh, ranks, plan)(q, k, v), None
    return among_tokens(dense, mesh, plan)(q, k, v, plan), None

  return attend


def among_tokens(dense: Dense, mesh: Mesh, plan: Plan) -> Any:
  """`(q, k, v, plan) -> [rows, S, N, D]` with two exchanges."""

  def island(q: Array, k: Array, v: Array, plan: Plan) -> Array:
    qkv = jnp.stack([q, k, v])
    q, k, v = jax.lax.all_to_all(qkv, SEQ, split_axis=3, concat_axis=2, tiled=True)
    out, _ = plan.attend(dense, q, k, v, None, 0)
    return jax.lax.all_to_all(out, SEQ, split_axis=1, concat_axis=2, tiled=True)

  # rotary tables: one for all samples, or one a sample
  specs = jax.tree.map(lambda a: P(SAMPLES) if a.shape[0] > 1 else P(), plan)
  return jax.shard_map(island, mesh=mesh, in_specs=(ROWS, ROWS, ROWS, specs), out_specs=ROWS)


def to_text(dense: Dense, mesh: Mesh, ranks: int, plan: Cross) -> Any:
  """`(q, k, v) -> [rows, S, N, D]`, each device with the prompts of its own blocks."""
  local = plan if plan.pieces == 1 else dataclasses.replace(plan, pieces=plan.pieces // ranks)
  prompts = P(SAMPLES) if plan.pieces == 1 else P((*SAMPLES, SEQ))

  def island(q: Array, k: Array, v: Array) -> Array:
    return local.attend(dense, q, k, v, None, 0)[0]

  return jax.shard_map(island, mesh=mesh, in_specs=(ROWS, prompts, prompts), out_specs=ROWS)
