"""Reading the packed cache: all slots that a layer attends to become bfloat16 in one launch.

The layer and its slots are found by index, so that no slice of the packed cache is copied first. A
CUDA block takes `steps` times 128 NVFP4 blocks of one slot, one for each thread and step.

Memory alone bounds it: 0.5625 bytes read and 2 written an element. The keys of a window of 32
latents at 5B sizes, 86.5 M elements, are 222 MB: 52 us at 4.3 TB/s; 81 were measured on an H200.

Source: spec/nvfp4.md section 7, spec/jax.md section 3.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.checks import check_at_least, check_dtypes, check_shape
from longlive_jax.kernels.quantise_blocks import BLOCK, number, spread
from longlive_jax.types import Array

THREADS = 128
BYTES = BLOCK // 2  # of codes in a block
_VECTORS = plgpu.Layout.TCGEN05_TMEM_NATIVE(8)  # a row a thread, moved as vectors of 8
_COLUMNS = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)  # the same, element by element
_HALF = 126 << 23  # exponent of 1/2 in float32
_MAGNITUDE, _SIGN = 7, 8


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    steps: times 128 NVFP4 blocks that a CUDA block reads, one after the other.
  """

  steps: int = 2

  def __post_init__(self) -> None:
    check_at_least("steps", self.steps, 1)


DEFAULT = Tuning()


def values(codes: Array) -> Array:
  """E2M1 codes as int32, any shape, to float32; no subnormal number on the way.

  With the exponent raised by one, codes of magnitude 0 and 1 appear as 1/2 and 3/4: `2 v - 1` makes
  them 0 and 1/2, and is above v for all others.
  """
  v = number(((codes & _MAGNITUDE) << 22) + _HALF)
  magnitude = jax.lax.bitcast_convert_type(jnp.minimum(v, v + v - 1.0), jnp.int32)
  return number(magnitude | ((codes & _SIGN) << 28))


def _unpacked(packed: Array) -> Array:
  """uint8 `[T, 8]` -> int32 `[T, 16]`, the low nibble first."""
  wide = plgpu.layout_cast(packed.astype(jnp.int32), _COLUMNS)
  column = [jax.lax.slice(wide, (0, j), (THREADS, j + 1)) for j in range(BYTES)]
  nibbles = [nibble for pair in column for nibble in (pair & 15, pair >> 4)]
  return plgpu.layout_cast(jax.lax.concatenate(nibbles, 1), _VECTORS)


def _kernel(
  codes: Any, scales: Any, units: Any, layer: Any, out: Any, *, slots: int, level: int, steps: int
) -> None:
  """Refs: codes u8 [S, n, 8], scales e4m3 [S, n], units f32 [S], layer i32 [1] -> [B level, n, 16].

  S is layers times B times K. The last tile is moved back so that it ends with its slot.
  """
  total, row = codes.shape[1], jax.lax.axis_index("slot")
  samples = out.shape[0] // level
  place = (layer[0] * samples + row // level) * slots + row % level
  first = jnp.minimum(jax.lax.axis_index("tile") * steps * THREADS, total - steps * THREADS)
  unit = units[place]

  @pl.loop(0, steps)
  def _(i: Array) -> None:
    here = pl.ds(first + i * THREADS, THREADS)
    packed = plgpu.load(codes.at[place, here], layout=_VECTORS, optimized=False)
    scale = plgpu.load(scales.at[place, here], layout=_VECTORS.reduce(1), optimized=False)
    wide = spread(scale.astype(jnp.float16).astype(jnp.float32))
    out[row, here] = (values(_unpacked(packed)) * wide * unit).astype(jnp.bfloat16)


def fits(rows: int, columns: int) -> bool:
  """Whether the kernel can cut a slot `[rows, columns]` into whole steps."""
  return rows > 0 and columns % BLOCK == 0 and rows * columns % (BLOCK * THREADS) == 0


def dequantise_slots(
  codes: Array, scales: Array, units: Array, layer: Array, level: int, tuning: Tuning = DEFAULT
) -> Array:
  """The lowest `level` slots of a layer of a packed cache.

  Args:
    codes: uint8 `[layers, B, K, R, D / 2]`, low nibble = even column.
    scales: float8_e4m3fn `[layers, B, K, R, D / 16]`.
    units: float32 `[layers, B, K]`, amax / C.
    layer: int32 `[]`, 0 to layers - 1, which is not checked.
    level: 1 to K.
    tuning: how the work is cut.

  Returns:
    bfloat16 `[B, level, R, D]`: `q * s * unit`, each product rounded to float32.

  Raises:
    ValueError: shapes do not belong together, or 128 * 16 does not divide R * D, see `fits`.

  Sharding: a kernel call; inside `shard_map` each shard reads its own samples and heads.
  """
  check_dtypes(codes=(codes, "uint8"), scales=(scales, "float8_e4m3fn"), units=(units, "float32"))
  check_shape("codes", codes.shape, (None,) * 5)
  check_shape("layer", jnp.shape(layer), ())
  layers, batch, slots, rows, half = codes.shape
  check_shape("scales", scales.shape, (layers, batch, slots, rows, half // BYTES))
  check_shape("units", units.shape, (layers, batch, slots))
  if not 1 <= level <= slots:
    raise ValueError(f"level={level} must be 1 to {slots}, the slots of the cache")
  if not fits(rows, 2 * half):
    raise ValueError(f"a slot [{rows}, {2 * half}] is not a multiple of {BLOCK * THREADS} elements")
  blocks = rows * half // BYTES
  steps = min(tuning.steps, blocks // THREADS)
  run = plgpu.kernel(
    functools.partial(_kernel, slots=slots, level=level, steps=steps),
    out_type=jax.ShapeDtypeStruct((batch * level, blocks, BLOCK), jnp.bfloat16),
    grid=(batch * level, -(-blocks // (steps * THREADS))),
    grid_names=("slot", "tile"),
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # nothing is read back
  )
  out = run(
    codes.reshape(-1, blocks, BYTES),
    scales.reshape(-1, blocks),
    units.reshape(-1),
    jnp.asarray(layer, jnp.int32).reshape(1),
  )
  return out.reshape(batch, level, rows, 2 * half)
