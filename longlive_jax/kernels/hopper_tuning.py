"""How the Hopper kernel cuts its work, and which cut is likely the fastest for a shape.

A step of 64 columns of a tile costs, in cycles of an SM, the most of

    tensor core    128 tile_m / 32
    shared memory  bytes read by wgmma and written by TMA and decoders / 128
    decoding       430 + 840 / decoders, as measured

so large tiles are cheaper: they decode a weight for more rows of x. Small results need many tiles,
or parts of K, to give all SMs work.
"""

import dataclasses
import functools

from longlive_jax.checks import check_at_least, check_divides
from longlive_jax.kernels.hopper_layout import BLOCKS, TILE_K

TILE_N = 128  # rows of the weight in a tile: a decoding warpgroup takes one a thread
_SHARED_BYTES = 227 * 1024  # of a block on Hopper
MMA_ROWS = 64
_DECODING = 430, 840  # cycles; on an H100 a step takes one decoder 1270, two 850, three 700
_REGISTERS = 512  # of four lanes, one in each partition of an SM
LOADER_REGISTERS = 24
SWIZZLE = 128


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    tile_m: rows of x in a tile of the result; 64 times a number.
    multipliers: warpgroups that multiply; they share the rows of a tile.
    decoders: warpgroups that decode; they take steps of 64 columns in turn.
    x_stages, packed_stages, w_stages: depth of the rings; the last two multiples of `decoders`.
    splits: parts of K.
    band: tiles of the weight that are finished for all rows of x before the next.
    multiprocessors: of the GPU.
    decoder_registers, multiplier_registers: of a thread.
    subnormals: the GPU's decoding; False for the interpreter, see `hopper_decode`.
  """

  tile_m: int = 256
  multipliers: int = 2
  decoders: int = 1
  x_stages: int = 4
  packed_stages: int = 4
  w_stages: int = 2
  splits: int = 1
  band: int = 8
  multiprocessors: int = 132
  decoder_registers: int = 104
  multiplier_registers: int = 192
  subnormals: bool = True

  def __post_init__(self) -> None:
    check_divides("packed_stages", self.packed_stages, "decoders", self.decoders)
    check_divides("w_stages", self.w_stages, "decoders", self.decoders)
    check_at_least("w_stages", self.w_stages, 2)
    check_at_least("x_stages", self.x_stages, 2)
    check_at_least("splits", self.splits, 1)
    check_divides(
      "tile_m", self.tile_m, "rows of a wgmma a multiplier", MMA_ROWS * self.multipliers
    )
    if self.shared_bytes > _SHARED_BYTES:
      raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory, not 232448")
    most = self.groups * self.launch_registers
    if self.registers > most:
      raise ValueError(f"{self} needs {self.registers} registers of four lanes, not {most}")

  @property
  def groups(self) -> int:
    """Warpgroups of a block; the last is the loader."""
    return self.decoders + self.multipliers + 1

  @property
  def launch_registers(self) -> int:
    """Registers of a thread at launch; together they are all that warpgroups can pass around."""
    return _REGISTERS // self.groups // 8 * 8

  @property
  def shared_bytes(self) -> int:
    """Shared memory of a block, without its barriers."""
    x = self.x_stages * self.tile_m * TILE_K * 2
    packed = self.packed_stages * TILE_N * (TILE_K // 2 + BLOCKS)
    w = self.w_stages * TILE_N * TILE_K * 2
    return x + packed + w + self.multipliers * 2 * MMA_ROWS * SWIZZLE

  @property
  def registers(self) -> int:
    """Registers of the four lanes that share a partition, over all warpgroups."""
    compute = self.decoders * self.decoder_registers
    return compute + self.multipliers * self.multiplier_registers + LOADER_REGISTERS


# Budgets, shared memory and registers of four lanes: see `Tuning.shared_bytes`, `registers`.
SMALL = Tuning(
  tile_m=64,
  multipliers=1,
  decoders=3,
  x_stages=6,
  packed_stages=12,
  w_stages=3,
  decoder_registers=88,
  multiplier_registers=168,
)
MIDDLE = dataclasses.replace(
  SMALL,
  tile_m=128,
  multipliers=2,
  decoders=2,
  x_stages=4,
  w_stages=4,
  decoder_registers=88,
  multiplier_registers=136,
)
LARGE = Tuning()
TUNINGS = {"small": SMALL, "middle": MIDDLE, "large": LARGE}


def cdiv(a: int, b: int) -> int:
  """a / b, rounded up."""
  return -(-a // b)


def _step_cycles(tuning: Tuning) -> float:
  read = tuning.tile_m // MMA_ROWS * TILE_K * 2 * (MMA_ROWS + TILE_N)
  written = (tuning.tile_m + TILE_N) * TILE_K * 2
  packed = 2 * TILE_N * (TILE_K // 2 + BLOCKS)
  decoding = _DECODING[0] + _DECODING[1] / tuning.decoders
  return max(tuning.tile_m * TILE_N / 32, (read + written + packed) / 128, decoding)


def _cycles(m: int, n: int, steps: int, tuning: Tuning) -> float:
  """A model of the time: whole rounds of all SMs, then the sum over parts of K."""
  tiles = tuning.splits * cdiv(m, tuning.tile_m) * cdiv(n, TILE_N)
  longest = cdiv(steps, tuning.splits)
  time = cdiv(tiles, tuning.multiprocessors) * (longest * _step_cycles(tuning) + 3000)
  return time if tuning.splits == 1 else time + tuning.splits * m * n * 8 / 2500 + 5000


def choose_tuning(m: int, n: int, k: int, multiprocessors: int = 132) -> Tuning:
  """The tuning that should be fastest for `[m, k] x [n, k]`: a model, to be told by measurement."""
  known = [
    dataclasses.replace(tuning, splits=splits, multiprocessors=multiprocessors)
    for tuning in TUNINGS.values()
    for splits in range(1, min(8, k // TILE_K) + 1)
  ]
  return min(known, key=functools.partial(_cycles, m, n, k // TILE_K))
