"""Queries, keys and values of a block in one FP8 product of three times the columns.

One large product takes a GPU less time than three, and its parts are read where they lie by the
kernels that come next. Only where those kernels are, and not for devices that exchange each of the
three while the next is computed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.model.between import Beside
from longlive_jax.model.dit import separate_layers
from longlive_jax.model.ops import Ops
from longlive_jax.quant.fp8 import Rows
from longlive_jax.quant.fp8_rows import Fp8OnePass
from longlive_jax.types import Array, PyTree

NAMES = ("q", "k", "v")
PATHS = tuple(f"layers/self_attn/{name}" for name in NAMES)


def joins(ops: Ops) -> bool:
  """Whether a network of separate layers that runs with these operations takes them in one."""
  between = ops.between
  return isinstance(between, Fp8OnePass) and ops.mesh is None and between.quantises(PATHS)


def unrolled_params(params: PyTree, ops: Ops) -> PyTree:
  """Parameters of the stacked network, quantised, as those of the unrolled one."""
  params = separate_layers(params)
  if not joins(ops):
    return params
  return params | {"layers": {i: _joined(layer) for i, layer in params["layers"].items()}}


@jax.jit
def _one_below_the_other(*kernels: Array) -> Array:
  return jnp.concatenate(kernels)


def _joined(layer: PyTree) -> PyTree:
  """A layer whose kernel of queries has those of keys and values below it, `[3 out, in]`.

  Scales stay with their layers: each is read by a kernel of its own, which XLA would make a fusion
  if it had to cut them out of one array.
  """
  own: dict[str, Any] = layer["self_attn"]
  q, k, v = (own[name]["kernel"] for name in NAMES)
  joint = Rows(_one_below_the_other(q.values, k.values, v.values), q.scales)
  kernels = joint, Beside(k.scales[:, 0]), Beside(v.scales[:, 0])
  projections = {
    name: own[name] | {"kernel": kernel} for name, kernel in zip(NAMES, kernels, strict=True)
  }
  return layer | {"self_attn": own | projections}
