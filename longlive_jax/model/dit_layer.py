"""One layer of the diffusion transformer, and its head.

Source: spec/models.md section 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import Model
from longlive_jax.model.attention import Cross
from longlive_jax.model.layers import AffineNorm, Linear, Mlp, RmsNorm, gelu, xavier
from longlive_jax.model.ops import Ops, Plan
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

  def queries(self, x: Array, ops: Ops, prepared: bool = False) -> Array:
    return self.split(self.norm_q(self.q(x, ops, prepared)))

  def keys_values(self, x: Any, ops: Ops) -> tuple[Array, Array]:
    """Of an input that is prepared."""
    return self.split(self.norm_k(self.k(x, ops, True))), self.split(self.v(x, ops, True))


class Layer(nnx.Module):
  """One transformer layer: modulated self-attention, cross-attention to text, modulated FFN."""

  def __init__(self, cfg: Model, rngs: nnx.Rngs):
    normal = jax.nn.initializers.normal(cfg.width**-0.5)
    self.modulation = nnx.Param(normal(rngs.params(), (6, cfg.width), jnp.float32))
    self.self_attn = Attention(cfg, "layers/self_attn", rngs)
    self.cross_norm = AffineNorm(cfg.width, cfg.eps)
    self.cross_attn = Attention(cfg, "layers/cross_attn", rngs)
    self.ffn = Mlp((cfg.width, cfg.ffn_width, cfg.width), "layers/ffn", rngs, xavier)
    self.eps = cfg.eps

  def __call__(
    self,
    x: Array,
    conditions: Array,
    text: tuple[Array, Array],
    plan: Plan,
    cache: Any,
    layer: Array | int,
    ops: Ops,
    cross: Cross,
  ) -> tuple[Array, Any]:
    """Runs the layer.

    Args:
      x: tokens `[B, S, E]`.
      conditions: `[B, F, 6, E]` float32 from the timesteps; S is F runs of equal length.
      text: keys and values of the prompts, see `Cross`.
      plan: self-attention plan.
      cache: what the plan needs, or None.
      layer: index of this layer in the cache.
      ops: matmul, attend, norm.
      cross: plan of the attention to text.

    Returns:
      (tokens, cache).
    """
    batch, frames = conditions.shape[:2]
    grouped = (batch, frames, -1, x.shape[-1])
    m = [p[:, :, None] for p in jnp.moveaxis(self.modulation[...] + conditions, 2, 0)]

    def add(x: Array, y: Array, gate: Array) -> Array:
      wide = x.reshape(grouped).astype(jnp.float32) + y.reshape(grouped) * gate
      return wide.astype(x.dtype).reshape(x.shape)

    y = ops.norm(x.reshape(grouped), m[1], m[0], self.eps).reshape(x.shape)
    y = ops.prepare(y, (self.self_attn.q.path, *self.self_attn.paths))
    k, v = self.self_attn.keys_values(y, ops)
    out, cache = ops.attend(self.self_attn.queries(y, ops, True), k, v, cache, layer, plan)
    x = add(x, self.self_attn.o(out.reshape(x.shape), ops), m[2])
    q = self.cross_attn.queries(self.cross_norm(x), ops)
    out, _ = ops.attend(q, *text, None, layer, cross)
    x = x + self.cross_attn.o(out.reshape(x.shape), ops)
    y = ops.norm(x.reshape(grouped), m[4], m[3], self.eps).reshape(x.shape)
    return add(x, self.ffn.down(gelu(self.ffn.up(y, ops)), ops), m[5]), cache


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
    y = ops.norm(grouped, scale[:, :, None], shift[:, :, None], self.eps).reshape(x.shape)
    return self.proj(y, ops).astype(jnp.float32)
