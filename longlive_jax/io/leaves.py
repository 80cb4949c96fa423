"""Trees of arrays by the names of their leaves, in memory and on disk.

In memory the layers of a network are stacked: a leaf below the key "layers" has a leading layer
axis. On disk it is one leaf a layer: "layers/ffn/up" becomes "layers/0/ffn/up" and so on.
"""

from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import jax

from longlive_jax.types import ArrayLike, PyTree

STACKED = "layers"
Index = int | EllipsisType


def path_name(path: tuple[Any, ...]) -> str:
  """ "a/b/0" of a path of `jax.tree_util`: keys, indices and field names."""
  return "/".join(jax.tree_util.keystr((part,), simple=True) for part in path)


def flat(tree: PyTree) -> dict[str, Any]:
  """Name -> leaf, in the order of the tree."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> PyTree:
  """The nested dicts that `leaves` names."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *above, last = name.split("/")
    place = tree
    for part in above:
      place = place.setdefault(part, {})
    place[last] = leaf
  return tree


def disk_places(name: str, shape: tuple[int, ...]) -> list[tuple[str, Index]]:
  """Where a leaf goes on disk: (name there, index into the leaf); `...` is all of it."""
  parts = name.split("/")
  at = parts.index(STACKED) + 1 if STACKED in parts[:-1] else 0
  if not at or parts[at].isdigit():
    return [(name, ...)]
  return [("/".join([*parts[:at], str(i), *parts[at:]]), i) for i in range(shape[0])]


def disk_groups(tree: PyTree, group_bytes: int) -> Iterator[dict[str, ArrayLike]]:
  """Yields the leaves on disk in groups of at least `group_bytes` (the last may be smaller)."""
  group: dict[str, ArrayLike] = {}
  size = 0
  for name, leaf in flat(tree).items():
    for place, index in disk_places(name, leaf.shape):
      group[place] = leaf if index is ... else leaf[index]
      size += group[place].nbytes
      if size >= group_bytes:
        yield group
        group, size = {}, 0
  if group:
    yield group
