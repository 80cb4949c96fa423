"""Reading the packed cache in one launch: interpreted and lowered, against the plain reading."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.kernels.dequantise import Tuning, dequantise_slots, values
from longlive_jax.kernels.timing import alternated_seconds
from longlive_jax.quant.formats import e2m1_decode
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise, unit_of
from longlive_jax.quant.qtensor import QTensor
from tests.kernels.mosaic import interpreted, lower

LAYERS, BATCH, SLOTS, ROWS, DIM = 3, 2, 3, 40, 256  # 640 blocks a slot: five steps


def filled(shape: tuple[int, ...], rule: str = "mse") -> QTensor:
  """A packed cache; slots differ in size, and the first one of all is zero."""
  x = jax.random.normal(jax.random.key(0), shape)
  scale = 10.0 ** jnp.arange(np.prod(shape[:3]), dtype=jnp.float32).reshape(*shape[:3], 1, 1)
  x = jnp.where(jnp.arange(shape[0]).reshape(-1, 1, 1, 1, 1) == 0, 0.0, x * scale * 1e-9)
  return jax.jit(quantise, static_argnums=1)(x.astype(jnp.bfloat16), Spec(rule, lead=3))


CACHE = filled((LAYERS, BATCH, SLOTS, ROWS, DIM))


@functools.partial(jax.jit, static_argnums=(1, 2))
def plain(q: QTensor, layer: int, level: int) -> jax.Array:
  return dequantise(
    QTensor(*(a[layer, :, :level] for a in (q.codes, q.scales, q.amax)), q.rule), jnp.bfloat16
  )


def test_every_code():
  codes = jnp.arange(16, dtype=jnp.int32)
  ours, theirs = np.asarray(values(codes)), np.asarray(e2m1_decode(codes.astype(jnp.uint8)))
  np.testing.assert_array_equal(ours.view(np.uint32), theirs.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize(("layer", "level", "steps"), [(0, 1, 1), (1, 2, 2), (2, 3, 4), (2, 3, 9)])
def test_slots_are_those_of_the_plain_reading(layer, level, steps):
  """5 steps a slot: tiles that fit, that overlap, and one that is all of it."""
  read = jax.jit(dequantise_slots, static_argnums=(4, 5))
  with interpreted():
    ours = read(CACHE.codes, CACHE.scales, unit_of(CACHE), np.int32(layer), level, Tuning(steps))
  theirs = plain(CACHE, layer, level)
  assert ours.shape == theirs.shape and ours.dtype == jnp.bfloat16
  bits = [np.asarray(a).view(np.uint16) for a in (ours, theirs)]
  np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"level": 4}, "level=4 must be 1 to 3"),
    ({"level": 0}, "level=0 must be 1 to 3"),
    ({"scales": CACHE.scales[..., :1]}, "scales"),
    ({"units": CACHE.amax[0]}, "units"),
    ({"codes": CACHE.codes[..., :3, :], "scales": CACHE.scales[..., :3, :]}, r"\[3, 256\]"),
  ],
)
def test_what_it_refuses(change, said):
  given = {"codes": CACHE.codes, "scales": CACHE.scales, "units": CACHE.amax, "level": 2}
  with pytest.raises(ValueError, match=said):
    dequantise_slots(layer=jnp.int32(0), **{**given, **change})


REAL = 30, 1, 4, 7040 * 24, 128  # 5B: a window of 32 latents


def shapes(size: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
  *lead, dim = size
  return [
    jax.ShapeDtypeStruct((*lead, dim // 2), jnp.uint8),
    jax.ShapeDtypeStruct((*lead, dim // 16), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct(tuple(lead[:3]), jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
  ]


@pytest.mark.parametrize("size", [REAL, (8, 2, 4, 7680, 48)], ids=str)
def test_lowers_for_a_gpu(monkeypatch, size):
  text = lower(monkeypatch, lambda *a: dequantise_slots(*a, level=3), *shapes(size))
  assert text.count("@mosaic_gpu") == 1, "one kernel for all slots"
  assert "stablehlo.slice" not in text and "dynamic_slice" not in text, (
    "nothing is copied out of the cache first"
  )


@pytest.mark.gpu
def test_on_a_gpu():
  q = filled((2, *REAL[1:]))
  read = jax.jit(lambda q, layer: dequantise_slots(q.codes, q.scales, unit_of(q), layer, 4))
  theirs = jax.jit(lambda q: plain(q, 1, 4))
  assert jnp.array_equal(read(q, 1), theirs(q))
  seconds = alternated_seconds({"kernel": lambda q: read(q, 1), "plain": theirs}, q)
  medians = {name: float(np.median(each)) for name, each in seconds.items()}
  assert medians["kernel"] < medians["plain"], medians
