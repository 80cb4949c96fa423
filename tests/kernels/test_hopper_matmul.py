import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.kernels import hopper_layout, hopper_matmul, hopper_tuning
from longlive_jax.quant.formats import unpack
from longlive_jax.quant.nvfp4 import Spec, quantise, scale_free
from tests.kernels.mosaic import interpreted, lower

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
TINY = hopper_tuning.Tuning(tile_m=128, packed_stages=2, x_stages=2, subnormals=False)
WIDTHS = [(3072, 14336), (14336, 3072)]


repack = jax.jit(hopper_layout.repack)


def random_weight(seed, n, k):
  """Codes 0..15 `[N, K]`, scales `[N, K / 16]` of many magnitudes, and float64 `q * s`."""
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 16, (n, k), np.uint8)
  magnitude = np.exp2(rng.uniform(-9, 8.5, (n, k // 16)))
  scales = magnitude.astype(jnp.float8_e4m3fn)
  return codes, scales, (E2M1[codes] * np.repeat(scales.astype(np.float32), 16, 1)).astype(float)


def tiled(codes, scales):
  """What the kernel takes, made from codes one a byte."""
  return repack(codes[:, ::2] | codes[:, 1::2] << 4, scales)


def test_words_hold_each_code_where_the_module_says():
  codes, scales, _ = random_weight(0, 3, 128)
  words, moved = tiled(codes, scales)
  words, moved = np.asarray(words).view(np.uint16), np.asarray(moved)  # the even column low
  for row, column in np.ndindex(3, 128):
    tile, block, place = column // 64, column % 64 // 16, column % 16
    word = int(words[tile, row, place])
    sign = word >> (15, 12, 14, 13)[block] & 1
    magnitude = word >> (6, 3, 0, 9)[block] & 7
    assert sign << 3 | magnitude == codes[row, column]
    assert moved[tile, block, row] == scales[row, column // 16]


def test_unrepack_is_the_inverse_for_stacked_weights():
  rng = np.random.default_rng(1)
  codes = jnp.asarray(rng.integers(0, 256, (2, 4, 96), np.uint8))
  scales = jnp.asarray(rng.uniform(0, 448, (2, 4, 12)), jnp.float8_e4m3fn)
  words, moved = repack(codes, scales)
  assert words.shape == (2, 3, 4, 8) and moved.shape == (2, 3, 4, 4)
  back = jax.jit(hopper_layout.unrepack)(words, moved)
  assert (back[0] == codes).all() and (back[1] == scales).all()


def test_expand_is_the_scale_free_weight():
  w = jax.random.normal(jax.random.key(0), (16, 128), jnp.float32)
  q = jax.jit(quantise, static_argnums=1)(w, Spec("mse"))
  words = repack(q.codes, q.scales)
  weight = jax.jit(hopper_layout.expand)(*words)
  np.testing.assert_array_equal(weight, jax.jit(scale_free)(q).astype(jnp.float32))
  assert unpack(q.codes).max() > 7


def product(*arguments, **options):
  return jax.jit(functools.partial(hopper_matmul.packed_matmul, **options))(*arguments)


def every_code_and_scale():
  """A weight whose row n has scale byte n, and all codes in each block; x picks its columns."""
  codes = np.tile(np.arange(16, dtype=np.uint8), (128, 4))
  scales = np.repeat(np.arange(128, dtype=np.uint8) % 127, 4).reshape(128, 4)
  scales = scales.view(jnp.float8_e4m3fn)
  expected = E2M1[codes] * np.repeat(scales.astype(np.float32), 16, 1)
  return jnp.eye(64, dtype=jnp.bfloat16), tiled(codes, scales), expected.T


def test_every_code_with_every_scale_is_exact():
  x, weight, expected = every_code_and_scale()
  tuning = dataclasses.replace(TINY, tile_m=64, multipliers=1)
  with interpreted():
    y = product(x, *weight, np.float32(1), out_dtype=jnp.float32, tuning=tuning)
  np.testing.assert_array_equal(y, expected)


CUTS = {
  "ragged, two tiles on one SM": (141, 128, 192, dict(multiprocessors=1)),
  "two tiles of the weight, deeper rings": (70, 256, 128, dict(x_stages=3, w_stages=3)),
  "uneven parts of K, two decoders": (
    38,
    256,
    320,
    dict(tile_m=64, multipliers=1, decoders=2, splits=2, x_stages=3, w_stages=4, multiprocessors=3),
  ),
}


@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS)
def test_product(case):
  m, n, k, changes = case
  codes, scales, w = random_weight(2, n, k)
  x = jax.random.normal(jax.random.key(3), (m, k), jnp.bfloat16)
  tuning = dataclasses.replace(TINY, **changes)
  with interpreted():
    y = product(x, *tiled(codes, scales), np.float32(0.37), out_dtype=jnp.float32, tuning=tuning)
  x = np.asarray(x, float)
  error = np.abs(np.asarray(y) - x @ w.T * np.float32(0.37)) / (np.abs(x) @ np.abs(w.T))
  assert y.shape == (m, n)
  assert error.max() < 2.0**-21


def test_reference_agrees_with_float64():
  codes, scales, w = random_weight(4, 128, 128)
  x = jax.random.normal(jax.random.key(5), (9, 128), jnp.bfloat16)
  arguments = (x, *tiled(codes, scales), jnp.float32(3))
  y = hopper_matmul.packed_matmul_reference(*arguments, out_dtype=jnp.float32)
  np.testing.assert_allclose(y, np.asarray(x, float) @ w.T * 3, rtol=1e-5, atol=1e-2)
  assert hopper_matmul.packed_matmul_reference(*arguments).dtype == jnp.bfloat16


def shapes(m, n, k):
  """Arguments of the kernel."""
  s = jax.ShapeDtypeStruct
  words, scales = s((k // 64, n, 8), jnp.int32), s((k // 64, 4, n), jnp.float8_e4m3fn)
  return s((m, k), jnp.bfloat16), words, scales, s((), jnp.float32)


@pytest.mark.parametrize("m", [64, 512, 7040])
@pytest.mark.parametrize(("k", "n"), WIDTHS)
def test_lowers_for_hopper(monkeypatch, m, k, n):
  text = lower(monkeypatch, hopper_matmul.packed_matmul, *shapes(m, n, k))
  assert "mosaic_gpu" in text


@pytest.mark.parametrize("name", hopper_tuning.TUNINGS)
def test_each_tuning_lowers(monkeypatch, name):
  def split(*arguments):
    tuning = dataclasses.replace(hopper_tuning.TUNINGS[name], splits=2)
    return hopper_matmul.packed_matmul(*arguments, tuning=tuning)

  lower(monkeypatch, split, *shapes(130, 512, 512))


def test_tuning_keeps_all_multiprocessors_busy():
  for m in (1, 64, 100, 512, 880, 7040):
    for k, n in WIDTHS:
      tuning = hopper_tuning.choose_tuning(m, n, k)
      tiles = -(-m // tuning.tile_m) * (n // hopper_tuning.TILE_N) * tuning.splits
      assert tiles / (-(-tiles // 132) * 132) > 0.8, (m, k, n, tuning)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(x_stages=8), "bytes of shared memory"),
    (dict(tile_m=64), "tile_m=64"),
    (dict(decoders=2), "registers of four lanes"),
    (dict(w_stages=3, decoders=2), "w_stages=3"),
    (dict(x_stages=1), "x_stages=1"),
  ],
)
def test_tuning_that_cannot_run_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    hopper_tuning.Tuning(**changes)


def test_wrong_arguments_are_refused():
  x, words, scales, unit = (jnp.zeros(s.shape, s.dtype) for s in shapes(8, 128, 128))
  with pytest.raises(ValueError, match="x has shape"):
    hopper_matmul.packed_matmul(x[:, :64], words, scales, unit)
  with pytest.raises(ValueError, match="x is float32; they must be x bfloat16"):
    hopper_matmul.packed_matmul(x.astype(jnp.float32), words, scales, unit)
  with pytest.raises(ValueError, match="N=64 must be a positive multiple"):
    hopper_matmul.packed_matmul(x, words[:, :64], scales[..., :64], unit)
  with pytest.raises(ValueError, match="words has shape"):
    hopper_matmul.packed_matmul(x, words[0], scales, unit)
  with pytest.raises(ValueError, match=r"unit has shape \(1,\)"):
    hopper_matmul.packed_matmul(x, words, scales, unit[None])
  with pytest.raises(ValueError, match="unit is float;"):
    hopper_matmul.packed_matmul(x, words, scales, 1.0)
  with pytest.raises(ValueError, match="out_dtype='float16' must be one of"):
    hopper_matmul.packed_matmul(x, words, scales, unit, out_dtype=jnp.float16)
  with pytest.raises(ValueError, match="codes is int32"):
    hopper_layout.repack(words[0], scales[0])
  with pytest.raises(ValueError, match="columns=96 must be"):
    hopper_layout.repack(jnp.zeros((1, 48), jnp.uint8), jnp.zeros((1, 6), jnp.float8_e4m3fn))


@pytest.mark.gpu
def test_every_code_with_every_scale_is_exact_on_a_gpu():
  x, weight, expected = every_code_and_scale()
  y = hopper_matmul.packed_matmul(x, *weight, jnp.float32(1), out_dtype=jnp.float32)
  np.testing.assert_array_equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 200, 512, 7040])
@pytest.mark.parametrize(("k", "n"), WIDTHS)
@pytest.mark.parametrize("name", [None, *hopper_tuning.TUNINGS])
def test_product_on_a_gpu(name, m, k, n):
  codes, scales, _ = random_weight(6, n, k)
  x = jax.random.normal(jax.random.key(7), (m, k), jnp.bfloat16)
  arguments = (x, *tiled(codes, scales), jnp.float32(1e-3))
  tuning = hopper_tuning.TUNINGS[name] if name else None
  y = hopper_matmul.packed_matmul(*arguments, out_dtype=jnp.float32, tuning=tuning)
  expected = hopper_matmul.packed_matmul_reference(*arguments, out_dtype=jnp.float32)
  size = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(y, expected, rtol=0, atol=2.0**-14 * float(size))
