"""The kernel behind `blackwell_matmul`: two warpgroups that meet at barriers.

    driver  one warp starts TMA into a ring of stages, another copies a stage's scales to tensor
            memory and starts its product
    writer  tensor memory -> times unit -> TMA store

The grid is persistent and tensor memory holds two accumulators, so that the next tile is
multiplied while the last one is written.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.checks import check_at_least, check_divides

BLOCK = 16  # elements that share a scale
ROWS = 128  # of a scale tile, and of a product
COLUMNS = 4  # of a scale tile
TILE_K = 256  # elements of 4 bits in a swizzled row
QUARTER = 32
_SHARED_BYTES = 227 * 1024
_TENSOR_COLUMNS = 512  # of tensor memory, 32 bits each
_SWIZZLE = 128  # bytes
_TMA_WARP, _MMA_WARP = 0, 1


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    tile_n: columns of a tile of the result, 128 or less; its rows are 128.
    stages: depth of the ring.
    band: tiles of the weight that are finished for all rows of x before the next.
    multiprocessors: of the GPU.
  """

  tile_n: int = 128
  stages: int = 5
  band: int = 8
  multiprocessors: int = 148

  def __post_init__(self) -> None:
    check_divides("tile_n", self.tile_n, "rows of a scale tile", ROWS)
    check_at_least("stages", self.stages, 2)
    if self.shared_bytes > _SHARED_BYTES:
      raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory, not 232448")
    if self.tensor_columns > _TENSOR_COLUMNS:
      raise ValueError(f"{self} needs {self.tensor_columns} columns of tensor memory, not 512")

  @property
  def shared_bytes(self) -> int:
    """Shared memory of a block, without its barriers."""
    stage = (ROWS + self.tile_n) * (TILE_K // 2 + TILE_K // BLOCK)
    return self.stages * stage + 2 * ROWS * _SWIZZLE

  @property
  def tensor_columns(self) -> int:
    """Columns of tensor memory: two accumulators, and the scales of a stage."""
    scales = TILE_K // BLOCK // COLUMNS * COLUMNS
    return 2 * self.tile_n + scales * (1 + self.tile_n // ROWS)


class _Stages(NamedTuple):
  """Shared and tensor memory, and barriers."""

  x: Any
  w: Any
  x_scales: Any
  w_scales: Any
  out: Any
  sums: Any
  x_factors: Any
  w_factors: Any
  full: Any
  free: Any
  summed: Any
  written: Any


def _swizzled(bits: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
  return plgpu.TilingTransform((8, _SWIZZLE * 8 // bits)), plgpu.SwizzleTransform(_SWIZZLE)


def _stages(t: Tuning, dtype: jnp.dtype) -> _Stages:
  f4, e4m3 = jnp.float4_e2m1fn, jnp.float8_e4m3fn
  scale_tile = TILE_K // BLOCK // COLUMNS, QUARTER, BLOCK
  layout = plgpu.TMEMLayout.SCALES_LAYOUT
  width = _SWIZZLE // dtype.itemsize

  def ordered(count: int) -> plgpu.Barrier:
    return plgpu.Barrier(num_barriers=count, orders_tensor_core=True)

  return _Stages(
    x=plgpu.SMEM((t.stages, ROWS, TILE_K), f4, transforms=_swizzled(4)),
    w=plgpu.SMEM((t.stages, t.tile_n, TILE_K), f4, transforms=_swizzled(4)),
    x_scales=plgpu.SMEM((t.stages, 1, *scale_tile), e4m3),
    w_scales=plgpu.SMEM((t.stages, t.tile_n // ROWS, *scale_tile), e4m3),
    out=plgpu.SMEM((2, ROWS, width), dtype, transforms=_swizzled(8 * dtype.itemsize)),
    sums=plgpu.TMEM((ROWS, 2 * t.tile_n), jnp.float32),
    x_factors=plgpu.TMEM((ROWS, TILE_K // BLOCK), e4m3, layout=layout),
    w_factors=plgpu.TMEM((t.tile_n, TILE_K // BLOCK), e4m3, layout=layout),
    full=plgpu.Barrier(num_arrivals=4, num_barriers=t.stages),
    free=ordered(t.stages),
    summed=ordered(2),
    written=ordered(2),
  )


def _fetch(t: Tuning, r: _Stages, sources: tuple[Any, ...], steps: int, at: tuple) -> None:
  """The TMA warp: the stages of one tile."""
  x, x_scales, w, w_scales = sources
  i, j, done = at

  def step(k: jax.Array, _: None) -> None:
    slot = lax.rem(done * steps + k, t.stages)

    @pl.when(done * steps + k >= t.stages)
    def _() -> None:
      plgpu.barrier_wait(r.free.at[slot])

    columns, tiles = pl.ds(k * TILE_K, TILE_K), TILE_K // BLOCK // COLUMNS
    full, scales = r.full.at[slot], pl.ds(k * tiles, tiles)
    row, column = pl.ds(i * ROWS, ROWS), pl.ds(j * t.tile_n, t.tile_n)
    per = t.tile_n // ROWS
    plgpu.copy_gmem_to_smem(x.at[row, columns], r.x.at[slot], full)
    plgpu.copy_gmem_to_smem(w.at[column, columns], r.w.at[slot], full)
    plgpu.copy_gmem_to_smem(x_scales.at[pl.ds(i, 1), scales], r.x_scales.at[slot], full)
    plgpu.copy_gmem_to_smem(w_scales.at[pl.ds(j * per, per), scales], r.w_scales.at[slot], full)

  lax.fori_loop(0, steps, step, None)


def _sum(t: Tuning, r: _Stages, steps: int, done: jax.Array) -> None:
  """The multiplying warp: the sums of one tile."""
  bank = lax.rem(done, 2)

  @pl.when(done > 1)
  def _() -> None:
    plgpu.barrier_wait(r.written.at[bank])

  def step(k: jax.Array, _: None) -> None:
    slot = lax.rem(done * steps + k, t.stages)
    plgpu.barrier_wait(r.full.at[slot])
    plgpu.async_copy_scales_to_tmem(r.x_scales.at[slot], r.x_factors)
    plgpu.async_copy_scales_to_tmem(r.w_scales.at[slot], r.w_factors)
    plgpu.tcgen05_mma(
      r.sums.at[:, pl.ds(bank * t.tile_n, t.tile_n)],
      r.x.at[slot],
      r.w.at[slot].T,
      r.free.at[slot],
      a_scale=r.x_factors,
      b_scale=r.w_factors,
      accumulate=k > 0,
    )

  lax.fori_loop(0, steps, step, None)
  plgpu.tcgen05_commit_arrive(r.summed.at[bank])


def _write(t: Tuning, r: _Stages, unit: Any, out: Any, at: tuple) -> None:
  """The writer: one tile."""
  i, j, done = at
  bank = lax.rem(done, 2)
  width = r.out.shape[-1]
  plgpu.barrier_wait(r.summed.at[bank])
  for count, begin in enumerate(range(0, t.tile_n, width)):
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    sums = plgpu.async_load_tmem(r.sums.at[:, pl.ds(bank * t.tile_n + begin, width)])
    r.out[count % 2] = (sums * unit[0]).astype(out.dtype)
    plgpu.commit_smem()
    place = pl.ds(i * ROWS, ROWS), pl.ds(j * t.tile_n + begin, width)
    plgpu.copy_smem_to_gmem(r.out.at[count % 2], out.at[place])
  plgpu.wait_load_tmem()
  plgpu.barrier_arrive(r.written.at[bank])


@functools.lru_cache
def kernel_of(t: Tuning, m: int, n: int, k: int, dtype: jnp.dtype) -> Callable[..., jax.Array]:
  """The kernel for one problem."""
  steps, tiles = k // TILE_K, (pl.cdiv(m, ROWS), n // t.tile_n)

  def block_scaled_matmul(
    x: Any, x_scales: Any, w: Any, w_scales: Any, unit: Any, out: Any, *memory: Any
  ) -> None:
    r, group = _Stages(*memory), lax.axis_index("group")

    @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
    def _(info: plgpu.NDLoopInfo) -> None:
      i, j = plgpu.planar_snake(info.index[0], tiles, 1, t.band)
      done = jnp.asarray(info.local_index)

      @pl.when(group == 0)
      def _() -> None:
        @plgpu.warp_map
        def _(warp: jax.Array) -> None:
          sources = (x, x_scales, w, w_scales)
          pl.when(warp == _TMA_WARP)(lambda: _fetch(t, r, sources, steps, (i, j, done)))
          pl.when(warp == _MMA_WARP)(lambda: _sum(t, r, steps, done))

      pl.when(group == 1)(lambda: _write(t, r, unit, out, (i, j, done)))

    pl.when(group == 1)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))

  return plgpu.kernel(
    block_scaled_matmul,
    out_type=jax.ShapeDtypeStruct((m, n), dtype),
    grid=(min(t.multiprocessors, tiles[0] * tiles[1]),),
    grid_names=("sm",),
    num_threads=2,
    thread_name="group",
    scratch_types=tuple(_stages(t, dtype)),
  )
