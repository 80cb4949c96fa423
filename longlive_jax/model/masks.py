"""Dense masks of the block attentions: the reference that the maskless plans are tested against.

No network uses a mask, see `model/attention.py`. `mask[q, k]` is True where query q sees key k:

    context q, context k   block(k) <= block(q)
    context q, target k    never
    target q, context k    block(k) < block(q)
    target q, target k     block(k) = block(q)

Source: spec/models.md sections 3.1 to 3.3 and 3.5.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from longlive_jax.checks import check_divides
from longlive_jax.model.attention import Borders
from longlive_jax.model.ops import Dense
from longlive_jax.model.rope import Rope, rotate
from longlive_jax.types import Array, ArrayLike


def block_of(borders: Borders) -> np.ndarray:
  """Block index `[S]` of every token between the borders."""
  return np.repeat(np.arange(len(borders) - 1), np.diff(borders))


def block_causal_mask(borders: Borders) -> np.ndarray:
  """Bool `[S, S]`: a token sees its own block and all earlier ones."""
  block = block_of(borders)
  return block[None] <= block[:, None]


def teacher_forcing_mask(borders: Borders) -> np.ndarray:
  """Bool `[2 S, 2 S]` of tokens ordered [context | target]."""
  block = block_of(borders)
  context = block[None] <= block[:, None]
  earlier, same = block[None] < block[:, None], block[None] == block[:, None]
  return np.block([[context, np.zeros_like(context)], [earlier, same]])


def interleaved_order(tokens: int, ranks: int) -> np.ndarray:
  """Order `[rank 0 context, rank 0 target, rank 1 context, ...]` of a doubled sequence.

  Args:
    tokens: S, tokens of one half.
    ranks: shards, each with S / ranks tokens of both halves.

  Returns:
    int `[2 S]`: index into [context | target] of each token in the interleaved order.

  Raises:
    ValueError: the ranks do not divide the tokens.
  """
  check_divides("tokens", tokens, "parallel.seq", ranks)
  return np.arange(2 * tokens).reshape(2, ranks, -1).transpose(1, 0, 2).reshape(-1)


def interleaved_mask(borders: Borders, ranks: int) -> np.ndarray:
  """`teacher_forcing_mask` of tokens in `interleaved_order`."""
  order = interleaved_order(borders[-1], ranks)
  return teacher_forcing_mask(borders)[order][:, order]


def masked_attention(q: Array, k: Array, v: Array, mask: ArrayLike) -> Array:
  """Softmax attention `[B, S, N, D]` under a bool mask `[S, S_k]`, in float32."""
  logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
  logits = jnp.where(jnp.asarray(mask), logits * (q.shape[-1] ** -0.5), -jnp.inf)
  weights = jax.nn.softmax(logits, -1).astype(v.dtype)
  out = jnp.einsum("bnqk,bknd->bqnd", weights, v, preferred_element_type=jnp.float32)
  return out.astype(q.dtype)


@functools.partial(register_dataclass, data_fields=["rope", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Masked:
  """The reference plan: one masked call over the whole sequence.

  Attributes:
    rope: of the tokens of a row.
    mask: bool `[S, S]`; or `[2 S, 2 S]` where rows are (context, target) pairs.
  """

  rope: Rope
  mask: ArrayLike

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]:

    def joined(a: Array) -> Array:
      return a.reshape(-1, self.mask.shape[0], *a.shape[2:])

    q, k = rotate(q, self.rope), rotate(k, self.rope)
    return masked_attention(joined(q), joined(k), joined(v), self.mask).reshape(q.shape), cache
