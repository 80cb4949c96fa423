"""The quantiser on hard inputs, with each of the three treatments of special values."""

import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.quant.formats import e2m1_decode, unpack, unswizzle
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.qtensor import QTensor, to_tiles
from tests.parity.nvfp4 import FAST, quantised
from tests.parity.records import Compared, Refused, compare_share
from tests.parity.semantics import CUDA, REFERENCE, TRITON

CASE = re.compile(r"(\w+)/(\w+)/([12])d/(\w+)/values")
unswizzled = jax.jit(unswizzle, static_argnums=(1, 2))
SEMANTICS = {"ref": REFERENCE, "cuda": CUDA, "triton": TRITON}


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout; what it holds is read off the names."""
  del config
  for name in archive:
    match = CASE.fullmatch(name)
    if match:
      yield from check_case(archive, match)


def check_case(archive: Mapping[str, np.ndarray], match: re.Match[str]) -> Iterator[Compared]:
  """One input, rule, shape of blocks and treatment; the fast arithmetic against our treatment."""
  kind, rule, blocks, treatment = match.groups()
  prefix = match[0].removesuffix("values")
  x = jax.lax.bitcast_convert_type(jnp.asarray(archive[f"{kind}/x_bf16"]), jnp.bfloat16)
  golden = {name: archive[prefix + name] for name in ("values", "scale_factors", "amax")}
  exact = Spec(rule, blocks == "2", exact=True)
  ours = stored(quantised(x, exact, semantics=SEMANTICS[treatment]))
  for name, recorded in golden.items():
    yield compare_share(prefix + name, ours[name], recorded)
  if SEMANTICS[treatment] is not TRITON:
    return
  ours = stored(quantised(x, Spec(rule, blocks == "2")))
  yield compare_share(
    f"{prefix}values (fast)", decoded(ours["values"]), decoded(golden["values"]), FAST
  )
  scales = [unswizzled(a["scale_factors"], *x.shape[:1], x.shape[1] // 16) for a in (ours, golden)]
  yield compare_share(f"{prefix}scale_factors (fast)", *scales, FAST)


@jax.jit
def stored(q: QTensor) -> dict[str, jax.Array]:
  """The recorded form of a quantised matrix."""
  codes, scales, amax = to_tiles(q)
  return {"values": codes, "scale_factors": scales.view(jnp.uint8), "amax": amax[None]}


@jax.jit
def decoded(packed: jax.Array | np.ndarray) -> jax.Array:
  """E2M1 values of packed codes."""
  return e2m1_decode(unpack(packed))
