"""Which axis of a parameter is split over "fsdp" and "seq": one table, path -> PartitionSpec.

The state of an optimiser and the average have the paths of the parameters at their end, so the
same table places them. Source: spec/jax.md section 6.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.io.leaves import path_name
from longlive_jax.types import SHARDS, PyTree

Rule = tuple[str, P]

# The first that matches the end of a path. Stacked layers have a leading axis.
DIT_RULES: tuple[Rule, ...] = (
  (r"layers/.*/kernel(/codes|/scales)?", P(None, SHARDS, None)),  # quantised: by output channels
  (r"layers/.*", P()),
  (r"(patch|text|time)_\w+(/\w+)?/kernel|head/proj/kernel", P(SHARDS, None)),
  (r".*", P()),
)
TEXT_RULES: tuple[Rule, ...] = (
  (r"layers/.*/kernel", P(None, SHARDS, None)),
  (r"embedding", P(SHARDS, None)),
  (r".*", P()),
)

EVERYWHERE: tuple[Rule, ...] = ((r".*", P()),)

RULES = {"dit": DIT_RULES, "text": TEXT_RULES, "vae": EVERYWHERE}  # by network
WHOLE = dict.fromkeys(RULES, EVERYWHERE)


def fit(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
  """The spec, or none where an axis of the array cannot be cut into so many equal parts."""
  for size, axes in zip(shape, spec, strict=False):
    names = (axes,) if isinstance(axes, str) else axes or ()
    if size % math.prod(mesh.shape[name] for name in names):
      return P()
  return spec


def specs_of(tree: PyTree, rules: Sequence[Rule], mesh: Mesh) -> PyTree:
  """A PartitionSpec for each leaf.

  Args:
    tree: parameters, or a state that holds them; arrays or shapes.
    rules: see `DIT_RULES`.
    mesh: its axes.

  Raises:
    ValueError: a rule that matches no leaf, or a leaf that no rule matches.
  """
  used: set[str] = set()

  def spec(path: tuple[Any, ...], leaf: Any) -> P:
    name = path_name(path)
    for pattern, wanted in rules:
      if re.search(f"(^|/)({pattern})$", name):
        used.add(pattern)
        return fit(wanted, leaf.shape, mesh) if len(wanted) <= len(leaf.shape) else P()
    raise ValueError(f"no sharding rule matches {name!r}")

  specs = jax.tree_util.tree_map_with_path(spec, tree)
  for pattern, _ in rules:
    if pattern not in used:
      raise ValueError(f"the sharding rule {pattern!r} matches no parameter")
  return specs


def shardings_of(tree: PyTree, rules: Sequence[Rule], mesh: Mesh) -> PyTree:
  """`specs_of` as shardings on the mesh."""
  specs = specs_of(tree, rules, mesh)
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
  )


def placed(tree: PyTree, rules: Sequence[Rule], mesh: Mesh) -> PyTree:
  """Shapes with the shardings that the rules give them."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    tree,
    shardings_of(tree, rules, mesh),
  )


def home_of(params: PyTree) -> Sharding:
  """Where everything but the weights lives: whole, on all devices that hold weights."""
  leaf = jax.tree.leaves(params)[0]
  found = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(found.mesh, P()) if isinstance(found, NamedSharding) else found


def at(home: Sharding, tree: PyTree) -> PyTree:
  """Shapes with a placement."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=home), tree)
