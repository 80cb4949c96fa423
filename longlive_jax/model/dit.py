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
from jax.tree_util import register_dataclass

from longlive_jax.config import Model
from longlive_jax.io.leaves import path_name
from longlive_jax.model.attention import Cross, pair
from longlive_jax.model.between import Sum, between_of
from longlive_jax.model.dit_layer import Head, Layer
from longlive_jax.model.grown import Grown
from longlive_jax.model.layers import Linear, Mlp, gelu, patchify, sinusoid, unpatchify
from longlive_jax.model.module import Network, declare, stack_layers
from longlive_jax.model.ops import ATTENDED, INPUT, PACKED, PRODUCT, REFERENCE, Ops, Plan, is_costly
from longlive_jax.types import Array, PyTree


def _is_cudnn_attention(primitive: Any, *avals: Any, **_: Any) -> bool:
  """Results of cuDNN's self-attention, among them the sums that its backward needs."""
  if primitive.name != "dot_product_attention_fwd_wrapper":
    return False
  queries, keys = avals[:2]
  return is_costly(queries.shape[1], keys.shape[1])


def _only(*names: str) -> Any:
  """Policy that keeps results by name, and those of cuDNN's attention."""
  policies = jax.checkpoint_policies
  named = policies.save_only_these_names(*names)
  return policies.save_from_both_policies(named, _is_cudnn_attention)


# What a layer keeps for its backward pass; all else is recomputed. With "inputs" it keeps what
# products multiply, packed where they are quantised; with "none" it keeps all.
REMAT = {
  "dots": _only(PRODUCT, ATTENDED, PACKED),
  "inputs": _only(INPUT, ATTENDED, PACKED),
  "attention": _only(ATTENDED),
  "full": None,
}

small_normal = jax.nn.initializers.normal(0.02)


