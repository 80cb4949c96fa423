"""NVFP4 weights in the original's packed form, `model_4o6.pt`, and back; bytes are only reordered.

Instead of `P.weight` a quantised layer P has four tensors: packed codes and scales in whole tiles
of the tensor core, the largest magnitude, and the shape with and without padding. By which scale
rule they were made decides what they mean, and is not in the tensors.

Source: spec/nvfp4.md sections 4 and 8.1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from longlive_jax.checks import check_choice, suggest
from longlive_jax.convert.leaves import PARTS, Leaves, packed_leaves
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import Row
from longlive_jax.quant.formats import BLOCK, TILE_COLUMNS, TILE_ROWS
from longlive_jax.quant.qtensor import ROW_BLOCKS, SQUARE_BLOCKS, QTensor, from_tiles, to_tiles
from longlive_jax.quant.rules import find_rule

VALUES, SCALES, AMAX, SIZES = (
  f"quantized_weight_{part}" for part in ("values", "scale_factors", "amax", "metadata")
)
FORMAT = "longlive_generator_nvfp4"
BYTES = (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e4m3fn))


def is_packed(tensors: Mapping[str, object]) -> bool:
  """Whether tensors hold quantised layers."""
  return any(name.endswith(f".{VALUES}") for name in tensors)


def rule_of(notes: Mapping[str, Any], asked: str) -> str:
  """The scale rule of packed weights.

  Args:
    notes: what stands beside the tensors; `quantization` may say it.
    asked: by the user, "" if not.

  Raises:
    ValueError: nobody says it, the two differ, or it is unknown.
  """
  said = notes.get("quantization")
  said = said if isinstance(said, Mapping) else {}
  found = said.get("weight_scale_rule") or said.get("scale_rule") or ""
  if asked and found and asked != found:
    raise ValueError(f"--rule={asked}, but the file says that its scale rule is '{found}'")
  rule = str(asked or found)
  if not rule:
    raise ValueError(
      "the file does not say by which scale rule its weights were quantised, which decides what"
      " they mean; give --rule (mse for the released weights, else as its configuration had it)"
    )
  find_rule(rule)
  return rule


def blocks_of(notes: Mapping[str, Any]) -> str:
  """The blocks of packed weights: rows of 16, unless a file of ours says that they are square."""
  said = notes.get("quantization")
  found = said.get("weight_blocks", ROW_BLOCKS) if isinstance(said, Mapping) else ROW_BLOCKS
  check_choice("quantization.weight_blocks of the file", str(found), [ROW_BLOCKS, SQUARE_BLOCKS])
  return str(found)


def padded(rows: int, columns: int) -> tuple[int, int]:
  """Rows and columns of whole tiles: multiples of 128 and 64."""
  wide = TILE_COLUMNS * BLOCK
  return rows + -rows % TILE_ROWS, columns + -columns % wide


def take_packed(
  rows: Sequence[Row],
  tensors: Mapping[str, Stored],
  shapes: Callable[[Row], tuple[int, ...]],
  rule: str,
  blocks: str = ROW_BLOCKS,
) -> tuple[Leaves, list[Row], dict[str, Stored]]:
  """Separates quantised layers from the rest.

  Args:
    rows: the table of the network.
    tensors: foreign key -> tensor.
    shapes: our shape of a row's tensor.
    rule: scale rule of the quantised layers.
    blocks: theirs, "1x16" or "16x16".

  Returns:
    (leaves of quantised layers, the other rows, the other tensors).

  Raises:
    ValueError: a quantised layer is no linear layer of the network, or its tensors do not fit.
  """
  rest = dict(tensors)
  layers = {row.key.removesuffix(".weight"): row for row in rows if row.form == "linear"}
  leaves: Leaves = {}
  taken = set()
  for key in [name for name in tensors if name.endswith(f".{VALUES}")]:
    layer = key.removesuffix(f".{VALUES}")
    if layer not in layers:
      raise ValueError(f"'{key}' belongs to no linear layer{suggest(layer, layers)}")
    parts = {name: rest.pop(f"{layer}.{name}", None) for name in (VALUES, SCALES, AMAX, SIZES)}
    leaves |= unpacked(layer, layers[layer].place, parts, shapes(layers[layer]), rule, blocks)
    taken.add(layers[layer].key)
  return leaves, [row for row in rows if row.key not in taken], rest


def unpacked(
  layer: str,
  place: str,
  parts: Mapping[str, Stored | None],
  kernel: tuple[int, ...],
  rule: str,
  blocks: str = ROW_BLOCKS,
) -> Leaves:
  """The three leaves of a layer whose kernel is `[in, out]`."""
  columns, rows = kernel
  tall, wide = padded(rows, columns)
  wanted = {VALUES: ((tall, wide // 2),), SCALES: ((tall * wide // BLOCK,),), AMAX: ((1,), ())}
  for name, shapes in wanted.items():
    found = parts[name]
    if found is None:
      raise ValueError(f"missing tensor '{layer}.{name}'")
    if found.shape not in shapes:
      raise ValueError(f"'{layer}.{name}' has shape {found.shape}; it must be {shapes[0]}")
  there = {name: part for name, part in parts.items() if part is not None}
  values, scales, amax = (there[name] for name in (VALUES, SCALES, AMAX))
  sizes = there.get(SIZES)
  if values.dtype != BYTES[0] or scales.dtype not in BYTES or amax.dtype != np.float32:
    raise ValueError(
      f"'{layer}' has codes, scales and amax of {values.dtype}, {scales.dtype} and {amax.dtype};"
      " they must be uint8, float8_e4m3fn and float32"
    )
  if sizes is not None and sizes.read().tolist() != [rows, columns, tall, wide]:
    raise ValueError(
      f"'{layer}.{SIZES}' is {sizes.read().tolist()}; it must be {[rows, columns, tall, wide]}"
    )

  def make() -> QTensor:
    codes, factors, largest = (jnp.asarray(part.read()) for part in (values, scales, amax))
    try:
      return from_tiles(codes, factors, largest, rule=rule, shape=(rows, columns), blocks=blocks)
    except ValueError as error:
      raise ValueError(f"'{layer}.{SCALES}': {error}") from None

  count = -(-columns // BLOCK)
  tall = rows if blocks == ROW_BLOCKS else -(-rows // BLOCK)
  shapes = ((rows, count * BLOCK // 2), (tall, count), ())
  like = map(jax.ShapeDtypeStruct, shapes, (jnp.uint8, jnp.float8_e4m3fn, jnp.float32))
  return packed_leaves(place, make, dict(zip(PARTS, like, strict=True)))


def packed_tensors(
  leaves: Leaves,
  rows: Sequence[Row],
  shapes: Callable[[Row], tuple[int, ...]],
  rule: str,
  blocks: str = ROW_BLOCKS,
) -> dict[str, Stored]:
  """The four tensors of every quantised kernel, by foreign key; args as of `take_packed`."""
  tensors: dict[str, Stored] = {}
  for row in rows:
    if f"{row.place}/{PARTS[0]}" not in leaves:
      continue
    parts = {part: leaves[f"{row.place}/{part}"] for part in PARTS}
    tensors |= tiles_of(row.key.removesuffix(".weight"), parts, shapes(row), rule, blocks)
  return tensors


def tiles_of(
  layer: str,
  parts: Mapping[str, Stored],
  kernel: tuple[int, ...],
  rule: str,
  blocks: str = ROW_BLOCKS,
) -> dict[str, Stored]:
  """The tensors of one layer; rows and columns are padded to whole tiles when they are read."""
  columns, rows = kernel
  tall, wide = padded(rows, columns)
  last: dict[str, np.ndarray] = {}

  def part(which: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
      if which not in last:
        codes, scales, amax = (jnp.asarray(parts[name].read()) for name in PARTS)
        made = to_tiles(QTensor(codes, scales, amax, rule, blocks))
        last.update(zip((VALUES, SCALES, AMAX), map(np.asarray, made), strict=True))
        last[AMAX] = last[AMAX].reshape(1)
      return last.pop(which)

    return read

  shapes = {VALUES: (tall, wide // 2), SCALES: (tall * wide // BLOCK,), AMAX: (1,)}
  kinds = {VALUES: BYTES[0], SCALES: BYTES[1], AMAX: np.dtype(np.float32)}
  made = {f"{layer}.{n}": Stored(shape, kinds[n], part(n)) for n, shape in shapes.items()}
  sizes = np.asarray([rows, columns, tall, wide], np.int32)
  return made | {f"{layer}.{SIZES}": Stored.of(sizes)}
