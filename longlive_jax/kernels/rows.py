"""A Pallas kernel for Hopper that passes once over the rows of matrices.

    y[t, :] = f(x[t, :], scalars[t], columns[group of t, :])

f may reduce over a row, such as a norm or the largest element, where a compiler reads the row again
for each reduction. Blocks are persistent: each has some warpgroups, and each of these takes whole
rows. A row is copied in bulk to shared memory while the one before is worked on; `read` takes it
to registers, `finish` reduces and stores. What all rows of a group share (scales of channels,
biases, gates) is copied once a block. A row is a sequence of parts of `PART` elements, `VEC` a
thread, and work is written part by part.

Pallas reduces with one scratch for all warpgroups of a block, which they would overwrite for each
other: here each has its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.kernels.once import call_once_lowered
from longlive_jax.kernels.row_rotation import turned

VEC = 4
PART = 128 * VEC
SHARED = 227 * 1024  # bytes of shared memory that a block may have
INLINE = True  # False in the interpreter, which knows no inline Mosaic: plain `jnp` in its place
STRIDED = plgpu.Layout.WG_STRIDED(shape=(PART,), vec_size=VEC)
SPLAT = plgpu.Layout.WG_SPLAT(shape=())

Parts = tuple[jax.Array, ...]
Job = Callable[["Tools", Any, Any, Any], Any]
Counts = tuple[int, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How a kernel is laid out.

  Attributes:
    warpgroups: of a block.
    buffers: rows on their way to each of them.
    blocks: that share a multiprocessor.
  """

  warpgroups: int = 4
  buffers: int = 1
  blocks: int = 1


def takes(shape: Sequence[int], dtype: Any) -> bool:
  """Whether rows of an array are a sequence of parts."""
  return dtype == jnp.bfloat16 and shape[-1] % PART == 0


