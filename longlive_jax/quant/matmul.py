"""Matrix products with NVFP4 operands, and their gradients.

    fprop   y  = Q(x) Q(w)                  along in
    dgrad   dx = Q(g) Q(w^T)                along out
    wgrad   dw = Q(H x~)^T Q(H g)           along tokens; H Hadamard, x~ the quantised x

An operand is `q * s` in bfloat16, which holds it exactly; products are summed in float32 and
multiplied by both `amax / C` at the end, so that on any hardware the result is that of an FP4 unit
up to the order of the sum. Each operand has its own recipe, or stays in bfloat16.

What is kept for the backward pass is the packed x, 0.5625 bytes an element, not x. It has the name
`PACKED` for rematerialisation policies.

Source: spec/nvfp4.md sections 5 and 6.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import register_dataclass

from longlive_jax.kernels.quantise import fake_quantise_rows, quantise_rows
from longlive_jax.model.ops import INPUT, PACKED, PRODUCT, row_major
from longlive_jax.quant.formats import BLOCK
from longlive_jax.quant.nvfp4 import Spec, largest, over_devices, quantise, scale_free, unit_of
from longlive_jax.quant.operands import (
  Operand,
  from_packed,
  operand,
  pack,
  product,
  product_over_rows,
)
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.quant.rules import find_rule
from longlive_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How each operand of the three products is quantised; None leaves it in bfloat16.

  Attributes:
    x: input of fprop; what is packed for wgrad.
    w: weight of fprop and, along its other axis, of dgrad.
    g: output gradient of dgrad.
    x_wgrad: input of wgrad, quantised a second time along tokens.
    g_wgrad: output gradient of wgrad, along tokens.
    kernels: quantise x for fprop by the Pallas kernels, where they can take it.

  Raises:
    ValueError: one operand of wgrad is turned by the Hadamard transform and the other is not.
  """

  x: Spec | None = None
  w: Spec | None = None
  g: Spec | None = None
  x_wgrad: Spec | None = None
  g_wgrad: Spec | None = None
  kernels: bool = False

  def __post_init__(self) -> None:
    turned = [spec is not None and spec.hadamard for spec in (self.x_wgrad, self.g_wgrad)]
    if turned[0] != turned[1]:
      raise ValueError("both operands of wgrad must be turned by the Hadamard transform, or none")

  @property
  def needs_key(self) -> bool:
    """Whether a gradient is rounded stochastically."""
    return any(spec is not None and spec.stochastic for spec in (self.g, self.g_wgrad))


def nvfp4_recipe(
  weights: str = "mse",
  activations: str = "mse",
  gradients: str = "mse",
  *,
  square_weights: bool = False,
  stochastic: bool = True,
  exact: bool = False,
  kernels: bool = False,
  axis: str = "",
) -> Recipe:
  """The recipe of the original.

  Args:
    weights: scale rule of the weights; "" leaves them in bfloat16.
    activations: scale rule of the inputs, in fprop and in wgrad; or "".
    gradients: scale rule of the output gradients; or "".
    square_weights: 16x16 blocks, so that fprop and dgrad see the same weight (training).
    stochastic: round gradients stochastically.
    exact: quantise weights to the bit.
    kernels: see `Recipe`.
    axis: inside `shard_map`, the mesh axis over which inputs are split; has no gradients.
  """

  def spec(rule: str, **more: Any) -> Spec | None:
    return Spec(rule, **more) if rule else None

  turn = bool(activations and gradients)
  return Recipe(
    x=spec(activations, axis=axis),
    w=spec(weights, two_d=square_weights, exact=exact),
    g=spec(gradients, stochastic=stochastic),
    x_wgrad=spec(activations, hadamard=turn),
    g_wgrad=spec(gradients, hadamard=turn, stochastic=stochastic),
    kernels=kernels,
  )


def kernel_takes(x: Array, spec: Spec) -> bool:
  """Whether the kernels that quantise can do so: bfloat16, blocks along the last axis."""
  plain = Spec(spec.rule, axis=spec.axis) == spec
  return plain and x.dtype == jnp.bfloat16 and x.shape[-1] % BLOCK == 0 and x.size < 2**31


def input_operand(x: Array, recipe: Recipe) -> Operand:
  """x as the left operand of fprop."""
  if recipe.x is None or not (recipe.kernels and kernel_takes(x, recipe.x)):
    return operand(x, recipe.x)
  rule, amax = find_rule(recipe.x.rule), over_devices(largest(x), recipe.x)
  values = fake_quantise_rows(x.reshape(-1, x.shape[-1]), amax, rule)
  return Operand(values.reshape(x.shape), amax * np.float32(1 / rule.c))


def packed_input(x: Array, recipe: Recipe) -> QTensor:
  """x as it is kept for the backward pass; `recipe.x` is not None."""
  spec = recipe.x or Spec()
  if not (recipe.kernels and kernel_takes(x, spec)):
    return pack(x, spec)
  amax = over_devices(largest(x), spec)
  codes, scales = quantise_rows(x.reshape(-1, x.shape[-1]), amax, find_rule(spec.rule))
  lead = x.shape[:-1]
  return QTensor(codes.reshape(*lead, -1), scales.reshape(*lead, -1), amax, spec.rule)


def weight_operand(w: Array | QTensor, spec: Spec | None) -> Operand:
  """`[out, in]` for fprop of a weight `[in, out]`, or of one that is quantised as `[out, in]`.

  A weight keeps its layout: else the compiler would transpose a whole stack of layers beforehand.
  """
  if isinstance(w, QTensor):
    return from_packed(w)
  return operand(row_major(w), spec, flip=True)


