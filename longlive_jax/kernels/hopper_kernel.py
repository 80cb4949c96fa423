"""The kernel behind `hopper_matmul`: four kinds of warpgroup that meet at barriers.

    loader      TMA: tiles of x, words and scales              -> rings `x`, `words`, `scales`
    decoders    words and scales -> q * s in bfloat16, exact   -> ring `w`
    multipliers wgmma from shared memory, float32 sums; times unit; TMA store

Each runs ahead of the next by the depth of a ring in shared memory. The grid is persistent: an SM
walks over tiles of the result, and loader and decoders are already at the next tile while the
multipliers store the last one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.kernels.hopper_decode import decoded_tile, factor
from longlive_jax.kernels.hopper_layout import BLOCKS, TILE_K, WORDS
from longlive_jax.kernels.hopper_tuning import LOADER_REGISTERS, MMA_ROWS, SWIZZLE, TILE_N, Tuning


class _Part(NamedTuple):
  """A part of K of one tile: where it lies, and how many steps went before it on this SM."""

  done: jax.Array
  first: jax.Array
  count: jax.Array
  split: jax.Array
  row: jax.Array
  column: jax.Array


class _Rings(NamedTuple):
  """Shared memory, and for each ring the barriers that say full and free."""

  x: Any
  x_full: Any
  x_free: Any
  words: Any
  scales: Any
  packed_full: Any
  packed_free: Any
  w: Any
  w_full: Any
  w_free: Any
  out: Any


def _swizzled(dtype: jnp.dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
  columns = SWIZZLE // dtype.itemsize
  return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE)


def _rings(t: Tuning, dtype: jnp.dtype) -> _Rings:
  bf16 = jnp.dtype(jnp.bfloat16)

  def many(count: int, arrivals: int = 1) -> plgpu.Barrier:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

  return _Rings(
    x=plgpu.SMEM((t.x_stages, t.tile_m, TILE_K), bf16, transforms=_swizzled(bf16)),
    x_full=many(t.x_stages),
    x_free=many(t.x_stages, t.multipliers),
    words=plgpu.SMEM((t.packed_stages, TILE_N, WORDS), jnp.int32),
    scales=plgpu.SMEM((t.packed_stages, BLOCKS, TILE_N), jnp.float8_e4m3fn),
    packed_full=many(t.packed_stages, 2),
    packed_free=many(t.packed_stages),
    w=plgpu.SMEM((t.w_stages, TILE_N, TILE_K), bf16, transforms=_swizzled(bf16)),
    w_full=many(t.w_stages),
    w_free=many(t.w_stages, t.multipliers),
    out=plgpu.SMEM(
      (t.multipliers, 2, MMA_ROWS, SWIZZLE // dtype.itemsize), dtype, transforms=_swizzled(dtype)
    ),
  )


def _walk(t: Tuning, m: int, n: int, steps: int, body: Callable[[_Part], None]) -> jax.Array:
  """Runs `body` for each part that this SM has; returns the number of steps in all of them."""
  tiles = pl.cdiv(m, t.tile_m), n // TILE_N
  longest = pl.cdiv(steps, t.splits)

  @plgpu.nd_loop((t.splits, tiles[0] * tiles[1]), collective_axes="sm", init_carry=jnp.int32(0))
  def done(info: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
    split, tile = info.index
    i, j = plgpu.planar_snake(tile, tiles, 1, t.band)
    first = split * longest
    count = lax.clamp(0, steps - first, longest)
    body(_Part(carry, first, count, split, i * t.tile_m, j * TILE_N))
    return carry + count

  return done


def _take_registers(t: Tuning, count: int) -> None:
  """Each kind of warpgroup says its share, be it that of the launch: else ptxas mixes them up."""
  more = count > t.launch_registers
  plgpu.set_max_registers(count, action="increase" if more else "decrease")


def _wait_if(condition: jax.Array, barrier: Any) -> None:
  @pl.when(condition)
  def _() -> None:
    plgpu.barrier_wait(barrier)


def _load(t: Tuning, r: _Rings, x: Any, words: Any, scales: Any, walk: Callable) -> None:
  """The loader: fills the rings of x and of the packed weight as they become free."""
  _take_registers(t, LOADER_REGISTERS)

  def body(part: _Part) -> None:
    @pl.loop(0, part.count)
    def _(i: jax.Array) -> None:
      at, step = part.done + i, part.first + i
      packed, slot = lax.rem(at, t.packed_stages), lax.rem(at, t.x_stages)
      rows = pl.ds(part.column, TILE_N)
      _wait_if(at >= t.packed_stages, r.packed_free.at[packed])
      full = r.packed_full.at[packed]
      plgpu.copy_gmem_to_smem(words.at[step, rows], r.words.at[packed], full)
      plgpu.copy_gmem_to_smem(scales.at[step, :, rows], r.scales.at[packed], full)
      _wait_if(at >= t.x_stages, r.x_free.at[slot])
      tile = x.at[pl.ds(part.row, t.tile_m), pl.ds(step * TILE_K, TILE_K)]
      plgpu.copy_gmem_to_smem(tile, r.x.at[slot], r.x_full.at[slot])

  done = walk(body)
  for stages, free in ((t.x_stages, r.x_free), (t.packed_stages, r.packed_free)):

    @pl.loop(lax.max(done - stages, 0), done)
    def _(i: jax.Array, stages: int = stages, free: Any = free) -> None:
      plgpu.barrier_wait(free.at[lax.rem(i, stages)])


def _decode(t: Tuning, r: _Rings, walk: Callable, me: jax.Array) -> None:
  """A decoder: every `decoders`-th step, from the packed rings to that of bfloat16 weights."""
  _take_registers(t, t.decoder_registers)

  def body(part: _Part) -> None:
    skip = lax.rem(me + t.decoders - lax.rem(part.done, t.decoders), t.decoders)

    @pl.loop(0, lax.div(part.count - skip + t.decoders - 1, t.decoders))
    def _(i: jax.Array) -> None:
      at = part.done + skip + i * t.decoders
      packed, slot = lax.rem(at, t.packed_stages), lax.rem(at, t.w_stages)
      plgpu.barrier_wait(r.packed_full.at[packed])
      tile = decoded_tile(r.words.at[packed], r.scales.at[packed], t.subnormals)
      _wait_if(at >= t.w_stages, r.w_free.at[slot])
      r.w[slot] = tile
      plgpu.commit_smem()  # of the words read as well: TMA overwrites them
      plgpu.barrier_arrive(r.packed_free.at[packed])
      plgpu.barrier_arrive(r.w_full.at[slot])

  done = walk(body)

  @pl.loop(lax.max(done - t.w_stages, 0), done)
  def _(i: jax.Array) -> None:
    _wait_if(lax.rem(i, t.decoders) == me, r.w_free.at[lax.rem(i, t.w_stages)])


def _multiply(t: Tuning, r: _Rings, unit: Any, out: Any, walk: Callable, me: jax.Array) -> None:
  """A multiplier: its part of each tile, and the store of it."""
  _take_registers(t, t.multiplier_registers)
  rows = t.tile_m // t.multipliers
  row = me * rows
  times = unit[0] * jnp.float32(factor(t.subnormals))

  def free(at: jax.Array) -> None:
    plgpu.barrier_arrive(r.x_free.at[lax.rem(at, t.x_stages)])
    plgpu.barrier_arrive(r.w_free.at[lax.rem(at, t.w_stages)])

  def store(part: _Part, y: jax.Array) -> None:
    width = r.out.shape[-1]
    places = [(a, b) for a in range(0, rows, MMA_ROWS) for b in range(0, TILE_N, width)]
    for count, (a, b) in enumerate(places):
      buffer = r.out.at[me, count % 2]
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      buffer[...] = y[a : a + MMA_ROWS, b : b + width]
      plgpu.commit_smem()
      at = pl.ds(part.row + row + a, MMA_ROWS), pl.ds(part.column + b, width)
      plgpu.copy_smem_to_gmem(buffer, out.at[part.split, *at])

  def body(part: _Part) -> None:
    def product(acc: Any) -> None:
      @pl.loop(0, part.count)
      def _(i: jax.Array) -> None:
        at = part.done + i
        x, w = lax.rem(at, t.x_stages), lax.rem(at, t.w_stages)
        plgpu.barrier_wait(r.x_full.at[x])
        plgpu.barrier_wait(r.w_full.at[w])
        left = r.x.at[x, pl.ds(row, rows)]
        plgpu.wgmma(acc, left, r.w.at[w].T)
        plgpu.wgmma_wait(1)

        @pl.when(i > 0)
        def _() -> None:
          free(at - 1)

      plgpu.wgmma_wait(0)
      free(part.done + part.count - 1)
      store(part, (acc[...] * times).astype(out.dtype))

    pl.run_scoped(product, plgpu.ACC((rows, TILE_N), jnp.float32))

  walk(body)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@functools.lru_cache
def kernel_of(t: Tuning, m: int, n: int, steps: int, dtype: jnp.dtype) -> Callable[..., jax.Array]:
  """The kernel for one problem; `[splits, M, N]`."""

  def nvfp4_matmul(x: Any, words: Any, scales: Any, unit: Any, out: Any, *rings: Any) -> None:
    r = _Rings(*rings)
    walk = functools.partial(_walk, t, m, n, steps)
    me = lax.axis_index("group")
    pl.when(me == t.groups - 1)(lambda: _load(t, r, x, words, scales, walk))
    pl.when(me < t.decoders)(lambda: _decode(t, r, walk, me))
    pl.when((me >= t.decoders) & (me < t.groups - 1))(
      lambda: _multiply(t, r, unit, out, walk, me - t.decoders)
    )

  tiles = t.splits * pl.cdiv(m, t.tile_m) * (n // TILE_N)
  return plgpu.kernel(
    nvfp4_matmul,
    out_type=jax.ShapeDtypeStruct((t.splits, m, n), dtype),
    grid=(min(t.multiprocessors, tiles),),
    grid_names=("sm",),
    num_threads=t.groups,
    thread_name="group",
    scratch_types=tuple(_rings(t, dtype)),
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
  )