def fitting(tuning: Tuning, row_bytes: int, column_bytes: int) -> Tuning | None:
  """The tuning with as many warpgroups as shared memory holds; None if it cannot hold one."""
  room = SHARED // tuning.blocks - column_bytes - 1024
  count = min(tuning.warpgroups, room // (tuning.buffers * row_bytes))
  return dataclasses.replace(tuning, warpgroups=count) if count > 0 else None


class Row:
  """A row in shared memory; `row[i]` loads its i-th part as float32."""

  def __init__(self, ref: Any):
    self.ref = ref

  def __len__(self) -> int:
    return self.ref.shape[-1] // PART

  def __getitem__(self, i: int) -> jax.Array:
    if i >= len(self):
      raise IndexError(i)
    part = plgpu.load(self.ref.at[pl.ds(i * PART, PART)], layout=STRIDED)
    return part.astype(jnp.float32)


def each(f: Callable[..., Any], *rows: Row | Parts) -> Parts:
  """`f` of the parts of rows, one after the other."""
  return tuple(f(*(row[i] for row in rows)) for i in range(len(rows[0])))


class Tools:
  """Reductions over a row, and the fast reciprocal."""

  def __init__(self, scratch: Any):
    self.scratch = scratch

  def largest(self, parts: Parts) -> jax.Array:
    """Largest element, float32."""
    return self._reduce(functools.reduce(jnp.maximum, parts).astype(jnp.float32), "max")

  def sum(self, parts: Parts) -> jax.Array:
    """Sum of float32 parts."""
    return self._reduce(functools.reduce(jnp.add, parts), "add")

  def _reduce(self, part: jax.Array, kind: str) -> jax.Array:
    if not INLINE:
      return jnp.max(part) if kind == "max" else jnp.sum(part)

    @plgpu.inline_mgpu(
      arg_types=(STRIDED, plgpu.RefType()),
      return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=SPLAT),
    )
    def run(ctx: Any, part: Any, scratch: Any) -> Any:
      del ctx
      return part.reduce(kind, 0, scratch)

    return run(part, self.scratch)

  @staticmethod
  def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x of a part, in one instruction that is off by one unit in the last place at most."""
    if not INLINE:
      return 1.0 / x

    @plgpu.inline_mgpu(
      arg_types=(STRIDED,), return_type=plgpu.ShapeDtypeStruct((PART,), jnp.float32, layout=STRIDED)
    )
    def run(ctx: Any, x: Any) -> Any:
      del ctx
      return x._pointwise(x._lift_fast_instr("rcp.approx.ftz.f32"))

    return run(x)

  @staticmethod
  def rotated(part: jax.Array, cos: Row, sin: Row) -> jax.Array:
    """A part of whole heads, each pair (2j, 2j + 1) turned; cos, sin `[D / 2]` of a head."""
    half = cos.ref.shape[-1]
    if not INLINE:
      a, b = jnp.unstack(part.reshape(-1, half, 2), axis=-1)
      c, s = cos.ref[...], sin.ref[...]
      return jnp.stack([a * c - b * s, b * c + a * s], -1).reshape(part.shape)

    @plgpu.inline_mgpu(
      arg_types=(STRIDED, plgpu.RefType(), plgpu.RefType()),
      return_type=plgpu.ShapeDtypeStruct((PART,), jnp.float32, layout=STRIDED),
    )
    def run(ctx: Any, x: Any, cos: Any, sin: Any) -> Any:
      del ctx
      return turned(x, cos, sin, half)

    return run(part, cos.ref, sin.ref)


def _copy(source: Any, store: Any, barrier: Any) -> None:
  """A bulk copy; one that is checked for bounds would be limited to 256 elements."""
  mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
  plgpu.copy_gmem_to_smem(source, store, barrier, oob_mode=mode)


def _split(refs: Sequence[Any], sizes: Sequence[int]) -> Iterator[Sequence[Any]]:
  at = 0
  for size in sizes:
    yield refs[at : at + size]
    at += size


@dataclasses.dataclass(frozen=True)
class RowsKernel:
  """One pass over T rows.

  Attributes:
    name: what `read` and `finish` depend on.
    read: `(tools, rows, scalars, columns) -> state`, the only one that sees the rows.
    finish: `(tools, state, scalars, columns) -> outputs`: parts of a row, or a scalar, each.
    groups: T / groups consecutive rows share columns.
    tuning: layout.
    part: (n, i): the first of the rows are n T, of which i, i + n, ... are read.
  """

  name: Hashable
  read: Job
  finish: Job
  groups: int
  tuning: Tuning
  part: tuple[int, int] = (1, 0)

  def __call__(
    self,
    rows: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    place: Sequence[jax.Array] = (),
  ) -> tuple[jax.Array, ...]:
    """Runs it.

    Args:
      rows: `[T, N]`, N a multiple of `PART`.
      scalars: `[T]` float32.
      columns: `[N]` or `[groups, N]`.
      outs: shapes `[T, N]` or `[T]`.
      place: an array `[R, N]` and int32 `[1]`, the row of it that the only output begins at. It is
        overwritten, and returned. Not in the interpreter.
    """
    counts = len(rows), len(scalars), len(columns), len(place), len(outs)
    args, run = (*rows, *scalars, *columns, *place), functools.partial(self._run, counts, outs)
    if not INLINE:
      return run(*args)
    name = self.name, self.groups, self.tuning, self.part, counts
    given = len(args) - len(place)
    return call_once_lowered(run, name, args, outs, {given: 0} if place else {})

  def _run(
    self,
    counts: Counts,
    outs: Sequence[jax.ShapeDtypeStruct],
    *args: jax.Array,
  ) -> tuple[jax.Array, ...]:
    """The kernel itself; the arguments are `counts` rows, scalars, columns, and a place."""
    warps, buffers = self.tuning.warpgroups, self.tuning.buffers
    rows, _, columns, _ = _split(args, counts[:4])
    shares = self._shares(rows[0].shape[0] // self.part[0])
    run = plgpu.kernel(
      functools.partial(self._block, shares, counts),
      out_type=list(outs),
      grid=(shares * self.groups,),
      grid_names=("block",),
      num_threads=warps,
      thread_name="warpgroup",
      scratch_types=(
        *(plgpu.SMEM((warps, buffers, x.shape[1]), x.dtype) for x in rows),
        *(plgpu.SMEM((x.shape[-1],), x.dtype) for x in columns),
        plgpu.SMEM((warps, 4), jnp.float32),
        plgpu.Barrier(num_arrivals=len(rows), num_barriers=warps * buffers),
        plgpu.Barrier(num_arrivals=max(len(columns), 1)),
      ),
      compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
    )
    return tuple(run(*args))

  def _shares(self, total: int) -> int:
    """Blocks that share the rows of a group."""
    multiprocessors = getattr(jax.devices()[0], "core_count", None) or 132
    share = multiprocessors * self.tuning.blocks // self.groups
    return max(min(share, total // self.groups), 1)

  def _block(self, shares: int, counts: Counts, *refs: Any) -> None:
    """What a warpgroup of a block does."""
    warps, buffers = self.tuning.warpgroups, self.tuning.buffers
    sizes = (*counts, counts[0], counts[2], 3)
    rows, scalars, columns, place, results, stores, fixed, rest = _split(refs, sizes)
    scratch, full, ready = rest
    total, me = rows[0].shape[0] // self.part[0], jax.lax.axis_index("warpgroup")
    block, each_group = jax.lax.axis_index("block"), total // self.groups
    group, share = jax.lax.div(block, shares), jax.lax.rem(block, shares)
    first = group * each_group + jax.lax.div(share * each_group, shares) + me
    last = group * each_group + jax.lax.div((share + 1) * each_group, shares)
    count = jax.lax.div(jax.lax.max(last - first, 0) + (warps - 1), warps)
    begin = first + place[1][0] if place else first  # of the output
    parts = self.part, *[(1, 0)] * (len(rows) - 1)

    def fetch(i: jax.Array, slot: jax.Array) -> None:
      for (n, part), source, store in zip(parts, rows, stores, strict=True):
        at = n * (first + i * warps) + part
        _copy(source.at[at], store.at[me, slot], full.at[me * buffers + slot])

    for slot in range(buffers):
      pl.when(slot < count)(lambda slot=slot: fetch(jnp.int32(slot), jnp.int32(slot)))
    if columns:
      pl.when(me == 0)(lambda: _copy_all(columns, fixed, group, ready))
      plgpu.barrier_wait(ready)
    tools, lasting = Tools(scratch.at[me]), tuple(Row(store) for store in fixed)

    def of_row(i: jax.Array) -> tuple[jax.Array, ...]:
      at = jax.lax.min(first + i * warps, total - 1)
      return tuple(scalar[at] for scalar in scalars)

    def step(i: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      slot, ahead = jax.lax.rem(i, buffers), of_row(i + 1)
      plgpu.barrier_wait(full.at[me * buffers + slot])
      state = self.read(tools, tuple(Row(store.at[me, slot]) for store in stores), now, lasting)
      plgpu.commit_smem()  # all threads have read the row
      pl.when(i + buffers < count)(lambda: fetch(i + buffers, slot))
      for out, y in zip(results, self.finish(tools, state, now, lasting), strict=True):
        _store(out, begin + i * warps, y)
      return ahead

    jax.lax.fori_loop(0, count, step, of_row(jnp.int32(0)))


def _copy_all(sources: Sequence[Any], stores: Sequence[Any], group: Any, barrier: Any) -> None:
  for source, store in zip(sources, stores, strict=True):
    _copy(source.at[group] if len(source.shape) == 2 else source, store, barrier)


def _store(out: Any, row: jax.Array, y: Any) -> None:
  if len(out.shape) == 1:
    out[row] = y
    return
  for i, part in enumerate(y):
    out[row, pl.ds(i * PART, PART)] = part
