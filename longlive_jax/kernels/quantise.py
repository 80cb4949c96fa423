"""Quantising to NVFP4 in one pass: each element is read once and its codes are written once.

A matrix is a list of blocks of 16, and only amax ties them together, so rows do not matter: a CUDA
block takes `steps` times 128 consecutive NVFP4 blocks, one for each thread and step. A thread reads
its 32 bytes straight into registers, a step ahead, and nothing crosses threads.

Instructions for an element, rule mse, counted in what Mosaic emits for a step, FMAs fused: widen
and magnitude 2, maximum 1, each candidate 8 (product, min, max, and, 2 FMA, add, FMA) so 16,
selection 1, code and sign 5, packing 2, and 90 for a block, so 5.6: about 33. At 128 instructions a
clock, 132 units and 1.75 GHz 101 M elements are 113 us of issue. Memory: 2.5625 bytes an element,
259 MB, 60 us at 4.3 TB/s. So issue bounds it, not memory. Measured: 148 us on
an H200; on an H100 140 to 146 for 1 to 32 steps.

Source: spec/nvfp4.md sections 1 and 2, spec/jax.md section 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.checks import check_at_least, check_divides, check_dtypes, check_shape
from longlive_jax.kernels import quantise_blocks as blocks
from longlive_jax.kernels.quantise_blocks import BLOCK, ScaleRule
from longlive_jax.types import Array

THREADS = 128
BYTES = BLOCK // 2  # of codes in a block
_INDEX_LIMIT = 2**31


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    steps: times 128 NVFP4 blocks that a CUDA block quantises, one after the other.
  """

  steps: int = 8

  def __post_init__(self) -> None:
    check_at_least("steps", self.steps, 1)

  @property
  def tile(self) -> int:
    """NVFP4 blocks that a CUDA block quantises."""
    return THREADS * self.steps


# A row of `[128, ...]` for each thread, held and moved as vectors of 8, or element by element. From
# one to the other no data moves.
_VECTORS = plgpu.Layout.TCGEN05_TMEM_NATIVE(8)
_COLUMNS = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)


DEFAULT = Tuning()


def _step_loop(
  first: Array, steps: int, load: Callable[[Array], Array], work: Callable[[Array, Array], None]
) -> None:
  """Calls `work(start, loaded)` for each step, with the next load under way."""

  def body(i: Array, ahead: Array) -> Array:
    start = first + i * THREADS
    following = load(first + jnp.minimum(i + 1, steps - 1) * THREADS)
    work(start, ahead)
    return following

  jax.lax.fori_loop(0, steps, body, load(first))


def _kernel(
  x_ref: Any, table_ref: Any, *refs: Any, rule: ScaleRule, tuning: Tuning, pack: bool
) -> None:
  """Refs: x bf16 [B, 16], table f32 [9], then codes u8 [B, 8] and scales e4m3 [B], or q * s bf16.

  The last tile is moved back so that it ends with x; what is written twice is the same.
  """
  total = x_ref.shape[0]
  first = jnp.minimum(jax.lax.axis_index("tile") * tuning.tile, total - tuning.tile)
  entries = [table_ref[i] for i in range(blocks.TABLE)]

  def load(start: Array) -> Array:
    return plgpu.load(x_ref.at[pl.ds(start, THREADS)], layout=_VECTORS, optimized=False)

  def work(start: Array, loaded: Array) -> None:
    x = loaded.astype(jnp.float32)
    chosen = blocks.choose(jnp.abs(x), entries, rule)
    here = pl.ds(start, THREADS)
    if not pack:
      refs[0][here] = blocks.scaled_values(chosen, x).astype(jnp.bfloat16)
      return
    codes_ref, scales_ref = refs
    scales_ref[here] = chosen.scales.astype(jnp.float8_e4m3fn)
    codes = plgpu.layout_cast(blocks.codes(chosen, x), _COLUMNS)
    column = [jax.lax.slice(codes, (0, j), (THREADS, j + 1)) for j in range(BLOCK)]
    pairs = [low | (high << 4) for low, high in zip(column[::2], column[1::2], strict=True)]
    packed = jax.lax.concatenate(pairs, 1).astype(jnp.uint8)
    codes_ref[here] = plgpu.layout_cast(packed, _VECTORS)

  _step_loop(first, tuning.steps, load, work)


