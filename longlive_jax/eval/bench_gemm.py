"""The jobs of the suite "gemm": the linear layers of the transformer, in each precision.

  bfloat16       as the model multiplies
  fp8            as its layers do with `quant.linears=fp8`: x is quantised by rows, in each call
  fp8 product    what of it is the product: both operands E4M3 ahead, the result bfloat16, no scales
  nvfp4          as with `quant.linears=nvfp4`: x is quantised too, in each call
  nvfp4 weight   x stays in bfloat16; XLA decodes the packed weight
  nvfp4 kernel   the same by the Hopper kernel that decodes in shared memory

All have the rows of a block; the feed-forward has few rows too, where reading the weight is most of
the work. No weight is found in a cache. Errors are against float32 with the weight that was
quantised: those of the format, and of how it is computed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment, Quant
from longlive_jax.eval.bench import Case, chain
from longlive_jax.kernels.hopper_layout import repack
from longlive_jax.kernels.hopper_matmul import packed_matmul
from longlive_jax.kernels.matmul_choice import HOPPER, kernel_for
from longlive_jax.model.ops import contract, product
from longlive_jax.quant import fp8
from longlive_jax.quant.matmul import quantise_weight, quantised_matmul
from longlive_jax.quant.nvfp4 import Spec, scale_free, unit_of
from longlive_jax.quant.policy import recipe_of
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.types import Array

NORMAL = "normal(0, 1), seed 0"
BYTES = {"plain": 2.0, "rows": 1.0, "packed": 9 / 16, "tiles": 9 / 16}  # of a weight's element
PRODUCT = "fp8 product"
L2_BYTES = 64 << 20
FEW = (64, 512)  # rows
COMPARED = 64  # rows and columns of the results
Job = Callable[[Any, Any], Array]  # `(x, weight) -> y`


def cases(experiment: Experiment, calls: int) -> Iterator[Case]:
  """All jobs of the suite, for this device; `calls` products in one executable."""
  model = experiment.model
  rows, width, wide = model.block_latents * experiment.latent_tokens, model.width, model.ffn_width
  shapes = {
    "q, k and v as one": (width, 3 * width),
    "q, k, v or o": (width, width),
    "ffn up": (width, wide),
    "ffn down": (wide, width),
  }
  for name, (k, n) in shapes.items():
    few = [m for m in FEW if m < rows] if name.startswith("ffn") else []
    for m in (rows, *few):
      yield linear(name, m, n, k, calls)


def jobs(hopper: bool) -> dict[str, tuple[str, Job]]:
  """Implementation -> (kind of the weight: a key of `weights_of`, `(x, weight) -> y`)."""
  recipe = recipe_of(Quant(linears="nvfp4"))

  def decoded(x: Array, q: QTensor) -> Array:
    y = contract(x, scale_free(q), (1, 1))
    return (y * unit_of(q)).astype(jnp.bfloat16)

  def tiled(x: Array, w: tuple[Array, Array, Array]) -> Array:
    words, scales, unit = w
    return packed_matmul(x, words, scales, unit)

  made: dict[str, tuple[str, Job]] = {
    "bfloat16": ("plain", product),
    "fp8": ("rows", lambda x, w: fp8.fp8_matmul(x, w, None)),
    PRODUCT: ("rows", lambda x, w: contract(x.values, w.values, (1, 1), jnp.bfloat16)),
    "nvfp4": ("packed", lambda x, w: quantised_matmul(recipe, x, w, None, None)),
    "nvfp4 weight": ("packed", decoded),
  }
  return made | ({"nvfp4 kernel": ("tiles", tiled)} if hopper else {})


def weights_of(plain: list[Array], hopper: bool) -> dict[str, list[Any]]:
  """The weights `[in, out]` as each kind of job takes them."""
  pack = jax.jit(lambda w: quantise_weight(w, Spec("mse")))
  packed, rows = [pack(w) for w in plain], [jax.jit(fp8.quantise_weight)(w) for w in plain]
  tiles = [(*repack(q.codes, q.scales), unit_of(q)) for q in packed] if hopper else []
  return {"plain": plain, "rows": rows, "packed": packed, "tiles": tiles}


def linear(name: str, m: int, n: int, k: int, calls: int) -> Case:
  """The product of a linear layer, without its bias: `[m, k]` and `[k, n]`."""
  hopper = kernel_for(jax.devices()[0]) == HOPPER
  copies = min(calls, 2 + L2_BYTES // int(n * k * BYTES["packed"]))
  keys = jax.random.split(jax.random.key(0), copies + 1)
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  plain = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys[1:]]
  weights, made = weights_of(plain, hopper), jobs(hopper)
  narrow = jax.jit(fp8.quantise_rows)(x)

  def value(results: list[Array]) -> Array:
    return jnp.stack([y[:COMPARED, :COMPARED].astype(jnp.float32) for y in results])

  def scaled(results: list[Array]) -> Array:
    units = [narrow.scales[:COMPARED] * w.scales[:COMPARED, 0] for w in weights["rows"]]
    return value(results) * jnp.stack([units[i % copies] for i in range(calls)])

  def truth() -> Array:
    wide = x[:COMPARED].astype(jnp.float32)
    corners = [wide @ w[:, :COMPARED].astype(jnp.float32) for w in plain]
    return jnp.stack([corners[i % copies] for i in range(calls)])

  moved = {key: n * k * BYTES[kind] + 2.0 * m * (n + k) for key, (kind, _) in made.items()}
  return Case(
    name,
    {"M": m, "N": n, "K": k},
    NORMAL,
    {key: chain(job, calls, copies) for key, (_, job) in made.items()},
    (),
    value,
    "float32 jnp with the weight as it was",
    calls=calls,
    in_flight=4,
    flops=2.0 * m * n * k,
    bytes_moved=moved | {PRODUCT: n * k + m * (k + 2.0 * n)},
    own={
      key: (narrow if key == PRODUCT else x, (weights[kind],)) for key, (kind, _) in made.items()
    },
    values={PRODUCT: scaled},
    truth=truth,
  )
