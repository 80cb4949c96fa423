"""Operands that are quantised in pieces, and products over several axes of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant import operands
from longlive_jax.quant.matmul import nvfp4_recipe, quantised_product
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.operands import operand, pack, pieces_of

X = jax.random.normal(jax.random.key(0), (2, 48, 96), jnp.bfloat16)


@pytest.fixture
def in_pieces(monkeypatch) -> None:
  """Pieces of two blocks."""
  monkeypatch.setattr(operands, "PIECE", X.size // 3)


@pytest.mark.parametrize(
  ("shape", "pieces"), [((4, 48), 1), ((2**14, 2**13), 1), ((56320, 14336), 7), ((2**20, 3072), 24)]
)
def test_pieces_are_equal_and_of_whole_blocks(shape, pieces):
  assert pieces_of(shape) == pieces
  assert shape[-1] % (16 * pieces) == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
  ("spec", "flip"), [(Spec(), False), (Spec(), True), (Spec("static_6", hadamard=True), True)]
)
def test_pieces_give_the_numbers_of_the_whole(in_pieces, monkeypatch, spec, flip, packed):
  x = pack(X, Spec()) if packed else X
  assert pieces_of(x.shape) == 3
  pieces = jax.jit(lambda x: operand(x, spec, flip=flip))(x)
  monkeypatch.undo()
  whole = jax.jit(lambda x: operand(x, spec, flip=flip))(x)
  assert pieces.values.shape == ((2, 96, 48) if flip else (2, 48, 96))
  np.testing.assert_array_equal(pieces.values, whole.values)
  np.testing.assert_array_equal(pieces.unit, whole.unit)


def test_packing_in_pieces_gives_the_bytes_of_the_whole(in_pieces, monkeypatch):
  pieces = jax.jit(lambda x: pack(x, Spec()))(X)
  monkeypatch.undo()
  whole = jax.jit(lambda x: pack(x, Spec()))(X)
  for ours, theirs in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def test_noise_in_pieces_has_no_bias(in_pieces):
  spec = Spec("static_4", stochastic=True)  # which clips nothing
  draw = jax.jit(lambda key: operand(X, spec, key).values * operand(X, spec, key).unit)
  drawn = np.stack([np.asarray(draw(jax.random.key(i)), np.float64) for i in range(64)])
  assert (drawn.std(0)[..., 64:] > 0).mean() > 0.5, "every piece draws"
  away = (drawn.mean(0) - np.asarray(X, np.float64)) / np.maximum(drawn.std(0) / 8, 1e-3)
  assert abs(away.mean()) < 0.1


def test_rows_along_several_axes_are_rows():
  """Whole blocks of 16 rows: the same products as of a matrix, and the same gradients."""
  recipe = nvfp4_recipe(stochastic=False)
  w = jax.random.normal(jax.random.key(1), (96, 32))
  g = jax.random.normal(jax.random.key(2), (2, 48, 32))

  @jax.jit
  def run(x: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, w: quantised_product(recipe, x, w), x, w)
    return y, *pull(g)

  apart, joined = run(X, g), run(X.reshape(96, 96), g.reshape(96, 32))
  for ours, theirs in zip(apart, joined, strict=True):
    a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-2, atol=1e-4)
