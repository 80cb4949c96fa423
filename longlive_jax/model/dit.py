"""The diffusion transformer (Wan2.2-TI2V-5B): one network for every forward.

Bidirectional, block-causal, teacher-forcing and cached forwards differ only in the attention
`plan` that is passed in. Layers are stacked and scanned. Timesteps are one per latent, so that
given latents (image-to-video, context) are simply latents at timestep 0.

Source: spec/models.md sections 1 and 3.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import register_dataclass

from longlive_jax.config import Model
from longlive_jax.model.attention import Cross
from longlive_jax.model.layers import (
  AffineNorm,
  Linear,
  Mlp,
  RmsNorm,
  gelu,
  patchify,
  sinusoid,
  unpatchify,
  xavier,
)
from longlive_jax.model.module import Network, declare, stack_layers
from longlive_jax.model.ops import ATTENDED, PACKED, PRODUCT, REFERENCE, Ops, Plan
from longlive_jax.types import Array

# What a layer keeps for its backward pass.
KEPT = jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENDED, PACKED)
REMAT = {"dots": KEPT, "full": None}

small_normal = jax.nn.initializers.normal(0.02)


@functools.partial(register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TextKV:
  """Cross-attention keys and values of prompts, `[layers, B * P, L, N, D]`: one set a prompt."""

  k: Array
  v: Array


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

  def split(self, x: Array) -> Array:
    """`[B, S, E] -> [B, S, N, D]`."""
    return x.reshape(*x.shape[:2], self.heads, -1)

  def queries(self, x: Array, ops: Ops) -> Array:
    return self.split(self.norm_q(self.q(x, ops)))

  def keys_values(self, x: Array, ops: Ops) -> tuple[Array, Array]:
    return self.split(self.norm_k(self.k(x, ops))), self.split(self.v(x, ops))


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
    pieces: int,
  ) -> tuple[Array, Any]:
    """Runs the layer.

    Args:
      x: tokens `[B, S, E]`.
      conditions: `[B, F, 6, E]` float32 from the timesteps; S is F runs of equal length.
      text: keys and values `[B * pieces, L, N, D]`.
      plan: self-attention plan.
      cache: what the plan needs, or None.
      layer: index of this layer in the cache.
      ops: matmul, attend, norm.
      pieces: prompts a sample.

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
    k, v = self.self_attn.keys_values(y, ops)
    out, cache = ops.attend(self.self_attn.queries(y, ops), k, v, cache, layer, plan)
    out = checkpoint_name(out, ATTENDED)
    x = add(x, self.self_attn.o(out.reshape(x.shape), ops), m[2])
    q = self.cross_attn.queries(self.cross_norm(x), ops)
    out, _ = ops.attend(q, *text, None, layer, Cross(pieces))
    out = checkpoint_name(out, ATTENDED)
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