@functools.partial(register_dataclass, data_fields=["x", "packed"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Prepared:
  """An input `[..., in]` of several products, and as it is packed for all of them."""

  x: Array
  packed: QTensor


def named(packed: QTensor) -> QTensor:
  """A packed input under the name that rematerialisation policies know.

  The scales are named as bytes: what a policy saves is rounded to its own dtype as if that had
  infinities, which makes them of the E4M3 numbers above 240.
  """
  codes, amax = (checkpoint_name(a, PACKED) for a in (packed.codes, packed.amax))
  scales = checkpoint_name(jax.lax.bitcast_convert_type(packed.scales, jnp.uint8), PACKED)
  scales = jax.lax.bitcast_convert_type(scales, packed.scales.dtype)
  return dataclasses.replace(packed, codes=codes, scales=scales, amax=amax)


def prepare(recipe: Recipe, x: Array) -> Array | Prepared:
  """Quantises x once for several products; x itself where the recipe leaves it as it is.

  The gradient of x is that of the products, straight through.
  """
  if recipe.x is None:
    return x
  fixed = jax.lax.stop_gradient(x).astype(jnp.bfloat16)
  return Prepared(x, named(packed_input(fixed, recipe)))


def quantised_product(
  recipe: Recipe,
  x: Array,
  w: Array | QTensor,
  key: Array | None = None,
  packed: QTensor | None = None,
) -> Array:
  """`x @ w` with quantised operands.

  Args:
    recipe: how operands are quantised.
    x: `[..., T, in]`, taken as bfloat16. In wgrad blocks run along T: what lies along other axes
      has blocks of its own, so that devices may share them.
    w: `[in, out]`; or a QTensor `[out, in]`, which is not trained and gets no gradient.
    key: for stochastic rounding of gradients.
    packed: x, if it is quantised already; then x only gets a gradient.

  Returns:
    float32 `[..., T, out]`.

  Numerics: one amax for all of x: what else is in a batch moves results by the quantisation error.
  """
  return _affine(recipe, jnp.float32, x, w, None, key, packed)


Dtype = jax.typing.DTypeLike
Saved = tuple[Array | QTensor | None, Array | QTensor, Array | None, Array | None, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _affine(
  recipe: Recipe,
  dtype: Dtype,
  x: Array,
  w: Array | QTensor,
  bias: Array | None,
  key: Array | None,
  packed: QTensor | None,
) -> Array:
  """`x @ w + bias` in `dtype`, to which the float32 sum is rounded; see `quantised_product`."""
  del key
  left = input_operand(x, recipe) if packed is None else from_packed(packed)
  return product(left, weight_operand(w, recipe.w), bias, dtype)


def _fprop(
  recipe: Recipe,
  dtype: Dtype,
  x: Array,
  w: Array | QTensor,
  bias: Array | None,
  key: Array | None,
  packed: QTensor | None,
) -> tuple[Array, Saved]:
  if packed is None:
    ready = prepare(recipe, x)
    packed = ready.packed if isinstance(ready, Prepared) else None
  kept = checkpoint_name(x.astype(jnp.bfloat16), INPUT) if packed is None else packed
  left = from_packed(kept) if isinstance(kept, QTensor) else Operand(kept, 1.0)
  trained = None if isinstance(w, QTensor) else kept
  y = product(left, weight_operand(w, recipe.w), bias, dtype)
  return y, (trained, w, bias, key, jnp.zeros((), x.dtype))


def _dgrad_wgrad(
  recipe: Recipe, dtype: Dtype, saved: Saved, g: Array
) -> tuple[Array, Array | None, Array | None, None, None]:
  del dtype
  packed, w, bias, key, like = saved
  if recipe.needs_key and key is None:
    raise ValueError("quant.gradient_rounding=stochastic needs a key in the training step")
  keys = (None, None) if key is None else tuple(jax.random.split(key))
  rows = tuple(range(g.ndim - 1))
  db = None if bias is None else jnp.sum(g, rows, jnp.float32).astype(bias.dtype)
  g = g.astype(jnp.bfloat16)
  frozen = isinstance(w, QTensor)
  right = Operand(scale_free(w).T, unit_of(w)) if frozen else operand(w, recipe.w)
  dx = product(operand(g, recipe.g, keys[0]), right, dtype=like.dtype)
  if packed is None or frozen:
    return dx, None, db, None, None
  left = operand(packed, recipe.x_wgrad, flip=True)
  dw = product_over_rows(left, operand(g, recipe.g_wgrad, keys[1], flip=True))
  return dx, dw.astype(w.dtype), db, None, None


_affine.defvjp(_fprop, _dgrad_wgrad)


def quantise_weight(w: Array, spec: Spec) -> QTensor:
  """A weight `[..., in, out]` as QTensor `[..., out, in]`; leading axes have an amax each."""
  return quantise(w, dataclasses.replace(spec, transpose=True, lead=w.ndim - 2))


def quantised_matmul(
  recipe: Recipe,
  x: Array | Prepared,
  w: Array | QTensor,
  bias: Array | None,
  key: Array | None,
) -> Array:
  """`x [..., in] @ w + bias` in x's dtype; the sum is float32 until then."""
  x, packed = (x.x, x.packed) if isinstance(x, Prepared) else (x, None)
  return checkpoint_name(_affine(recipe, x.dtype, x, w, bias, key, packed), PRODUCT)
