"""Foreign checkpoints as tables of rows: one row is one tensor of the original.

A row says under which key the original stores a tensor, where it lives in our tree, which layer
of a stacked leaf it is, and how its axes are permuted. The same rows serve both directions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from longlive_jax.checks import suggest
from longlive_jax.convert.leaves import FLOATING, Leaves
from longlive_jax.convert.stored import Stored
from longlive_jax.io.leaves import flat, path_name
from longlive_jax.types import PyTree

# form -> permutation of the foreign axes that gives ours; its inverse leads back
PERMUTATIONS: dict[str, tuple[int, ...]] = {
  "linear": (1, 0),  # [out, in] -> [in, out]
  "conv2d": (2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
  "conv3d": (2, 3, 4, 1, 0),  # [out, in, t, h, w] -> [t, h, w, in, out]
}
TILE = (32, 512)  # words and rows that are transposed at once


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor: foreign `key`, our `path` ("a/b/c"), `layer` of a stacked leaf, axis `form`.

  Forms that reshape, with `tail`, the foreign axes behind the first: "flat" drops axes of size one
  (`[C, 1, 1, 1] -> [C]`); "patch" turns a convolution that never overlaps, such as a patch
  embedding `[out, C, 1, p, p]`, into `[C * p * p, out]`, C being -1 in `tail`; "squeeze" drops a
  leading axis of size one.
  """

  key: str
  path: str
  form: str = "same"
  layer: int | None = None
  tail: tuple[int, ...] = ()

  @property
  def place(self) -> str:
    """Name of the leaf on disk."""
    if self.layer is None:
      return self.path
    return self.path.replace("layers/", f"layers/{self.layer}/", 1)


