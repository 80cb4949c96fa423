"""One layer of the diffusion transformer, and its head.

Source: spec/models.md section 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import Model
from longlive_jax.model.attention import Cross
from longlive_jax.model.between import Beside, Keys, Sum, between_of, opened, whole
from longlive_jax.model.layers import AffineNorm, Linear, Mlp, RmsNorm, xavier
from longlive_jax.model.ops import Ops, Plan, modulated_norm
from longlive_jax.model.rope import Rope
from longlive_jax.types import Array


class Attention(nnx.Module):
  """Projections of an attention: q and k are normalised over all heads together."""

  def __init__(self, cfg: Model, path: str, rngs: nnx.Rngs):
    width = cfg.width
    self.q = Linear(width, width, f"{path}/q", rngs)
    self.k = Linear(width, width, f"{path}/k", rngs)
    self.v = Linear(width, width, f"{path}/v", rngs)
    self.o = Linear(width, width, f"{path}/o", rngs)
    self.norm_q = RmsNorm(width, cfg.eps)
    self.norm_k = RmsNorm(width, cfg.eps)
    self.heads = cfg.heads

  @property
  def paths(self) -> tuple[str, ...]:
    """Of the layers of keys and values, which always share an input."""
    return self.k.path, self.v.path

  def split(self, x: Array) -> Array:
    """`[B, S, E] -> [B, S, N, D]`."""
    return x.reshape(*x.shape[:2], self.heads, -1)

  def products(self, x: Any, ops: Ops) -> list[Any]:
    """Of queries, keys and values, of an input that is prepared."""
    if not isinstance(self.k.kernel.get_value(), Beside):
      return [product(layer, x, ops) for layer in (self.q, self.k, self.v)]
    found = [dataclasses.replace(opened(product(self.q, x, ops)), part=(3, 0))]
    for i, layer in enumerate((self.k, self.v), 1):
      beside: Any = layer.kernel.get_value()
      mine = {"columns": beside.scales, "bias": layer.bias[...], "part": (3, i)}
      found.append(dataclasses.replace(found[0], **mine))
    return found

  def queries(self, y: Any, ops: Ops, turn: Rope | None = None) -> Array:
    """Of their product; perhaps rotated."""
    return self.normed(y, self.norm_q, ops, turn)

  def keys_values(
    self, k: Any, v: Any, ops: Ops, turn: Rope | None = None, late: bool = False
  ) -> tuple[Any, Array]:
    """Of their products; keys perhaps rotated, or `late`, as they are written."""
    values, norm = self.split(whole(v)), self.norm_k
    if late:
      return Keys(k, norm.scale[...], norm.eps, turn, self.heads), values
    return self.normed(k, norm, ops, turn), values

  def text(self, x: Any, ops: Ops) -> tuple[Array, Array]:
    """Keys and values of a text that is prepared."""
    return self.keys_values(product(self.k, x, ops), product(self.v, x, ops), ops)

  def normed(self, y: Any, norm: RmsNorm, ops: Ops, turn: Rope | None) -> Array:
    """A projection, normalised over all heads together."""
    return self.split(between_of(ops).rms(y, norm.scale[...], norm.eps, turn))


def product(linear: Linear, x: Any, ops: Ops) -> Any:
  """A linear layer of an input that is prepared; what comes next finishes it."""
  kernel = linear.kernel.get_value()
  return between_of(ops).product(ops, x, kernel, linear.bias[...], path=linear.path)


class Layer(nnx.Module):
  """One transformer layer: modulated self-attention, cross-attention to text, modulated FFN."""

  def __init__(self, cfg: Model, rngs: nnx.Rngs):
    normal = jax.nn.initializers.normal(cfg.width**-0.5)
    self.modulation = nnx.Param(normal(rngs.params(), (6, cfg.width), jnp.float32))
    self.self_attn = Attention(cfg, "layers/self_attn", rngs)
    self.cross_norm = AffineNorm(cfg.width)
    self.cross_attn = Attention(cfg, "layers/cross_attn", rngs)
    self.ffn = Mlp((cfg.width, cfg.ffn_width, cfg.width), "layers/ffn", rngs, xavier)
    self.eps = cfg.eps

  def __call__(
    self,
    x: Array | Sum,
    conditions: Array,
    text: tuple[Array, Array],
    plan: Plan,
    cache: Any,
    layer: Array | int,
    ops: Ops,
    cross: Cross,
  ) -> tuple[Sum, Any]:
    """Runs the layer.

    Args:
      x: tokens `[B, S, E]`, or what the layer before returned.
      conditions: `[B, F, 6, E]` float32 from the timesteps; S is F runs of equal length.
      text: keys and values of the prompts, see `Cross`.
      plan: self-attention plan.
      cache: what the plan needs, or None.
      layer: index of this layer in the cache.
      ops: matmul, attend, between.
      cross: plan of the attention to text.

    Returns:
      (tokens as a sum, which `Between.total` takes; cache).
    """
    between, own, other = between_of(ops), self.self_attn, self.cross_attn
    # shift, factor and gate twice; 1 is added here, where all layers are added to at once
    m = self.modulation[...] + conditions + jnp.asarray([0.0, 1, 0, 0, 1, 0])[:, None]
    m = [p[:, :, None] for p in jnp.moveaxis(m, 2, 0)]
    x, y = between.enter(ops, x, (m[1], m[0]), self.eps, (own.q.path, *own.paths))
    turn, plan = between.turns(ops, plan, x)
    q, k, v = own.products(y, ops)
    k, v = own.keys_values(k, v, ops, turn, between.writes_keys(ops, plan, cache, layer))
    out, cache = ops.attend(own.queries(q, ops, turn), k, v, cache, layer, plan)
    y = product(own.o, between.joined(ops, out, x.shape, (own.o.path,)), ops)
    affine = self.cross_norm.scale[...], self.cross_norm.bias[...]
    x, y = between.add_norm(ops, x, y, m[2], affine, self.eps, (other.q.path,))
    q = other.queries(product(other.q, y, ops), ops)
    out, _ = ops.attend(q, *text, None, layer, cross)
    y = product(other.o, between.joined(ops, out, x.shape, (other.o.path,)), ops)
    x, y = between.add_norm(ops, x, y, None, (m[4], m[3]), self.eps, (self.ffn.up.path,))
    y = between.activate(ops, product(self.ffn.up, y, ops), self.ffn.down.path)
    return Sum(x, product(self.ffn.down, y, ops), m[5]), cache


class Head(nnx.Module):
  """Modulated norm and projection to the velocity of a token."""

  def __init__(self, cfg: Model, channels: int, rngs: nnx.Rngs):
    normal = jax.nn.initializers.normal(cfg.width**-0.5)
    self.modulation = nnx.Param(normal(rngs.params(), (2, cfg.width), jnp.float32))
    zeros = jax.nn.initializers.zeros
    self.proj = Linear(cfg.width, channels * cfg.patch**2, "head/proj", rngs, zeros)
    self.eps = cfg.eps

  def __call__(self, x: Array, embedding: Array, ops: Ops) -> Array:
    """`x [B, S, E]`, embedding of the timesteps `[B, F, E]` -> `[B, S, C * p * p]` float32."""
    batch, frames, width = embedding.shape
    shift, scale = jnp.moveaxis(self.modulation[...] + embedding[:, :, None], 2, 0)
    grouped = x.reshape(batch, frames, -1, width)
    y = modulated_norm(grouped, scale[:, :, None], shift[:, :, None], self.eps).reshape(x.shape)
    return self.proj(y, ops).astype(jnp.float32)
