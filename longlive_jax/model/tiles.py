"""Arrays computed in strips of rows, one after the other, so that what is between exists for one
strip only.

Exact: a strip reads the rows beside it, so the numbers are those of the whole.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.model.conv import HISTORY, CausalConv, ChannelNorm
from longlive_jax.model.ops import row_major
from longlive_jax.types import Array

ROWS = 2  # axis


def _read(x: Array, start: Array, count: int) -> Array:
  # else the layout that a convolution wants in the loop becomes that of whole arrays
  return row_major(lax.dynamic_slice_in_dim(x, start, count, ROWS))


@dataclasses.dataclass(frozen=True)
class Strip:
  """`height` rows from `start` on, of arrays `[B, T, H, W, C]`."""

  start: Array
  height: int

  def rows(self, x: Array) -> Array:
    """Its rows of x: `[B, T, height, W, C]`."""
    return _read(x, self.start, self.height)

  def bordered(self, x: Array, above: Array | None = None) -> Array:
    """Its rows, one above and one below, zeros outside x: `[B, T, 1 + height + 1, W, C]`.

    `above`, where given, is the row above.
    """
    end = self.start + self.height
    if above is None:
      above = _read(x, jnp.maximum(self.start - 1, 0), 1)
      above = jnp.where(self.start > 0, above, jnp.zeros_like(above))
    below = _read(x, end, 1)  # at the end that is the last row once more
    below = jnp.where(end < x.shape[ROWS], below, jnp.zeros_like(below))
    return jnp.concatenate([above, self.rows(x), below], ROWS)

  def write(self, x: Array, rows: Array) -> Array:
    """x with other rows in place of its own."""
    return lax.dynamic_update_slice_in_dim(x, row_major(rows), self.start, ROWS)


def by_strips[S](
  compute: Callable[[Strip, S], tuple[Array, S]], x: Array, tiles: int, carry: S
) -> tuple[Array, S]:
  """The results `[B, T, h, W, C]` of `compute` for all strips of x, joined along their rows.

  Args:
    compute: what to do for one strip; h is the same for all.
    x: `[B, T, H, W, C]`, of the dtype of the results.
    tiles: number of strips, a divisor of H.
    carry: what `compute` hands on to the next strip.

  Returns:
    (`[B, T, tiles h, W, C]`, what the last strip hands on).
  """
  height = x.shape[ROWS] // tiles

  def step(i: Array, state: tuple[Array, S]) -> tuple[Array, S]:
    done, carry = state
    part, carry = compute(Strip(i * height, height), carry)
    return Strip(i * part.shape[ROWS], part.shape[ROWS]).write(done, part), carry

  first = Strip(jnp.int32(0), height)
  batch, frames, rows, *rest = jax.eval_shape(lambda c: compute(first, c)[0], carry).shape
  # All of it is overwritten. Were it zeros, XLA would make those of all loops at once.
  done = jnp.broadcast_to(x[:1, :1, :1, :1, :1], (batch, frames, tiles * rows, *rest))
  return lax.fori_loop(0, tiles, step, (done, carry))


def convolved(
  norm: ChannelNorm,
  conv: CausalConv,
  x: Array,
  state: Array | None,
  tiles: int,
  skip: Callable[[Strip | None], Array] | None = None,
) -> tuple[Array, Array]:
  """`skip + conv(silu(norm(x)))` and the next state, in strips after the start.

  Args:
    norm, conv: of the sum.
    x: `[B, T, H, W, C]`.
    state: of `conv`.
    tiles: number of strips.
    skip: gives its rows of a strip, or all for None.
  """

  def active(x: Array) -> Array:
    return jax.nn.silu(norm(x))

  if tiles == 1 or state is None:
    y, state = conv(active(x), state)
    return y if skip is None else skip(None) + y, state

  # The state is replaced in place: `above` is the row of the old one that the strip before had.
  def compute(strip: Strip, carry: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
    state, above = carry
    frames = jnp.concatenate([strip.bordered(state, above), active(strip.bordered(x))], 1)
    y = conv.inside(frames)
    state = strip.write(state, frames[:, -HISTORY:, 1:-1])
    return y if skip is None else skip(strip) + y, (state, frames[:, :HISTORY, -2:-1])

  y, (state, _) = by_strips(compute, x, tiles, (state, jnp.zeros_like(state[:, :, :1])))
  return y, state
