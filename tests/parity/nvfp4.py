"""The quantiser, to the bit in exact and nearly so in fast arithmetic; products of operands."""

import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.quant.formats import e2m1_decode, unpack, unswizzle
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise, scale_free, unit_of
from longlive_jax.quant.qtensor import QTensor, to_tiles
from longlive_jax.quant.rounding import hadamard_matrix, rotate
from longlive_jax.quant.rules import find_rule
from longlive_jax.quant.semantics import Semantics
from tests.parity import nvfp4_linear
from tests.parity.records import Compared, Refused, compare, compare_share
from tests.parity.semantics import REFERENCE, given_noise

FAST = 1e-3  # share of elements that may differ in fast arithmetic
DEQUANTISED = 1e-6
PRODUCT = 1e-5
BFLOAT16_STEP = 2.0**-7
CASE = re.compile(r"((?:rht/)?\w+)/(\w+)/([12])d(_rht)?/codes_packed")
SOURCES = {"transpose": "transpose_src", "pad": "pad_src", "rht/heavy": "heavy", "stoch": "normal"}
WIDE = ("normal_f32",)  # inputs that are not bfloat16

quantised = jax.jit(quantise, static_argnums=1, static_argnames="semantics")
dequantised = jax.jit(dequantise, static_argnums=1, static_argnames="exact")
unpacked = jax.jit(unpack)
values_of = jax.jit(lambda codes: e2m1_decode(unpack(codes)))


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout; what it holds is read off the names."""
  del config
  matrix = archive["rht/matrix"]
  yield compare("rht/matrix", hadamard_matrix(), matrix, 0.0, 0.0)
  key = "rht/x_heavy_rotated_bf16"
  yield compare(key, rotate(jnp.asarray(archive["in/heavy"])), archive[key], 0.0, 0.0)
  for name in archive:
    match = CASE.fullmatch(name)
    if name.startswith("mxfp4/"):
      shape = archive[name].shape
      yield Refused(name, f"mxfp4 {shape} is not offered: nothing in LongLive uses it")
    elif match and match[1] != "kv":
      yield from check_case(archive, match)
  for name in sorted(n for n in archive if n.startswith("matmul/")):
    yield check_product(archive, name)
  yield from nvfp4_linear.check(archive)


def check_case(archive: Mapping[str, np.ndarray], match: re.Match[str]) -> Iterator[Compared]:
  """One array quantised by one rule, and everything that is derived from it."""
  kind, rule, blocks, turned = match.groups()
  prefix = match[0].removesuffix("codes_packed")
  x = jnp.asarray(archive[f"in/{SOURCES.get(kind, kind)}"])
  x = x if kind in WIDE else x.astype(jnp.bfloat16)
  options = {
    "rule": rule,
    "two_d": blocks == "2",
    "transpose": kind == "transpose",
    "hadamard": bool(turned) or kind.startswith("rht/"),
    "stochastic": kind == "stoch",
  }
  semantics, key = REFERENCE, None
  if kind == "stoch":
    key = jax.random.key(0)  # the noise is given
    semantics = given_noise(archive["stoch/rand0"], archive["stoch/rand1"])
  q = quantised(x, Spec(**options, exact=True), key=key, semantics=semantics)
  for name, ours in derived(q).items():
    if prefix + name in archive:
      yield compare_share(prefix + name, ours, archive[prefix + name])
  for name, dtype in (("dequant_f32", jnp.float32), ("dequant_bf16", jnp.bfloat16)):
    if prefix + name in archive:
      golden = archive[prefix + name]
      yield compare_share(prefix + name, dequantised(q, dtype, exact=True), golden)
      if dtype == jnp.float32:
        ours = dequantised(q, dtype)
        yield compare(f"{prefix}{name} (fast)", ours, golden, 0.0, DEQUANTISED)
  if kind == "stoch":  # its noise goes with the other semantics
    return
  yield from check_fast(archive, prefix, x, Spec(**options))


@jax.jit
def derived(q: QTensor) -> dict[str, jax.Array]:
  """The recorded forms of a quantised matrix, padded to whole tiles."""
  codes, swizzled, amax = to_tiles(q)
  columns = codes.shape[1] // 8
  scales = unswizzle(swizzled, codes.shape[0], columns)
  return {
    "codes_packed": codes,
    "scales_u8": scales.view(jnp.uint8),
    "amax": amax,
    "e2m1": e2m1_decode(unpack(codes)),
    "scales_f32": scales,
    "scales_u8_blocked": swizzled.view(jnp.uint8),
  }


def check_fast(
  archive: Mapping[str, np.ndarray], prefix: str, x: jax.Array, spec: Spec
) -> Iterator[Compared]:
  """As it is used: our treatment of special values, float32 arithmetic."""
  names = [prefix + name for name in ("codes_packed", "scales_u8")]
  codes, scales = (archive[name] for name in names)
  mask = f"{prefix}e2m1_overflow_mask"
  keep = np.ones((codes.shape[0], codes.shape[1] * 2), bool)
  if mask in archive:  # values that the recorded rounding lost, and their blocks
    lost = archive[mask]
    keep = ~lost.reshape(lost.shape[0], -1, 16).any(-1).repeat(16, -1)
    if not find_rule(spec.rule).error:
      exact = derived(quantised(x, Spec(spec.rule, exact=True)))
      ours = np.asarray(unpacked(exact["codes_packed"])) != np.asarray(unpacked(codes))
      yield compare_share(mask, ours, lost)
  ours = derived(quantised(x, spec))
  values = [np.asarray(values_of(c)) for c in (ours["codes_packed"], codes)]
  yield compare_share(f"{names[0]} (fast)", values[0][keep], values[1][keep], FAST)
  kept = keep[:, ::16]
  shares = np.asarray(ours["scales_u8"])[kept], scales[kept]
  yield compare_share(f"{names[1]} (fast)", *shares, FAST)


def check_product(archive: Mapping[str, np.ndarray], name: str) -> Compared:
  """A product of quantised matrices: exact bfloat16 operands, the units applied to the sum."""
  _, rules, dtype = name.split("/")
  left, right = rules.split("__")
  two_d = right.endswith("_2d")
  a = operand(archive["in/mm_a"], Spec(left, exact=True), REFERENCE)
  b = operand(archive["in/mm_b"], Spec(right.removesuffix("_2d"), two_d, exact=True), REFERENCE)
  ours, golden = product(a, b).astype(dtype), archive[name]
  rtol = PRODUCT if dtype == "float32" else BFLOAT16_STEP
  return compare(name, ours, golden, PRODUCT * float(np.abs(golden).max()), rtol)


@jax.jit
def product(a: QTensor, b: QTensor) -> jax.Array:
  """`a @ b.T` of quantised matrices, float32."""
  sums = jnp.dot(scale_free(a), scale_free(b).T, preferred_element_type=jnp.float32)
  return sums * (unit_of(a) * unit_of(b))


def operand(x: np.ndarray, spec: Spec, semantics: Semantics) -> QTensor:
  """A quantised bfloat16 matrix."""
  return quantised(jnp.asarray(x, jnp.bfloat16), spec, semantics=semantics)
