"""What a traced function would do, read from its jaxpr: nothing is computed, compiled or allocated.

Products and convolutions give operations, `all_to_all` gives bytes that leave a device, and the
outputs of a function's linearisation that are not its inputs are what the backward pass keeps.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax.model.ops import ATTENDED, is_costly
from longlive_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Work:
  """What a function does.

  Attributes:
    flops: operations of products and convolutions on all devices, a multiply and an add being two.
    sent: bytes that each device sends in all-to-alls.
  """

  flops: int = 0
  sent: int = 0

  def __add__(self, other: "Work") -> "Work":
    return Work(self.flops + other.flops, self.sent + other.sent)

  def times(self, flops: int, sent: int) -> "Work":
    return Work(self.flops * flops, self.sent * sent)


def nbytes(aval: Any) -> int:
  """Bytes of an array of this shape and dtype."""
  return math.prod(aval.shape) * aval.dtype.itemsize


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def dot_flops(eqn: Any) -> int:
  """Of a `dot_general`."""
  left = eqn.invars[0].aval.shape
  (contracted, _), _ = eqn.params["dimension_numbers"]
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def convolution_flops(eqn: Any) -> int:
  """Of a `conv_general_dilated`; taps on padding count."""
  kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  return 2 * math.prod(out) * math.prod(kernel) // channels


def needed(jaxpr: Any) -> list[Any]:
  """The equations that results depend on; a compiler drops the others."""
  live, found = set(v for v in jaxpr.outvars if not hasattr(v, "val")), []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or not live.isdisjoint(eqn.outvars):
      live.update(v for v in eqn.invars if not hasattr(v, "val"))
      found.append(eqn)
  return found


def work_of(jaxpr: Any, axes: Mapping[str, int] | None = None) -> Work:
  """Adds up a jaxpr.

  Args:
    jaxpr: open or closed. Of the branches of a condition the one with most operations counts; the
      body of an endless loop counts once.
    axes: sizes of the mesh axes, inside a `shard_map`.
  """
  total = Work()
  for eqn in needed(getattr(jaxpr, "jaxpr", jaxpr)):
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      total += Work(flops=dot_flops(eqn))
    elif name == "conv_general_dilated":
      total += Work(flops=convolution_flops(eqn))
    elif name == "all_to_all":
      names = params["axis_name"]
      names = (names,) if isinstance(names, str) else names
      ranks = math.prod((axes or {})[n] for n in names)
      total += Work(sent=sum(nbytes(v.aval) for v in eqn.invars) * (ranks - 1) // ranks)
    elif name == "shard_map":
      sizes = dict(params["mesh"].shape)
      inside = work_of(params["jaxpr"], sizes)
      total += inside.times(math.prod(sizes.values()), 1)
    elif name == "cond":
      total += max((work_of(b, axes) for b in params["branches"]), key=lambda w: w.flops)
    else:
      inner = (work_of(j, axes) for j in inner_jaxprs(params))
      count = params["length"] if name == "scan" else 1
      total += sum(inner, Work()).times(count, count)
  return total


def work(function: Callable[..., Any], *arguments: Any) -> Work:
  """Of a function at arguments that may be shapes."""
  return work_of(jax.make_jaxpr(function)(*arguments))


def linearise(function: Callable[..., Any], params: Any, *arguments: Any) -> Any:
  """Jaxpr of the forward of `function(params, *arguments)` whose results are all that is kept."""

  def forward(params: Any, *arguments: Any) -> Any:
    return jax.vjp(lambda p: function(p, *arguments), params)

  return jax.make_jaxpr(forward)(params, *arguments).jaxpr


def kept_bytes(linearised: Any) -> int:
  """Bytes that a gradient keeps between its forward and its backward, of `linearise`.

  Params and arguments are not counted, for they are there anyway. A compiler may keep less: it
  does not hold what is cheap to compute again, nor the same numbers twice.
  """
  given = set(linearised.invars)
  kept = {v for v in linearised.outvars if not hasattr(v, "val") and v not in given}
  return sum(nbytes(v.aval) for v in kept)


def named(x: Array, q: Array, k: Array) -> Array:
  """A result of attention, under the name by which it is kept if it is worth it."""
  return checkpoint_name(x, ATTENDED) if is_costly(q.shape[1], k.shape[1]) else x


def kernel_attention(q: Array, k: Array, v: Array, lengths: Array | None = None) -> Array:
  """`dense_attention` as a fused kernel does it, for traces: shapes and results are the same.

  It keeps q, k, v, the result and one float32 a query and head, and its backward makes five
  products, one of which is the logits again.

  Raises:
    ValueError: with lengths.
  """
  if lengths is not None:
    raise ValueError("attention is traced without lengths")
  of_q, of_k = (jax.typeof(a).manual_axis_type.varying for a in (q, k))
  missing = tuple(sorted(of_q - of_k))
  if missing:  # inside shard_map: text that several devices share, whose gradients are summed
    k, v = (jax.lax.pcast(a, missing, to="varying") for a in (k, v))
  return _kernel(q, k, v)


@jax.custom_vjp
def _kernel(q: Array, k: Array, v: Array) -> Array:
  return _forward(q, k, v)[0]


def _logits(q: Array, k: Array) -> Array:
  logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
  return logits * q.shape[-1] ** -0.5


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
  logits = _logits(q, k)
  sums = named(jax.nn.logsumexp(logits, -1, keepdims=True), q, k)
  weights = jnp.exp(logits - sums).astype(v.dtype)
  out = named(jnp.einsum("bnqk,bknd->bqnd", weights, v).astype(q.dtype), q, k)
  return out, (q, k, v, out, sums)


def _backward(saved: Any, g: Array) -> tuple[Array, Array, Array]:
  q, k, v, out, sums = saved
  weights = jnp.exp(_logits(q, k) - sums)
  rest = jnp.moveaxis(jnp.sum(g.astype(jnp.float32) * out, -1), 1, 2)[..., None]
  by_logits = jnp.einsum("bqnd,bknd->bnqk", g, v, preferred_element_type=jnp.float32) - rest
  by_logits = (weights * by_logits * q.shape[-1] ** -0.5).astype(q.dtype)
  dv = jnp.einsum("bnqk,bqnd->bknd", weights.astype(g.dtype), g)
  dk = jnp.einsum("bnqk,bqnd->bknd", by_logits, q)
  return jnp.einsum("bnqk,bknd->bqnd", by_logits, k), dk, dv


_kernel.defvjp(_forward, _backward)