def _as_blocks(x: Array, tuning: Tuning) -> tuple[Array, Tuning]:
  """A matrix as `[B, 16]`, B >= one tile, and a tuning with no more steps than fit."""
  if x.ndim != 2 or x.dtype != jnp.bfloat16:
    raise ValueError(f"x is {x.dtype} {x.shape}; it must be a bfloat16 matrix")
  check_divides("columns", x.shape[1], "block", BLOCK)
  if x.size >= _INDEX_LIMIT:
    raise ValueError(f"x has {x.size} elements; it must have fewer than 2^31: split its rows")
  listed = x.reshape(-1, BLOCK)
  steps = max(min(tuning.steps, listed.shape[0] // THREADS), 1)
  missing = max(THREADS - listed.shape[0], 0)
  listed = jnp.pad(listed, ((0, missing), (0, 0))) if missing else listed
  return listed, dataclasses.replace(tuning, steps=steps)


def _run(
  x: Array, amax: Array, rule: ScaleRule, tuning: Tuning, columns: dict[str, tuple[int, jnp.dtype]]
) -> list[Array]:
  """One call of the kernel: outputs `[M, N / 16 * c]` for each (c, dtype) of `columns`."""
  check_dtypes(amax=(amax, "float32"))
  check_shape("amax", amax.shape, ())
  listed, tuning = _as_blocks(x, tuning)
  check_at_least("rows of x", x.shape[0], 1)
  total = listed.shape[0]
  run = plgpu.kernel(
    functools.partial(_kernel, rule=rule, tuning=tuning, pack="codes" in columns),
    out_type=[
      jax.ShapeDtypeStruct((total, each) if each > 1 else (total,), dtype)
      for each, dtype in columns.values()
    ],
    grid=(-(-total // tuning.tile),),
    grid_names=("tile",),
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # nothing is read back
  )
  out = run(listed, blocks.table(amax, rule))
  return [array[: x.size // BLOCK].reshape(x.shape[0], -1) for array in out]


def quantise_rows(
  x: Array, amax: Array, rule: ScaleRule, tuning: Tuning = DEFAULT
) -> tuple[Array, Array]:
  """Quantises a matrix to packed NVFP4, 1x16 blocks along its columns.

  Args:
    x: bfloat16 `[M, N]`, finite.
    amax: float32 `[]`, usually the largest magnitude of x; larger elements saturate.
    rule: scale rule.
    tuning: how the work is cut.

  Returns:
    (codes uint8 `[M, N / 2]`, low nibble = even column; scales float8_e4m3fn `[M, N / 16]`).

  Raises:
    ValueError: x is no bfloat16 matrix, 16 does not divide N, x has 2^31 elements or more, or amax
      is no scalar.

  Numerics: static rules are exact. Of two candidates with the same error up to rounding the one
  that puts the maximum at 6 is taken. A tensor with amax < 2^-100 becomes zero.
  Sharding: a kernel call; inside `shard_map` give each shard the same amax.
  """
  columns = {"codes": (BYTES, jnp.dtype("uint8")), "scales": (1, jnp.dtype("float8_e4m3fn"))}
  codes, scales = _run(x, amax, rule, tuning, columns)
  return codes, scales


def fake_quantise_rows(x: Array, amax: Array, rule: ScaleRule, tuning: Tuning = DEFAULT) -> Array:
  """`q * s` of the quantised x as bfloat16 `[M, N]`, which holds it exactly.

  x is about `q * s * amax / C`. Args, errors, numerics: as for `quantise_rows`.
  """
  columns = {"values": (BLOCK, jnp.dtype("bfloat16"))}
  (values,) = _run(x, amax, rule, tuning, columns)
  return values
