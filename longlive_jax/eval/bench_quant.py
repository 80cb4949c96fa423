"""The jobs of the suite "quant": what NVFP4 costs, part by part, kernels beside plain jnp.

Kernels are among the implementations where the device has the instructions they use.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.eval.bench import Case, chain
from longlive_jax.kernels.dequantise import dequantise_slots
from longlive_jax.kernels.hopper_layout import repack
from longlive_jax.kernels.hopper_matmul import packed_matmul
from longlive_jax.kernels.matmul_choice import HOPPER, kernel_for
from longlive_jax.kernels.quantise import fake_quantise_rows, quantise_rows
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise, scale_free, unit_of
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.quant.rules import RULES
from longlive_jax.types import Array

NORMAL = "normal(0, 1), seed 0"
PACKED = 9 / 16  # bytes of a quantised element
L2_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the networks that the jobs are taken from.

  Attributes:
    tokens: rows of the activations that are quantised.
    rows: rows of the products.
    width, ffn_width: of the transformer.
    cache: layers, B, K, rows and columns of a slot.
    calls: products in one executable; calls of other jobs that are in flight.
  """

  tokens: int
  rows: tuple[int, ...]
  width: int
  ffn_width: int
  cache: tuple[int, int, int, int, int]
  calls: int


SIZES = {
  "5b": Sizes(7040, (64, 512, 7040), 3072, 14336, (2, 1, 4, 7040 * 24, 128), 16),
  "tiny": Sizes(120, (8, 120), 192, 768, (2, 1, 4, 128 * 4, 48), 2),
}


def cases(sizes: Sizes) -> Iterator[Case]:
  """All jobs of the suite, for this device."""
  hopper = kernel_for(jax.devices()[0]) == HOPPER
  yield from quantising(sizes, hopper)
  for k, n in ((sizes.width, sizes.ffn_width), (sizes.ffn_width, sizes.width)):
    for m in sizes.rows:
      yield product(m, n, k, sizes.calls, hopper)
  yield reading(sizes.cache, sizes.calls, hopper)


def quantising(sizes: Sizes, hopper: bool) -> Iterator[Case]:
  """Activations to packed NVFP4, and to `q * s` in bfloat16; amax given."""
  rule, spec = RULES["mse"], Spec("mse")
  x = jax.random.normal(jax.random.key(0), (sizes.tokens, sizes.ffn_width), jnp.bfloat16)
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
  named = {"tokens": sizes.tokens, "columns": sizes.ffn_width, "rule": "mse"}
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


def product(m: int, n: int, k: int, calls: int, hopper: bool) -> Case:
  """A linear layer's product with a quantised weight; the activations stay in bfloat16."""
  copies = min(calls, 2 + L2_BYTES // int(n * k * PACKED))
  keys = jax.random.split(jax.random.key(0), copies + 1)
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  weights = [jax.random.normal(key, (n, k), jnp.bfloat16) for key in keys[1:]]
  pack = jax.jit(lambda w: quantise(w, Spec("static_6")))
  packed = [pack(w) for w in weights]
  plain = [(scale_free(q).astype(jnp.float32) * unit_of(q)).astype(jnp.bfloat16) for q in packed]
  tiles = [repack(q.codes, q.scales) if hopper else () for q in packed]

  axes = (((1,), (1,)), ((), ()))

  def unpacked(x: Array, w: Array, q: QTensor, t: Sequence[Array]) -> Array:
    y = lax.dot_general(x, scale_free(q), axes, preferred_element_type=jnp.float32)
    return (y * unit_of(q)).astype(jnp.bfloat16)

  jobs: dict[str, Callable[..., Array]] = {
    "bfloat16": lambda x, w, q, t: lax.dot_general(x, w, axes),
    "jnp": unpacked,
  }
  if hopper:
    jobs["kernel"] = lambda x, w, q, t: packed_matmul(x, t[0], t[1], unit_of(q))
  read = {"bfloat16": 2.0, "jnp": PACKED, "kernel": PACKED}
  return Case(
    "product with a packed weight",
    {"M": m, "N": n, "K": k},
    NORMAL,
    {name: chain(job, calls, copies) for name, job in jobs.items()},
    (x, (plain, packed, tiles)),
    lambda results: jnp.stack([y[:64, :64] for y in results]),
    "bfloat16",
    calls=calls,
    in_flight=4,
    flops=2.0 * m * n * k,
    bytes_moved={name: n * k * read[name] + 2 * m * (n + k) for name in jobs},
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
