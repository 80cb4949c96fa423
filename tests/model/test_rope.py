"""Rotary embedding against values of the specification and a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model.rope import (
  angles,
  axis_pairs,
  rotate,
  spatial_table,
  temporal_positions,
  video_rope,
)

HEAD = 128


def reference(x: np.ndarray, positions: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Rotates `[B, S, N, D]` token by token in complex128; positions `[F]`."""
  pairs = axis_pairs(x.shape[-1])
  tokens = [(t, i, j) for t in positions for i in range(rows) for j in range(columns)]
  turn = np.array(
    [
      np.concatenate([p * 10000.0 ** (-np.arange(n) / n) for p, n in zip(at, pairs, strict=True)])
      for at in tokens
    ]
  )
  wide = np.asarray(x, np.float64)
  turned = (wide[..., 0::2] + 1j * wide[..., 1::2]) * np.exp(1j * turn)[None, :, None]
  return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@pytest.mark.parametrize(
  ("head_dim", "pairs"), [(128, (22, 21, 21)), (32, (6, 5, 5)), (24, (4, 4, 4)), (16, (4, 2, 2))]
)
def test_axis_pairs(head_dim: int, pairs: tuple[int, int, int]):
  assert axis_pairs(head_dim) == pairs
  sixth = head_dim // 6
  assert pairs == ((head_dim - 4 * sixth) // 2, sixth, sixth)


def test_frequencies_have_the_recorded_values():
  time, space = angles(np.ones(1), 22, 1e4)[0], angles(np.ones(1), 21, 1e4)[0]
  expected = [1, 0.657933224657568, 0.432876128108306, 1.519911e-4]
  np.testing.assert_allclose(time[[0, 1, 2, 21]], expected, rtol=1e-6)
  expected = [1, 0.644946677103762, 0.415956216307185, 1.550516e-4]
  np.testing.assert_allclose(space[[0, 1, 2, 20]], expected, rtol=1e-6)


def test_pairs_turn_as_recorded():
  x = jnp.ones((1, 2 * 4, 1, HEAD))
  out = rotate(x, video_rope(np.array([26.0]), 2, 4, HEAD))[0, :, 0].reshape(2, 4, -1, 2)
  recorded = [
    (out[0, 0, 0], (-0.115639, 1.409478)),  # time 26, first pair
    (out[0, 0, 1], (0.813518, -1.156801)),  # time 26, second pair
    (out[1, 0, 22], (-0.301169, 1.381773)),  # row 1
    (out[0, 3, 43], (-1.131113, -0.848872)),  # column 3
  ]
  for ours, expected in recorded:
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("start", [0, 1020, 5000, 1_000_000])
def test_positions_have_no_limit(start: int):
  x = np.random.default_rng(0).standard_normal((1, 3 * 6, 2, HEAD)).astype(np.float32)
  positions = temporal_positions(start, 3)
  ours = rotate(jnp.asarray(x), video_rope(positions, 2, 3, HEAD))
  np.testing.assert_allclose(ours, reference(x, positions, 2, 3), atol=2e-6)


def test_logits_depend_on_distances_only_however_far():
  q, k = jax.random.normal(jax.random.key(1), (2, 1, 8, 1, HEAD))

  def logits(start: float) -> np.ndarray:
    rope = video_rope(temporal_positions(0, 2, start), 2, 2, HEAD)
    return np.einsum("bqnd,bknd->qk", rotate(q, rope), rotate(k, rope))

  np.testing.assert_allclose(logits(123_456.0), logits(0.0), atol=2e-5)


def test_offset_is_added_before_scaling():
  np.testing.assert_allclose(temporal_positions(5, 3, 8.0, 0.5), [6.5, 7.0, 7.5])
  np.testing.assert_allclose(temporal_positions(0, 3, np.array([0, 0, 8.0])), [0, 1, 10])
  both = temporal_positions(2, 2, np.array([[0.0, 8.0], [1.0, 1.0]]))
  np.testing.assert_allclose(both, [[2, 11], [3, 4]])


def test_positions_of_samples_are_their_own():
  positions = np.array([[0.0, 1.0], [8.0, 17.0]])
  both = video_rope(positions, 2, 2, 16)
  for row, own in enumerate(positions):
    one = video_rope(own, 2, 2, 16)
    np.testing.assert_array_equal(both.cos[row], one.cos[0])
    np.testing.assert_array_equal(both.sin[row], one.sin[0])


def test_tables_are_float32_and_rotation_keeps_dtype_and_length():
  rope = video_rope(np.arange(2.0), 2, 2, 16)
  assert rope.cos.dtype == rope.sin.dtype == jnp.float32
  assert spatial_table(2, 2, 16)[0].dtype == np.float32
  x = jax.random.normal(jax.random.key(2), (3, 8, 2, 16))
  assert rotate(x.astype(jnp.bfloat16), rope).dtype == jnp.bfloat16
  norms = [np.linalg.norm(a, axis=-1) for a in (rotate(x, rope), x)]
  np.testing.assert_allclose(*norms, rtol=1e-5)
