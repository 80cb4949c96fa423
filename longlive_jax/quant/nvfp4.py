"""NVFP4: 4-bit elements, an 8-bit scale for 16 of them (or for 16x16), a float32 for the tensor.

    value = q * s * amax / C       C from the scale rule; how s and q follow from x: `blocks.py`

`exact` follows the steps of the original to the bit, whatever the backend does to divisions: for
weights and for interchange. Without it everything is float32 and sums have any order; then a few
elements in a million may be one step away. Only `fake_quantise` has a gradient.

Source: spec/nvfp4.md sections 1 to 4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checks import check_at_least
from longlive_jax.quant.blocks import choose, fill, into_blocks
from longlive_jax.quant.formats import BLOCK, e2m1_decode, pack, unpack
from longlive_jax.quant.ieee import divide
from longlive_jax.quant.qtensor import ROW_BLOCKS, SQUARE_BLOCKS, QTensor
from longlive_jax.quant.rounding import rotate
from longlive_jax.quant.rules import find_rule
from longlive_jax.quant.semantics import OURS, Semantics
from longlive_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Spec:
  """How to quantise.

  Attributes:
    rule: scale rule, see `rules.RULES`.
    two_d: 16x16 blocks; then the quantised transpose is the transpose of the quantised.
    transpose: quantise the transpose of the last two axes, blocks running along the old rows.
    hadamard: turn by the random Hadamard transform first, along the axis of the blocks.
    stochastic: round stochastically; needs a key.
    exact: to the bit, see above.
    lead: how many leading axes have an amax for each index, such as 1 for stacked layers.
    axis: inside `shard_map`, the mesh axis whose devices hold parts of x: amax is that of all.

  Raises:
    ValueError: an unknown rule, or lead < 0.
  """

  rule: str = "mse"
  two_d: bool = False
  transpose: bool = False
  hadamard: bool = False
  stochastic: bool = False
  exact: bool = False
  lead: int = 0
  axis: str = ""

  def __post_init__(self) -> None:
    find_rule(self.rule)
    check_at_least("lead", self.lead, 0)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Quantised blocks before they are packed; R rows in a block, `[..., M' / R, R, N' / 16, 16]`.

  Attributes:
    values: float32 E2M1 values.
    codes: uint8, theirs.
    scales: float32 E4M3 numbers, `[..., M' / R, 1, N' / 16, 1]`.
    amax: float32, `[]` or some leading axes.
    shape: of what was quantised, after transposition, `[..., M, N]`.
  """

  values: Array
  codes: Array
  scales: Array
  amax: Array
  shape: tuple[int, ...]

  def as_rows(self, blocked: Array) -> Array:
    """`[..., M, N']` of an array in block shape, without the rows that were filled up."""
    *lead, tall, rows, wide, each = blocked.shape
    return blocked.reshape(*lead, tall * rows, wide * each)[..., : self.shape[-2], :]


def largest(x: Array, lead: int = 0) -> Array:
  """float32 `max |x|` over all axes but the first `lead`; 0 for an empty array."""
  magnitudes = jnp.abs(x).astype(jnp.float32)
  return jnp.max(magnitudes, axis=tuple(range(lead, x.ndim)), initial=0.0)


def over_devices(amax: Array, spec: Spec) -> Array:
  """The largest amax of the devices along `spec.axis`."""
  return jax.lax.pmax(amax, spec.axis) if spec.axis else amax


def by_lead(amax: Array, ndim: int) -> Array:
  """An array over leading axes with ones appended to its shape, up to `ndim` axes."""
  return amax.reshape(*amax.shape, *(1,) * (ndim - amax.ndim))


def quantise_blocks(
  x: Array,
  spec: Spec,
  *,
  amax: Array | None = None,
  key: Array | None = None,
  semantics: Semantics = OURS,
) -> Blocks:
  """`quantise` without packing."""
  x = prepared(x, spec)
  if amax is None:
    amax = over_devices(largest(x, spec.lead), spec)
  amax = jnp.asarray(amax, jnp.float32)
  if amax.ndim > x.ndim - 2 or amax.shape != x.shape[: amax.ndim]:
    raise ValueError(
      f"amax has shape {amax.shape}; it must be () or the first axes of {x.shape[:-2]},"
      " the leading axes of x"
    )
  blocked = into_blocks(x, BLOCK if spec.two_d else 1)
  noise: tuple[Array | None, Array | None] = (None, None)
  if spec.stochastic:
    if key is None:
      raise ValueError("spec.stochastic=True needs a key")
    noise = semantics.noise(key, blocked.shape)
  rule = find_rule(spec.rule)
  chosen = choose(blocked, by_lead(amax, blocked.ndim), rule, spec.exact, noise, semantics)
  return Blocks(*chosen, amax=amax, shape=x.shape)


