"""Low-rank adapters: a small trained tree beside frozen weights.

    y = x W + b + (alpha / r) (x A) B            A [in, r], B [r, out]

Adapters are a tree of their own, "layers/ffn/up/a" and ".../b" with a leading axis of layers, and
never a copy of what they adapt: `adapted` puts a kernel and its pair side by side in the tree that
the network is given, and `adapted_ops` multiplies with both, whatever the kernel is made of.

Source: spec/models.md section 6.6.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from longlive_jax.io.leaves import flat, nested, path_name
from longlive_jax.model.ops import Ops, product
from longlive_jax.types import Array, ArrayLike, PyTree

KERNEL = "/kernel"
ALL = ("layers/.*",)  # all linear layers inside transformer layers: what the original adapts


@functools.partial(register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A kernel with its adapter, in the kernel's place in the tree of parameters.

  Attributes:
    base: `[..., in, out]`, or a quantised kernel; not trained.
    a: `[..., in, r]`.
    b: `[..., r, out]`.
    scale: alpha / r.
  """

  base: Any
  a: Array
  b: Array
  scale: float


def linear_shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
  """Shape `[..., in, out]` of the kernel of each linear layer, by the layer's path."""
  named = flat(params).items()
  return {name.removesuffix(KERNEL): leaf.shape for name, leaf in named if name.endswith(KERNEL)}


def adapter_shapes(params: PyTree, rank: int, layers: Sequence[str] = ALL) -> PyTree:
  """Shapes of the adapters, float32.

  Args:
    params: of the network without adapters, or their shapes.
    rank: r, at least 1.
    layers: patterns of the paths of linear layers; each must match one.

  Raises:
    ValueError: a rank below 1, or a pattern that matches no layer.
  """
  if rank < 1:
    raise ValueError(f"the rank of adapters must be at least 1, not {rank}")
  shapes, leaves = linear_shapes(params), {}
  for pattern in layers:
    hits = [path for path in shapes if re.fullmatch(pattern, path)]
    if not hits:
      raise ValueError(
        f"distill.layers has {pattern!r}, which matches no layer; the layers are"
        f" {', '.join(sorted(shapes))}"
      )
    for path in hits:
      *lead, size_in, size_out = shapes[path]
      leaves[f"{path}/a"] = jax.ShapeDtypeStruct((*lead, size_in, rank), jnp.float32)
      leaves[f"{path}/b"] = jax.ShapeDtypeStruct((*lead, rank, size_out), jnp.float32)
  return nested(leaves)


def init_adapters(key: Array, shapes: PyTree) -> PyTree:
  """Fresh adapters, which change nothing yet: A uniform within 1 / sqrt(in), B zero."""
  leaves, form = jax.tree_util.tree_flatten_with_path(shapes)

  def draw(number: int, path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
    if not path_name(path).endswith("/a"):
      return jnp.zeros(leaf.shape, leaf.dtype)
    bound = 1 / math.sqrt(leaf.shape[-2])
    own = jax.random.fold_in(key, number)
    return jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)

  return form.unflatten(draw(i, path, leaf) for i, (path, leaf) in enumerate(leaves))


def pairs_of(adapters: PyTree) -> dict[str, tuple[Array, Array]]:
  """(A, B) by the path of the layer that they adapt."""
  named = flat(adapters)
  paths = dict.fromkeys(name.rpartition("/")[0] for name in named)
  return {path: (named[f"{path}/a"], named[f"{path}/b"]) for path in paths}


def replace_kernels(
  params: PyTree, paths: Iterable[str], make: Callable[[str, Any], Any]
) -> PyTree:
  """Parameters with `make(path, kernel)` for the kernels of these layers.

  Raises:
    ValueError: there is no such layer.
  """
  left = set(paths)

  def visit(path: tuple[Any, ...], leaf: Any) -> Any:
    name = path_name(path).removesuffix(KERNEL)
    if name not in left or not path_name(path).endswith(KERNEL):
      return leaf
    left.discard(name)
    return make(name, leaf)

  whole = lambda node: not isinstance(node, dict)  # noqa: E731 - a quantised kernel is one leaf
  out = jax.tree_util.tree_map_with_path(visit, params, is_leaf=whole)
  if left:
    raise ValueError(
      f"adapters of layers that the network does not have: {', '.join(sorted(left))}"
    )
  return out


def adapted(params: PyTree, adapters: PyTree, alpha: float) -> PyTree:
  """Parameters whose kernels stand beside their adapters; nothing is copied.

  Args:
    params: of the network, quantised or not.
    adapters: see the module.
    alpha: weight of the adapters times their rank.
  """
  pairs = pairs_of(adapters)

  def make(path: str, kernel: Any) -> Adapted:
    a, b = pairs[path]
    return Adapted(kernel, a, b, alpha / a.shape[-1])

  return replace_kernels(params, pairs, make)


def adapted_ops(ops: Ops) -> Ops:
  """Ops that multiply with kernels and adapters; the adapter in x's dtype, as kernels are."""

  def matmul(x: Any, w: Any, bias: Array | None, *, path: str, key: Array | None) -> Array:
    if not isinstance(w, Adapted):
      return ops.matmul(x, w, bias, path=path, key=key)
    plain = getattr(x, "x", x)  # of an input that is quantised for several layers
    base, low = w.base, product(plain, w.a)
    if not isinstance(base, jax.Array):  # then x is not kept beside what is made of it
      base, low = jax.lax.optimization_barrier((base, low))
    y = ops.matmul(x, base, bias, path=path, key=key)
    return y + (product(low, w.b) * w.scale).astype(y.dtype)

  return dataclasses.replace(ops, matmul=matmul)


def merge(params: PyTree, adapters: PyTree, alpha: float) -> PyTree:
  """Parameters with `W + (alpha / r) A B`, summed in float32 and rounded to W's dtype once.

  Arrays of numpy are merged on the host, and stay there.

  Raises:
    ValueError: a kernel is quantised: merge first, quantise then.
  """
  return _shifted(params, adapters, alpha, 1.0)


def unmerge(params: PyTree, adapters: PyTree, alpha: float) -> PyTree:
  """What `merge` was given, up to the rounding of W's dtype."""
  return _shifted(params, adapters, alpha, -1.0)


def _shifted(params: PyTree, adapters: PyTree, alpha: float, sign: float) -> PyTree:
  pairs = pairs_of(adapters)

  def make(path: str, kernel: Any) -> ArrayLike:
    a, b = (half.astype(jnp.float32) for half in pairs[path])
    scale = sign * alpha / a.shape[-1]
    if isinstance(kernel, np.ndarray):
      return (kernel.astype(np.float32) + np.matmul(a, b) * scale).astype(kernel.dtype)
    if not isinstance(kernel, jax.Array):
      raise ValueError(f"the kernel of {path} is quantised; merge adapters first, quantise then")
    change = jnp.einsum("...ir,...ro->...io", a, b, precision="highest") * scale
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)

  return replace_kernels(params, pairs, make)
