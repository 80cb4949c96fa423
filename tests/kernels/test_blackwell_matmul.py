import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.kernels import blackwell_kernel, blackwell_matmul
from longlive_jax.quant.formats import swizzle
from longlive_jax.quant.nvfp4 import Spec, quantise, scale_free, unit_of
from tests.kernels.mosaic import lower

WIDTHS = [(3072, 14336), (14336, 3072)]


def shapes(m, n, k):
  """Arguments of the kernel."""
  s = jax.ShapeDtypeStruct
  x, w = (s((rows, k // 2), jnp.uint8) for rows in (m, n))
  tiles = (s((-(-rows // 128), k // 64, 32, 16), jnp.float8_e4m3fn) for rows in (m, n))
  return x, next(tiles), w, next(tiles), s((), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def operands(m, n, k):
  """Quantised x and w, and the arguments of the kernel made from them."""
  key = jax.random.key(0)
  x, w = (
    quantise(jax.random.normal(jax.random.fold_in(key, rows), (rows, k)), Spec("mse"))
    for rows in (m, n)
  )
  tiles = [blackwell_matmul.scale_tiles(q.scales) for q in (x, w)]
  return x, w, (x.codes, tiles[0], w.codes, tiles[1], unit_of(x) * unit_of(w))


def test_scale_tiles_are_those_of_the_tensor_core():
  scales = jnp.asarray(np.random.default_rng(0).uniform(0, 400, (256, 8)), jnp.float8_e4m3fn)
  tiles = blackwell_matmul.scale_tiles(scales)
  assert tiles.shape == (2, 2, 32, 16)
  np.testing.assert_array_equal(tiles.reshape(-1), swizzle(scales))
  for row, column in ((0, 0), (37, 2), (200, 7)):
    place = tiles[row // 128, column // 4, row % 32, row % 128 // 32 * 4 + column % 4]
    assert place == scales[row, column]


def reference(arguments):
  run = functools.partial(blackwell_matmul.block_scaled_reference, out_dtype=jnp.float32)
  return jax.jit(run)(*arguments)


def test_reference_is_the_product_of_the_scale_free_operands():
  x, w, arguments = operands(9, 128, 256)
  y = reference(arguments)
  exact = np.asarray(scale_free(x), float) @ np.asarray(scale_free(w), float).T
  np.testing.assert_allclose(y, exact * float(arguments[-1]), rtol=0, atol=1e-5)


def test_reference_is_scaled_matmul():
  x, w, arguments = operands(9, 128, 256)
  y = reference(arguments)
  plain = jax.nn.scaled_matmul(
    blackwell_matmul.as_fp4(x.codes)[None],
    blackwell_matmul.as_fp4(w.codes)[None],
    x.scales[None],
    w.scales[None],
    preferred_element_type=jnp.float32,
  )
  np.testing.assert_allclose(y, plain[0] * arguments[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [64, 512, 7040])
@pytest.mark.parametrize(("k", "n"), WIDTHS)
def test_lowers_for_blackwell(monkeypatch, m, k, n):
  text = lower(monkeypatch, blackwell_matmul.block_scaled_matmul, *shapes(m, n, k), arch=(10, 0))
  assert "mosaic_gpu" in text


def test_ragged_rows_and_float32_lower(monkeypatch):
  def wide(*arguments):
    return blackwell_matmul.block_scaled_matmul(*arguments, out_dtype=jnp.float32)

  lower(monkeypatch, wide, *shapes(141, 256, 512), arch=(10, 0))


def test_wrong_arguments_are_refused():
  x, x_scales, w, w_scales, unit = (jnp.zeros(s.shape, s.dtype) for s in shapes(8, 128, 256))
  with pytest.raises(ValueError, match="x has shape"):
    blackwell_matmul.block_scaled_matmul(x[:, :64], x_scales, w, w_scales, unit)
  with pytest.raises(ValueError, match="N=64 must be"):
    blackwell_matmul.block_scaled_matmul(x, x_scales, w[:64], w_scales, unit)
  with pytest.raises(ValueError, match="K=128 must be"):
    blackwell_matmul.block_scaled_matmul(x[:, :64], x_scales, w[:, :64], w_scales, unit)
  with pytest.raises(ValueError, match="bytes of shared memory"):
    blackwell_kernel.Tuning(stages=6)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 200, 512])
@pytest.mark.parametrize(("k", "n"), [*WIDTHS, (256, 128)])
def test_product_on_a_gpu(m, k, n):
  if jax.devices()[0].compute_capability.split(".")[0] != "10":
    pytest.skip("the GPU has no FP4 units of compute capability 10")
  arguments = operands(m, n, k)[2]
  y = blackwell_matmul.block_scaled_matmul(*arguments, out_dtype=jnp.float32)
  expected = blackwell_matmul.block_scaled_reference(*arguments, out_dtype=jnp.float32)
  size = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(y, expected, rtol=0, atol=2.0**-14 * float(size))
