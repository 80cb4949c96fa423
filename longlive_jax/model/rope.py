"""3-D rotary position embedding without a length limit.

A head of D channels is D/2 complex pairs (2j, 2j+1). Time takes the first P_t = c - 2 (c // 3) of
the c = D/2 pairs, rows and columns c // 3 each; pair j of an axis with P pairs turns by
`position * theta^(-j / P)`. Temporal angles are computed on the host in float64 from absolute
positions and passed in as float32 cosines and sines, so any position is exact.

Source: spec/models.md section 2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.types import Array, ArrayLike


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cos", "sin"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotation of every token.

  Attributes:
    cos: `[B or 1, S, D/2]` float32.
    sin: the same shape.
  """

  cos: ArrayLike
  sin: ArrayLike


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
  """Pairs of the (time, row, column) axes; their sum is head_dim // 2."""
  pairs = head_dim // 2
  space = pairs // 3
  return pairs - 2 * space, space, space


def angles(positions: ArrayLike, pairs: int, theta: float) -> np.ndarray:
  """Angles `[..., pairs]` in float64 of `positions [...]` along an axis."""
  frequencies = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
  return np.asarray(positions, np.float64)[..., None] * frequencies


def temporal_positions(
  start: int, latents: int, offset: ArrayLike | float = 0.0, t_scale: float = 1.0
) -> np.ndarray:
  """Positions `(start + i + offset) * t_scale` of consecutive latents, float64.

  Args:
    start: index of the first latent in the video.
    latents: how many.
    offset: shot offset in latents: a scalar, `[F]`, or `[B, F]`.
    t_scale: multiplies position and offset.

  Returns:
    `[F]`, or `[B, F]` when the offset has two axes.
  """
  return (start + np.arange(latents, dtype=np.float64) + np.asarray(offset, np.float64)) * t_scale


def temporal_table(
  positions: ArrayLike, head_dim: int, theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines `[B, F, P_t]` float32 of temporal positions `[F]` or `[B, F]`."""
  turn = angles(np.atleast_2d(positions), axis_pairs(head_dim)[0], theta)
  return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


@functools.lru_cache(maxsize=32)
def spatial_table(
  rows: int, columns: int, head_dim: int, theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines `[rows * columns, P_h + P_w]` float32 of one latent's tokens."""
  _, row_pairs, column_pairs = axis_pairs(head_dim)
  shape = (rows, columns)
  down = np.broadcast_to(angles(np.arange(rows), row_pairs, theta)[:, None], (*shape, row_pairs))
  right = np.broadcast_to(angles(np.arange(columns), column_pairs, theta), (*shape, column_pairs))
  turn = np.concatenate([down, right], -1).reshape(rows * columns, -1)
  return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


def expand(temporal: tuple[ArrayLike, ArrayLike], spatial: tuple[np.ndarray, np.ndarray]) -> Rope:
  """Joins a temporal table `[B, F, P_t]` and a spatial one `[S_f, P_s]` to `[B, F * S_f, D/2]`."""

  def join(time: ArrayLike, space: np.ndarray) -> Array:
    batch, latents, pairs = time.shape
    shape = (batch, latents, space.shape[0])
    wide = jnp.broadcast_to(jnp.asarray(time)[:, :, None], (*shape, pairs))
    both = jnp.concatenate([wide, jnp.broadcast_to(space, (*shape, space.shape[1]))], -1)
    return both.reshape(batch, shape[1] * shape[2], -1)

  return Rope(join(temporal[0], spatial[0]), join(temporal[1], spatial[1]))


def video_rope(
  positions: ArrayLike, rows: int, columns: int, head_dim: int, theta: float = 10000.0
) -> Rope:
  """Rotation of all tokens of latents at temporal `positions [F]` or `[B, F]`."""
  return expand(
    temporal_table(positions, head_dim, theta), spatial_table(rows, columns, head_dim, theta)
  )


def rotate(x: Array, rope: Rope) -> Array:
  """Rotates queries or keys.

  Args:
    x: `[B, S, N, D]`.
    rope: tables of the same S tokens.

  Returns:
    Rotated x, same shape and dtype.

  Numerics: float32 arithmetic, one rounding at the end.
  """
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  cos, sin = (jnp.asarray(each)[:, :, None, :, None] for each in (rope.cos, rope.sin))
  # the other of each pair by reversal, which is fused where a concatenation would be a pass
  turned = pairs * cos + pairs[..., ::-1] * (sin * np.asarray([-1.0, 1.0], np.float32))
  return turned.reshape(x.shape).astype(x.dtype)