def quantise(
  x: Array,
  spec: Spec,
  *,
  amax: Array | None = None,
  key: Array | None = None,
  semantics: Semantics = OURS,
) -> QTensor:
  """Quantises along the last axis.

  Args:
    x: floating, `[..., M, N]`.
    spec: how.
    amax: float32 `[]` or the shape of some leading axes: taken instead of the largest magnitude of
      x (as it is after `hadamard`). Larger elements saturate.
    key: for stochastic rounding.
    semantics: other treatment of special values, for tests.

  Returns:
    The quantised `[..., M, N]`, with `transpose` `[..., N, M]`. The last axis is filled with zeros
    to whole blocks of 16 after the transposition. With `hadamard` the filled columns count: the
    turned array has them.

  Raises:
    ValueError: x has fewer than two axes or is not floating, amax does not fit, no key.

  Sharding: under `jit` the result does not depend on the mesh; inside `shard_map` give amax or
    `spec.axis`.
  Numerics: NaN gives scales of NaN. A tensor with amax < 2^-126 becomes zero.
  """
  blocks = quantise_blocks(x, spec, amax=amax, key=key, semantics=semantics)
  return QTensor(
    codes=pack(blocks.as_rows(blocks.codes)),
    scales=blocks.scales[..., 0, :, 0].astype(jnp.float8_e4m3fn),
    amax=blocks.amax,
    rule=spec.rule,
    blocks=SQUARE_BLOCKS if spec.two_d else ROW_BLOCKS,
    padding=-blocks.shape[-1] % BLOCK,
  )


def prepared(x: Array, spec: Spec) -> Array:
  """What is quantised: x checked, transposed and turned; bfloat16 stays, others are float32."""
  if x.ndim < 2 + spec.lead or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"cannot quantise {x.dtype} {x.shape}: it must be floating, with {2 + spec.lead} axes or more"
      f" (lead={spec.lead})"
    )
  if spec.transpose:
    x = jnp.swapaxes(x, -1, -2)
  if spec.hadamard:
    return rotate(fill(x, 1))
  if x.dtype == jnp.bfloat16:  # also where XLA would keep it wide
    return jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7)
  return x.astype(jnp.float32)


def scale_free(q: QTensor) -> Array:
  """bfloat16 `[..., M, N]` of `q * s`, which bfloat16 holds exactly.

  The product of two such operands, summed in float32, times both `unit_of`, is the product of the
  quantised matrices.
  """
  return scale_free_values(q).astype(jnp.bfloat16)


def scale_free_values(q: QTensor) -> Array:
  """`scale_free` as float32."""
  scales = q.row_scales
  values = e2m1_decode(unpack(q.codes)).reshape(*scales.shape, BLOCK)
  product = values * scales.astype(jnp.float32)[..., None]
  return product.reshape(*scales.shape[:-1], -1)[..., : q.shape[-1]]


def unit_of(q: QTensor) -> Array:
  """float32 `amax / C`, in amax's shape: what `scale_free` is to be multiplied with."""
  return q.amax * np.float32(1 / find_rule(q.rule).c)


def dequantise(q: QTensor, dtype: jax.typing.DTypeLike, *, exact: bool = False) -> Array:
  """`q * s * amax / C`.

  Args:
    q: a quantised `[..., M, N]`.
    dtype: of the result.
    exact: `(q * s * amax) / C`, each step rounded to float32, instead of one factor amax / C; they
      differ by 2 ulp at most.

  Returns:
    `[..., M, N]`.
  """
  free = scale_free_values(q)
  if exact:
    return divide(free * by_lead(q.amax, free.ndim), find_rule(q.rule).c).astype(dtype)
  return (free * by_lead(unit_of(q), free.ndim)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fake(x: Array, spec: Spec, amax: Array | None, key: Array | None) -> Array:
  blocks = quantise_blocks(x, spec, amax=amax, key=key)
  rule = find_rule(spec.rule)
  amax = by_lead(blocks.amax, blocks.values.ndim)
  free = blocks.values * blocks.scales
  wide = divide(free * amax, rule.c) if spec.exact else free * (amax * np.float32(1 / rule.c))
  rows = blocks.as_rows(wide)[..., : blocks.shape[-1]].astype(x.dtype)
  return jnp.swapaxes(rows, -1, -2) if spec.transpose else rows


def _fake_fwd(x: Array, spec: Spec, amax: Array | None, key: Array | None) -> tuple[Array, None]:
  return _fake(x, spec, amax, key), None


def _fake_bwd(spec: Spec, saved: None, g: Array) -> tuple[Array, None, None]:
  del spec, saved
  return g, None, None


_fake.defvjp(_fake_fwd, _fake_bwd)


def fake_quantise(
  x: Array, spec: Spec, *, amax: Array | None = None, key: Array | None = None
) -> Array:
  """Quantises and dequantises; same shape, layout and dtype as x. The gradient is the identity.

  Args, errors: as for `quantise`. ValueError for `hadamard`, whose result is not x turned back.
  """
  if spec.hadamard:
    raise ValueError("spec.hadamard=True has no fake quantisation: quantise both operands instead")
  return _fake(x, spec, amax, key)
