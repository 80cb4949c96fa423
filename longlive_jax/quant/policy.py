"""Which linear layers are quantised, and how that enters the network: through `Ops.matmul`.

A layer is named by its path, such as "layers/ffn/up": all layers of a stack have one path. A path
is quantised if one of `quant.layers` matches it as a whole. A pattern that matches no layer of the
network is an error, not silence.

Source: spec/nvfp4.md section 5.1.
"""

import dataclasses
import re
from collections.abc import Iterable

import jax

from longlive_jax.config import Quant
from longlive_jax.model.ops import Matmul, Ops
from longlive_jax.quant.matmul import Recipe, nvfp4_recipe, quantise_weight, quantised_matmul
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.types import Array, PyTree

KERNEL = "kernel"


def recipe_of(quant: Quant) -> Recipe:
  """The recipe that a configuration describes."""
  return nvfp4_recipe(
    quant.weights,
    quant.activations,
    quant.gradients,
    square_weights=quant.weight_blocks == "16x16",
    stochastic=quant.gradient_rounding == "stochastic",
  )


def selected(paths: Iterable[str], patterns: tuple[str, ...]) -> frozenset[str]:
  """The paths that a pattern matches.

  Raises:
    ValueError: a pattern that matches none of them.
  """
  known, chosen = sorted(set(paths)), set()
  for pattern in patterns:
    hits = [path for path in known if re.fullmatch(pattern, path)]
    if not hits:
      raise ValueError(
        f"quant.layers has {pattern!r}, which matches no layer; the layers are {', '.join(known)}"
      )
    chosen.update(hits)
  return frozenset(chosen)


def linear_paths(params: PyTree) -> list[str]:
  """Paths of the linear layers of a transformer's parameters: what holds a kernel."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda a: isinstance(a, QTensor))
  names = ["/".join(str(key.key) for key in path) for path, _ in leaves]
  return [name.removesuffix(f"/{KERNEL}") for name in names if name.endswith(f"/{KERNEL}")]


def quantised_ops(ops: Ops, quant: Quant, params: PyTree) -> Ops:
  """Ops whose matrix products are quantised where the configuration says so.

  Args:
    ops: what is used elsewhere.
    quant: configuration.
    params: of the transformer, or their shapes: names the layers.

  Raises:
    ValueError: a pattern that matches no layer.
  """
  if quant.linears == "none":
    return ops
  chosen = selected(linear_paths(params), quant.layers)
  return dataclasses.replace(ops, matmul=matmul_of(recipe_of(quant), chosen, ops.matmul))


def matmul_of(recipe: Recipe, chosen: frozenset[str], otherwise: Matmul) -> Matmul:
  """The product that quantises the layers of the chosen paths."""

  def matmul(
    x: Array, w: Array | QTensor, bias: Array | None, *, path: str, key: Array | None
  ) -> Array:
    if path in chosen or isinstance(w, QTensor):
      return quantised_matmul(recipe, x, w, bias, key)
    return otherwise(x, w, bias, path=path, key=key)

  return matmul


def quantise_params(params: PyTree, quant: Quant) -> PyTree:
  """Replaces the kernels `[..., in, out]` of the chosen layers by QTensors, exactly quantised."""
  if quant.linears == "none":
    return params
  chosen = selected(linear_paths(params), quant.layers)
  spec = Spec(quant.weights, two_d=quant.weight_blocks == "16x16", exact=True)
  quantise = jax.jit(lambda w: quantise_weight(w, spec))

  def replace(path: tuple, leaf: Array) -> Array | QTensor:
    name = "/".join(str(key.key) for key in path)
    is_chosen = name.removesuffix(f"/{KERNEL}") in chosen and name.endswith(f"/{KERNEL}")
    return quantise(leaf) if is_chosen else leaf

  return jax.tree_util.tree_map_with_path(replace, params)
