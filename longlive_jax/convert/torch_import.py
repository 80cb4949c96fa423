"""Foreign checkpoints as tables of rows: one row is one tensor of the original.

A row says under which key the original stores a tensor, where it lives in our tree, which layer
of a stacked leaf it is, and how its axes are permuted. The same rows serve both directions.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from longlive_jax.checks import suggest
from longlive_jax.types import PyTree

# form -> permutation of the foreign axes that gives ours; its inverse leads back
PERMUTATIONS: dict[str, tuple[int, ...] | None] = {
  "same": None,
  "linear": (1, 0),  # [out, in] -> [in, out]
  "conv2d": (2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
  "conv3d": (2, 3, 4, 1, 0),  # [out, in, t, h, w] -> [t, h, w, in, out]
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor: foreign `key`, our `path` ("a/b/c"), `layer` of a stacked leaf, axis `form`.

  Forms that reshape: "flat" drops all axes to one (`[C, 1, 1, 1] -> [C]`); "patch" turns a patch
  embedding `[out, C, 1, p, p]` into `[C * p * p, out]`; "squeeze" drops leading axes of size one.
  """

  key: str
  path: str
  form: str = "same"
  layer: int | None = None


def check_foreign(row: Row, tensor: np.ndarray, wanted: tuple[int, ...]) -> None:
  """Raises ValueError, in the original's order of axes, unless a tensor gives our shape."""
  found, permutation = tensor.shape, PERMUTATIONS.get(row.form)
  if row.form == "flat":
    fits, expected = found == (*wanted, *(1,) * (len(found) - 1)), f"({wanted[0]}, 1, ...)"
  elif row.form == "patch":
    size_in, size_out = wanted
    fits = len(found) > 1 and found[0] == size_out and math.prod(found[1:]) == size_in
    expected = f"({size_out}, ...) with {size_in} numbers in each row"
  else:
    axes = range(len(wanted)) if permutation is None else np.argsort(permutation)
    shape = (1, *wanted) if row.form == "squeeze" else tuple(wanted[axis] for axis in axes)
    fits, expected = found == shape, str(shape)
  if not fits:
    raise ValueError(f"{row.key} has shape {found}; it must be {expected}")


def to_ours(row: Row, tensor: np.ndarray) -> np.ndarray:
  """Permutes or reshapes a foreign tensor into our layout."""
  if row.form == "flat":
    return tensor.reshape(-1)
  if row.form == "patch":
    return tensor.reshape(tensor.shape[0], -1).T
  if row.form == "squeeze":
    return tensor.reshape(tensor.shape[1:])
  permutation = PERMUTATIONS[row.form]
  return tensor if permutation is None else tensor.transpose(permutation)


def leaf_at(tree: PyTree, path: str) -> PyTree:
  """The leaf at "a/b/0/c" of nested dicts, whose keys may be integers."""
  for part in path.split("/"):
    tree = tree[int(part)] if part not in tree and part.isdigit() else tree[part]
  return tree


def import_params(
  rows: Sequence[Row], tensors: Mapping[str, np.ndarray], abstract: PyTree
) -> PyTree:
  """Builds our parameters from foreign tensors.

  Args:
    rows: the table of the network.
    tensors: foreign key -> array.
    abstract: our tree of shapes, `Network.abstract`.

  Returns:
    Nested dict of float32 arrays; leaves that no row names keep their abstract entry.

  Raises:
    ValueError: a tensor is missing, left over, or of the wrong shape; names the key.
  """
  known = [row.key for row in rows]
  extra = sorted(set(tensors) - set(known))
  if extra:
    raise ValueError(f"unknown tensor '{extra[0]}'{suggest(extra[0], known)}")
  parts: dict[str, list[tuple[int, np.ndarray]]] = {}
  for row in rows:
    if row.key not in tensors:
      raise ValueError(f"missing tensor '{row.key}'{suggest(row.key, tensors)}")
    tensor = np.asarray(tensors[row.key], np.float32)
    wanted = leaf_at(abstract, row.path).shape
    check_foreign(row, tensor, wanted if row.layer is None else wanted[1:])
    parts.setdefault(row.path, []).append((row.layer or 0, to_ours(row, tensor)))

  def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> object:
    name = "/".join(str(p.key) for p in path)
    if name not in parts:
      return leaf
    values = [value for _, value in sorted(parts[name], key=lambda item: item[0])]
    return np.stack(values) if len(values) > 1 or len(leaf.shape) > values[0].ndim else values[0]

  return jax.tree_util.tree_map_with_path(fill, abstract)
