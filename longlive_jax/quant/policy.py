"""Which linear layers are quantised, and how that enters the network: through `Ops.matmul`.

A layer is named by its path, such as "layers/ffn/up": all layers of a stack have one path. A path
is quantised if one of `quant.layers` matches it as a whole. A pattern that matches no layer of the
network is an error, not silence.

Source: spec/nvfp4.md section 5.1.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from longlive_jax.config import Quant
from longlive_jax.kernels.matmul_choice import use_kernels
from longlive_jax.model.attention import Cached
from longlive_jax.model.between import OnePass
from longlive_jax.model.ops import Matmul, Ops, Plan, row_major
from longlive_jax.quant import fp8
from longlive_jax.quant.fp8 import Rows, fp8_matmul
from longlive_jax.quant.fp8_attention import fp8_attention, fp8_attention_rows
from longlive_jax.quant.fp8_rows import Fp8OnePass
from longlive_jax.quant.matmul import (
  Prepared,
  Recipe,
  nvfp4_recipe,
  prepare,
  quantise_weight,
  quantised_matmul,
)
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.types import SEQ, Array, PyTree

KERNEL = "kernel"
AFTER_ATTENTION = "layers/self_attn/o"


def recipe_of(quant: Quant, axis: str = "") -> Recipe:
  """The recipe that a configuration describes; `axis` as in `nvfp4_recipe`."""
  return nvfp4_recipe(
    quant.weights,
    quant.activations,
    quant.gradients,
    square_weights=quant.weight_blocks == "16x16",
    stochastic=quant.gradient_rounding == "stochastic",
    kernels=use_kernels(quant.kernels, local=bool(axis)),
    axis=axis,
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


def is_quantised(leaf: object) -> bool:
  """Whether something is a quantised weight."""
  return isinstance(leaf, QTensor | Rows)


def linear_paths(params: PyTree) -> list[str]:
  """Paths of the linear layers of a transformer's parameters: what holds a kernel."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantised)
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
  if quant.linears == "fp8":
    ops = dataclasses.replace(ops, matmul=matmul_of(fp8_product, chosen, ops.matmul))
    return with_fp8_rows(ops, chosen) if isinstance(ops.between, OnePass) else ops
  recipe = recipe_of(quant, SEQ if ops.mesh else "")

  def shared(x: Array, paths: tuple[str, ...]) -> Array | Prepared:
    if chosen.isdisjoint(paths):
      return ops.prepare(x, paths)
    return prepare(recipe, x) if len(paths) > 1 and chosen.issuperset(paths) else x

  product = functools.partial(quantised_matmul, recipe)
  return dataclasses.replace(ops, matmul=matmul_of(product, chosen, ops.matmul), prepare=shared)


def with_fp8_rows(ops: Ops, chosen: frozenset[str]) -> Ops:
  """Ops whose chosen layers take rows of FP8 from kernels, and from FP8 attention."""
  ops = dataclasses.replace(ops, between=Fp8OnePass(chosen))
  if ops.dense is not fp8_attention or ops.mesh is not None or AFTER_ATTENTION not in chosen:
    return ops

  def attend(
    q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan
  ) -> tuple[Any, Any]:
    dense: Any = fp8_attention_rows if isinstance(plan, Cached) else fp8_attention
    return plan.attend(dense, q, k, v, cache, layer)

  return dataclasses.replace(ops, attend=attend)


Weight = Array | QTensor | Rows
Product = Callable[[Any, Any, Array | None, Array | None], Array]


def fp8_product(x: Array, w: Array | Rows, bias: Array | None, key: Array | None) -> Array:
  """`fp8_matmul`, which draws nothing."""
  del key
  return fp8_matmul(x, w, bias)


def matmul_of(product: Product, chosen: frozenset[str], otherwise: Matmul) -> Matmul:
  """The product that quantises the layers of the chosen paths."""

  def matmul(x: Any, w: Weight, bias: Array | None, *, path: str, key: Array | None) -> Array:
    if path in chosen or isinstance(w, QTensor | Rows):
      return product(x, w, bias, key)
    return otherwise(x, w, bias, path=path, key=key)

  return matmul


def quantise_params(params: PyTree, quant: Quant) -> PyTree:
  """Replaces the kernels `[..., in, out]` of the chosen layers by quantised ones `[..., out, in]`.

  NVFP4 is exact: weights agree byte for byte wherever they are quantised. What is quantised already
  stays as it is.
  """
  if quant.linears == "none":
    return params
  chosen = selected(linear_paths(params), quant.layers)
  spec = Spec(quant.weights, two_d=quant.weight_blocks == "16x16", exact=True)
  nvfp4 = functools.partial(quantise_weight, spec=spec)
  one = fp8.quantise_weight if quant.linears == "fp8" else nvfp4

  @jax.jit
  def quantise(w: Array) -> QTensor | Rows:  # a layer at a time, as it lies
    return jax.lax.map(lambda layer: one(row_major(layer)), w) if w.ndim > 2 else one(w)

  def replace(path: tuple[Any, ...], leaf: Weight) -> Weight:
    if is_quantised(leaf):
      return leaf
    name = "/".join(str(key.key) for key in path)
    is_chosen = name.removesuffix(f"/{KERNEL}") in chosen and name.endswith(f"/{KERNEL}")
    return quantise(leaf) if is_chosen else leaf

  return jax.tree_util.tree_map_with_path(replace, params, is_leaf=is_quantised)