@functools.partial(register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TextKV:
  """Cross-attention keys and values of prompts, `[layers, B * P, L, N, D]`: one set a prompt.

  Of an unrolled network they are tuples, with an array a layer.
  """

  k: Array | tuple[Array, ...]
  v: Array | tuple[Array, ...]


class DiT(nnx.Module):
  """The network. Compute dtype is `cfg.dtype`; parameters are float32 until they are cast.

  Args:
    cfg: sizes.
    rngs: for fresh parameters.
    unrolled: layers have their own parameters each, see `separate_layers`, and a cache each, with
      a layer axis of 1: nothing is sliced out of stacks, and more is compiled.
  """

  def __init__(self, cfg: Model, rngs: nnx.Rngs, unrolled: bool = False):
    width, channels = cfg.width, cfg.vae.latent_channels
    self.patch_embed = Linear(channels * cfg.patch**2, width, "patch_embed", rngs)
    self.text_embed = Mlp((cfg.text.width, width, width), "text_embed", rngs, small_normal)
    sizes = (cfg.frequency_width, width, width)
    self.time_embed = Mlp(sizes, "time_embed", rngs, small_normal)
    self.time_proj = Linear(width, 6 * width, "time_proj", rngs)
    if unrolled:
      self.layers = nnx.List([Layer(cfg, rngs) for _ in range(cfg.layers)])
    else:
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
      TextKV of `[layers, B, L, N, D]`, or of tuples.
    """
    x = prompts.astype(self.cfg.dtype)
    x = self.text_embed.down(gelu(self.text_embed.up(x, ops)), ops)
    first = self.layers[0] if isinstance(self.layers, nnx.List) else self.layers
    x = ops.prepare(x, first.cross_attn.paths)
    if isinstance(self.layers, nnx.List):
      pairs = [a.cross_attn.text(x, ops.in_layer(i)) for i, a in enumerate(self.layers)]
      return TextKV(*zip(*pairs, strict=True))
    graph, state = nnx.split(self.layers)

    def one(_: None, inputs: Any) -> tuple[None, tuple[Array, Array]]:
      index, params = inputs
      return None, nnx.merge(graph, params).cross_attn.text(x, ops.in_layer(index))

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
      cache: cache for a cached plan; for `Grown` the earlier blocks.
      context: teacher forcing: clean latents of the same shape; the plan sees pairs of rows.
      context_timesteps: `[B, F]`; default 0.
      pieces: prompts a sample; the tokens are cut into as many equal runs.
      head: False stops after the layers (a pass that only fills the cache).
      remat: what the backward pass recomputes, see `REMAT`.
      ops: matmul, attend, norm.

    Returns:
      (velocities `[B, F, H, W, C]` float32 or None, cache).
    """
    dtype, patch = self.cfg.dtype, self.cfg.patch
    embedding, conditions = self.embed_times(timesteps, ops)
    x = self.patch_embed(patchify(latents.astype(dtype), patch), ops)
    if context is not None:
      zeros = jnp.zeros_like(timesteps)
      times = zeros if context_timesteps is None else context_timesteps
      conditions = pair(self.embed_times(times, ops)[1], conditions)
      x = pair(self.patch_embed(patchify(context.astype(dtype), patch), ops), x)
    cross = Cross(pieces, 1 if context is None else 2)
    run = self._loop if isinstance(self.layers, nnx.List) else self._scan
    x, cache = run(x, conditions, text, plan, cache, ops, cross, remat)
    if not head:
      return None, cache
    out = self.head(x if context is None else x[1::2], embedding, ops)
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
    cross: Cross,
    remat: str,
  ) -> tuple[Array, Any]:
    graph, state = nnx.split(self.layers)

    grown = isinstance(plan, Grown)  # then a layer is given its own part and hands back another

    def body(carry: tuple[Array, Any], inputs: Any) -> tuple[tuple[Array, Any], Any]:
      index, params, text_k, text_v, given = inputs
      layer = nnx.merge(graph, params)
      x, cache = carry
      here, texts = ops.in_layer(index), (text_k, text_v)
      total, made = layer(x, conditions, texts, plan, given if grown else cache, index, here, cross)
      x = between_of(here).total(total)
      return ((x, None), made) if grown else ((x, made), None)

    if remat != "none":
      body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
    given, carried = (cache, None) if grown else (None, cache)
    inputs = (jnp.arange(self.cfg.layers), state, text.k, text.v, given)
    (x, carried), made = jax.lax.scan(body, (x, carried), inputs)
    return x, made if grown else carried

  def _loop(
    self,
    x: Array,
    conditions: Array,
    text: TextKV,
    plan: Plan,
    cache: Any,
    ops: Ops,
    cross: Cross,
    remat: str,
  ) -> tuple[Array, Any]:
    if remat != "none":
      raise ValueError(f"remat={remat} is for stacked layers")
    graph = nnx.split(self.layers[0])[0]

    @jax.jit  # so that one layer is traced, not all
    def one(
      state: Any, x: Array | Sum, texts: Any, cache: Any, key: Array | None
    ) -> tuple[Sum, Any]:
      layer, here = nnx.merge(graph, state), ops.with_key(key)
      return layer(x, conditions, texts, plan, cache, 0, here, cross)

    caches = [None] * len(self.layers) if cache is None else list(cache)
    total: Array | Sum = x
    for i, layer in enumerate(self.layers):
      state, texts = nnx.split(layer)[1], (text.k[i], text.v[i])
      total, caches[i] = one(state, total, texts, caches[i], ops.in_layer(i).key)
    return between_of(ops).total(total), None if cache is None else tuple(caches)


def declare_dit(cfg: Model, unrolled: bool = False) -> Network:
  """Declares the network of a configuration; see `DiT`."""
  return declare(lambda rngs: DiT(cfg, rngs, unrolled))


def is_unrolled(network: Network) -> bool:
  """Whether a declared network has separate layers."""
  return 0 in network.abstract["layers"]


def separate_layers(params: PyTree) -> PyTree:
  """Parameters of the stacked network as those of the unrolled one, each in its own buffer."""
  count = jax.tree.leaves(params["layers"])[0].shape[0]
  return params | {
    "layers": {i: jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(count)}
  }


def cast_params(params: PyTree, dtype: str) -> PyTree:
  """Casts the matrices of the transformer that are multiplied in `dtype`.

  What is used in float32 stays float32: norms, biases, modulation, the embedding of timesteps.
  """

  def cast(path: tuple[Any, ...], leaf: Array) -> Array:
    name = path_name(path)
    narrow = name.endswith("/kernel") and not name.startswith("time_")
    return leaf.astype(jnp.dtype(dtype)) if narrow else leaf

  return jax.tree_util.tree_map_with_path(cast, params)
