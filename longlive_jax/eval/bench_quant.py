"""The jobs of the suite "quant": what NVFP4 costs beside products, kernels beside plain jnp.

Kernels are among the implementations where the device has the instructions they use. Products are
in the suite "gemm".
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from longlive_jax.eval.bench import Case
from longlive_jax.kernels.dequantise import dequantise_slots
from longlive_jax.kernels.matmul_choice import HOPPER, kernel_for
from longlive_jax.kernels.quantise import fake_quantise_rows, quantise_rows
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise, scale_free, unit_of
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.quant.rules import RULES
from longlive_jax.types import Array

NORMAL = "normal(0, 1), seed 0"
PACKED = 9 / 16  # bytes of a quantised element


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the networks that the jobs are taken from.

  Attributes:
    tokens: rows of the activations that are quantised.
    columns: of them.
    cache: layers, B, K, rows and columns of a slot.
    calls: that are in flight.
  """

  tokens: int
  columns: int
  cache: tuple[int, int, int, int, int]
  calls: int


SIZES = {
  "5b": Sizes(7040, 14336, (2, 1, 4, 7040 * 24, 128), 16),
  "tiny": Sizes(120, 768, (2, 1, 4, 128 * 4, 48), 2),
}


def cases(sizes: Sizes) -> Iterator[Case]:
  """All jobs of the suite, for this device."""
  hopper = kernel_for(jax.devices()[0]) == HOPPER
  yield from quantising(sizes, hopper)
  yield reading(sizes.cache, sizes.calls, hopper)


def quantising(sizes: Sizes, hopper: bool) -> Iterator[Case]:
  """Activations to packed NVFP4, and to `q * s` in bfloat16; amax given."""
  rule, spec = RULES["mse"], Spec("mse")
  x = jax.random.normal(jax.random.key(0), (sizes.tokens, sizes.columns), jnp.bfloat16)
  args = (x, jnp.max(jnp.abs(x)).astype(jnp.float32))

  def plain(x: Array, amax: Array) -> tuple[Array, Array]:
    q = quantise(x, spec, amax=amax)
    return q.codes, q.scales

  def value(packed: tuple[Array, Array]) -> Array:
    return dequantise(QTensor(*packed, args[1], "mse"), jnp.float32)

  def plain_fake(x: Array, amax: Array) -> Array:
    return scale_free(quantise(x, spec, amax=amax))

  kernels: dict[str, Callable] = {"kernel": lambda x, a: quantise_rows(x, a, rule)}
  fakes: dict[str, Callable] = {"kernel": lambda x, a: fake_quantise_rows(x, a, rule)}
  named = {"tokens": sizes.tokens, "columns": sizes.columns, "rule": "mse"}
  jobs = {
    "quantise": ({"jnp": plain} | (kernels if hopper else {}), value, 2 + PACKED),
    "fake quantise": ({"jnp": plain_fake} | (fakes if hopper else {}), lambda y: y, 4.0),
  }
  for name, (functions, values, each) in jobs.items():
    moved = dict.fromkeys(functions, each * x.size)
    yield Case(
      name,
      named,
      NORMAL,
      functions,
      args,
      values,
      "jnp",
      in_flight=sizes.calls,
      bytes_moved=moved,
    )


def reading(shape: tuple[int, int, int, int, int], calls: int, hopper: bool) -> Case:
  """All slots of a layer of a packed cache to bfloat16."""
  x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
  q = jax.jit(lambda x: quantise(x, Spec("mse", lead=3)))(x)
  level = shape[2]

  def plain(q: QTensor, layer: Array) -> Array:
    codes, scales, amax = (a[layer] for a in (q.codes, q.scales, q.amax))
    return dequantise(QTensor(codes, scales, amax, q.rule), jnp.bfloat16)

  def kernel(q: QTensor, layer: Array) -> Array:
    return dequantise_slots(q.codes, q.scales, unit_of(q), layer, level)

  functions = {"jnp": plain} | ({"kernel": kernel} if hopper else {})
  elements = x.size // shape[0]
  return Case(
    "read the packed cache",
    dict(zip(("layers", "B", "K", "R", "D"), shape, strict=True)),
    NORMAL,
    functions,
    (q, jnp.int32(1)),
    lambda y: y,
    "jnp",
    in_flight=calls,
    bytes_moved=dict.fromkeys(functions, elements * (PACKED + 2)),
  )