def foreign_shape(row: Row, ours: tuple[int, ...]) -> tuple[int, ...]:
  """The original's shape of a tensor of which `ours` is our shape, without the layer axis."""
  if row.form == "flat":
    return (*ours, *row.tail)
  if row.form == "patch":
    known = -math.prod(row.tail)
    return (ours[1], *(ours[0] // known if size < 0 else size for size in row.tail))
  if row.form == "squeeze":
    return (1, *ours)
  if row.form == "same":
    return ours
  return tuple(ours[axis] for axis in np.argsort(PERMUTATIONS[row.form]))


def transposed(matrix: np.ndarray) -> np.ndarray:
  """A row-major transpose of a row-major matrix, several times as fast as numpy's own.

  It goes by tiles that stay in the cache, and moves 8 bytes at a time: a tile of such words is
  transposed, then taken apart.
  """
  rows, columns = matrix.shape
  plain = matrix.view(f"u{matrix.itemsize}")  # numpy moves its own dtypes faster
  lanes = 8 // matrix.itemsize
  if columns % lanes or not matrix.flags.c_contiguous:
    return np.ascontiguousarray(plain.T).view(matrix.dtype)
  words = plain.view(np.uint64)
  made = np.empty((columns // lanes, lanes, rows), plain.dtype)
  for j in range(0, columns // lanes, TILE[0]):
    for i in range(0, rows, TILE[1]):
      tile = np.ascontiguousarray(words[i : i + TILE[1], j : j + TILE[0]].T)
      parts = tile.view(plain.dtype).reshape(*tile.shape, lanes)
      for lane in range(lanes):
        made[j : j + TILE[0], lane, i : i + TILE[1]] = parts[..., lane]
  return made.reshape(columns, rows).view(matrix.dtype)


def to_ours(row: Row, tensor: np.ndarray) -> np.ndarray:
  """Permutes or reshapes a foreign tensor into our layout."""
  if row.form == "flat":
    return tensor.reshape(-1)
  if row.form == "patch":
    return transposed(tensor.reshape(tensor.shape[0], -1))
  if row.form == "squeeze":
    return tensor.reshape(tensor.shape[1:])
  if row.form == "linear":
    return transposed(tensor)
  return tensor if row.form == "same" else tensor.transpose(PERMUTATIONS[row.form])


def to_foreign(row: Row, array: np.ndarray) -> np.ndarray:
  """Inverse of `to_ours`."""
  shape = foreign_shape(row, array.shape)
  if row.form == "patch":
    array = transposed(array)
  elif row.form == "linear":
    return transposed(array)
  elif row.form in PERMUTATIONS:
    return array.transpose(np.argsort(PERMUTATIONS[row.form]))
  return array.reshape(shape)


def leaf_at(tree: PyTree, path: str) -> PyTree:
  """The leaf at "a/b/0/c" of nested dicts, whose keys may be integers."""
  for part in path.split("/"):
    tree = tree[int(part)] if part not in tree and part.isdigit() else tree[part]
  return tree


def our_shape(row: Row, abstract: PyTree) -> tuple[int, ...]:
  """Our shape of a row's tensor, without the layer axis."""
  shape = leaf_at(abstract, row.path).shape
  return shape if row.layer is None else shape[1:]


def imported(rows: Sequence[Row], tensors: Mapping[str, Stored], abstract: PyTree) -> Leaves:
  """Leaves of our network from the tensors of a foreign one; reads none of them.

  Args:
    rows: the table of the network.
    tensors: foreign key -> tensor.
    abstract: our tree of shapes, `Network.abstract`.

  Returns:
    Leaves with the dtypes of the tensors, all layers of a stack one after the other.

  Raises:
    ValueError: a tensor is missing, left over, or of the wrong shape; names the key.
  """
  known = [row.key for row in rows]
  for row in rows:
    if row.key not in tensors:
      raise ValueError(f"missing tensor '{row.key}'{suggest(row.key, set(tensors) - set(known))}")
    check_foreign(row, tensors[row.key].shape, foreign_shape(row, our_shape(row, abstract)))
    if tensors[row.key].dtype not in FLOATING:
      raise ValueError(f"'{row.key}' has dtype {tensors[row.key].dtype}; it must be floating")
  extra = next((key for key in tensors if key not in set(known)), None)
  if extra is not None:
    raise ValueError(f"unknown tensor '{extra}'{suggest(extra, known)}")
  order = {name: number for number, name in enumerate(flat(abstract))}
  leaves = {}
  for row in sorted(rows, key=lambda row: (order[row.path], row.layer or 0)):
    leaves[row.place] = converted(row, tensors[row.key], our_shape(row, abstract), to_ours)
  return leaves


def check_foreign(row: Row, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
  """Raises ValueError unless a tensor has the shape that the configuration gives."""
  if found != wanted:
    turned = " (it looks transposed)" if found == wanted[::-1] and len(found) > 1 else ""
    raise ValueError(
      f"'{row.key}' has shape {found}; by the configuration it must be {wanted}{turned}"
    )


def exported(rows: Sequence[Row], leaves: Mapping[str, Stored]) -> dict[str, Stored]:
  """Foreign tensors of our leaves, in the order of the rows.

  Raises:
    ValueError: a leaf is missing or left over.
  """
  places = {row.place for row in rows}
  for name in leaves:
    if name not in places:
      raise ValueError(f"'{name}' has no name in that form{suggest(name, places)}")
  tensors = {}
  for row in rows:
    if row.place not in leaves:
      raise ValueError(f"the weights lack '{row.place}'{suggest(row.place, leaves)}")
    leaf = leaves[row.place]
    tensors[row.key] = converted(row, leaf, foreign_shape(row, leaf.shape), to_foreign)
  return tensors


def converted(
  row: Row,
  stored: Stored,
  shape: tuple[int, ...],
  convert: Callable[[Row, np.ndarray], np.ndarray],
) -> Stored:
  """A tensor in the other layout."""
  if math.prod(shape) != math.prod(stored.shape):
    raise ValueError(f"'{row.key}' has {stored.shape}, which does not fill {shape}")
  return Stored(shape, stored.dtype, lambda: convert(row, stored.read()))


def import_params(
  rows: Sequence[Row], tensors: Mapping[str, np.ndarray], abstract: PyTree
) -> PyTree:
  """Builds our parameters in memory from foreign arrays.

  Args, errors: as for `imported`, with arrays.

  Returns:
    Nested dict of float32 arrays; leaves that no row names keep their abstract entry.
  """
  leaves = imported(rows, {k: Stored.of(np.asarray(v)) for k, v in tensors.items()}, abstract)
  parts: dict[str, list[np.ndarray]] = {}
  for row in sorted(rows, key=lambda row: row.layer or 0):
    parts.setdefault(row.path, []).append(leaves[row.place].read().astype(np.float32))
  stacked = {row.path for row in rows if row.layer is not None}

  def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> object:
    name = path_name(path)
    if name not in parts:
      return leaf
    return np.stack(parts[name]) if name in stacked else parts[name][0]

  return jax.tree_util.tree_map_with_path(fill, abstract)