class DiT(nnx.Module):
  """The network. Compute dtype is `cfg.dtype`; parameters are float32 until they are cast."""

  def __init__(self, cfg: Model, rngs: nnx.Rngs):
    width, channels = cfg.width, cfg.vae.latent_channels
    self.patch_embed = Linear(channels * cfg.patch**2, width, "patch_embed", rngs)
    self.text_embed = Mlp((cfg.text.width, width, width), "text_embed", rngs, small_normal)
    sizes = (cfg.frequency_width, width, width)
    self.time_embed = Mlp(sizes, "time_embed", rngs, small_normal)
    self.time_proj = Linear(width, 6 * width, "time_proj", rngs)
    self.layers = stack_layers(lambda r: Layer(cfg, r), cfg.layers, rngs)
    self.head = Head(cfg, channels, rngs)
    self.cfg = cfg

  def embed_times(self, timesteps: Array, ops: Ops) -> tuple[Array, Array]:
    """Timesteps `[B, F]` -> embedding `[B, F, E]` and layer conditions `[B, F, 6, E]`, float32."""
    x = sinusoid(timesteps.astype(jnp.float32), self.cfg.frequency_width)
    e = self.time_embed.down(jax.nn.silu(self.time_embed.up(x, ops)), ops)
    conditions = self.time_proj(jax.nn.silu(e), ops)
    return e, conditions.reshape(*e.shape[:2], 6, -1)

  def text_kv(self, prompts: Array, ops: Ops = REFERENCE) -> TextKV:
    """Cross-attention keys and values of prompt embeddings, computed once a prompt.

    Args:
      prompts: `[B, L, E_text]`; with P prompts a sample `[B * P, L, E_text]`, sample-major.
      ops: matmul.

    Returns:
      TextKV of `[layers, B, L, N, D]`.
    """
    x = prompts.astype(self.cfg.dtype)
    x = self.text_embed.down(gelu(self.text_embed.up(x, ops)), ops)
    graph, state = nnx.split(self.layers)

    def one(_: None, inputs: Any) -> tuple[None, tuple[Array, Array]]:
      index, params = inputs
      return None, nnx.merge(graph, params).cross_attn.keys_values(x, ops.in_layer(index))

    return TextKV(*jax.lax.scan(one, None, (jnp.arange(self.cfg.layers), state))[1])

  def __call__(
    self,
    latents: Array,
    timesteps: Array,
    text: TextKV,
    plan: Plan,
    *,
    cache: Any = None,
    context: Array | None = None,
    context_timesteps: Array | None = None,
    pieces: int = 1,
    head: bool = True,
    remat: str = "none",
    ops: Ops = REFERENCE,
  ) -> tuple[Array | None, Any]:
    """Predicts velocities.

    Args:
      latents: `[B, F, H, W, C]`.
      timesteps: `[B, F]` float32 in [0, 1000].
      text: keys and values of `pieces` prompts a sample.
      plan: self-attention plan; it carries the rotary tables.
      cache: cache for a cached plan.
      context: teacher forcing: clean latents of the same shape, put before the latents.
      context_timesteps: `[B, F]`; default 0.
      pieces: prompts a sample; each half of the tokens is cut into as many equal runs.
      head: False stops after the layers (a pass that only fills the cache).
      remat: the backward pass recomputes: none | dots (all but products and attention) | full.
      ops: matmul, attend, norm.

    Returns:
      (velocities `[B, F, H, W, C]` float32 or None, cache).
    """
    dtype, patch = self.cfg.dtype, self.cfg.patch
    embedding, conditions = self.embed_times(timesteps, ops)
    x = self.patch_embed(patchify(latents.astype(dtype), patch), ops)
    tokens = x.shape[1]
    if context is not None:
      zeros = jnp.zeros_like(timesteps)
      times = zeros if context_timesteps is None else context_timesteps
      conditions = jnp.concatenate([self.embed_times(times, ops)[1], conditions], 1)
      x = jnp.concatenate([self.patch_embed(patchify(context.astype(dtype), patch), ops), x], 1)
      text = jax.tree.map(lambda a: _twice(a, pieces), text) if pieces > 1 else text
      pieces = 2 * pieces if pieces > 1 else 1
    x, cache = self._scan(x, conditions, text, plan, cache, ops, pieces, remat)
    if not head:
      return None, cache
    out = self.head(x[:, -tokens:], embedding, ops)
    frames, height, width = latents.shape[1:4]
    return unpatchify(out, (frames, height, width), patch), cache

  def _scan(
    self,
    x: Array,
    conditions: Array,
    text: TextKV,
    plan: Plan,
    cache: Any,
    ops: Ops,
    pieces: int,
    remat: str,
  ) -> tuple[Array, Any]:
    graph, state = nnx.split(self.layers)

    def body(carry: tuple[Array, Any], inputs: Any) -> tuple[tuple[Array, Any], None]:
      index, params, text_k, text_v = inputs
      layer = nnx.merge(graph, params)
      x, cache = carry
      here = ops.in_layer(index)
      return layer(x, conditions, (text_k, text_v), plan, cache, index, here, pieces), None

    if remat != "none":
      body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
    inputs = (jnp.arange(self.cfg.layers), state, text.k, text.v)
    return jax.lax.scan(body, (x, cache), inputs)[0]


def _twice(a: Array, pieces: int) -> Array:
  """`[layers, B * P, ...] -> [layers, B * 2P, ...]`: each half of the tokens has all prompts."""
  grouped = a.reshape(a.shape[0], -1, pieces, *a.shape[2:])
  return jnp.concatenate([grouped, grouped], 2).reshape(a.shape[0], -1, *a.shape[2:])


def declare_dit(cfg: Model) -> Network:
  """Declares the network of a configuration."""
  return declare(lambda rngs: DiT(cfg, rngs))
