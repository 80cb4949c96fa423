"""The text encoder: UMT5, encoder only.

    x = x + softmax(q k + bias(key - query)) v o          h = rms(x), no 1 / sqrt(D)
    x = x + (gelu(h gate) * (h up)) down                  h = rms(x)

Each layer has its own table of position biases. Masked keys have their bias, not their logit,
replaced by the lowest number. Rows past the prompt are zeroed at the end: downstream nothing is
masked.

Source: spec/models.md section 4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.checks import check_divides
from longlive_jax.config import Text
from longlive_jax.model.layers import RmsNorm, gelu
from longlive_jax.model.module import Network, declare, stack_layers
from longlive_jax.model.ops import plain_matmul
from longlive_jax.types import Array, PyTree

EPS = 1e-6
# the frozen encoder: fall of a head's bias per byte of distance from its offset, where the fall
# ends, how far the wide heads see, and the scale of its query and key kernels
SHARPNESS, CAP = 3.0, 3.0
WIDE = 22
QUERY_SCALE = 0.35


class Linear(nnx.Module):
  """`y = x @ kernel`, no bias; kernel `[in, out]`."""

  def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs):
    init = jax.nn.initializers.normal(size_in**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (size_in, size_out), jnp.float32))

  def __call__(self, x: Array) -> Array:
    return plain_matmul(x, self.kernel[...], None, path="text", key=None)


class Layer(nnx.Module):
  """One encoder layer."""

  def __init__(self, cfg: Text, rngs: nnx.Rngs):
    width, inner = cfg.width, cfg.attention_width
    self.norm1 = RmsNorm(width, EPS)
    self.q = Linear(width, inner, rngs)
    self.k = Linear(width, inner, rngs)
    self.v = Linear(width, inner, rngs)
    self.o = Linear(inner, width, rngs)
    init = jax.nn.initializers.normal(0.5)
    self.positions = nnx.Param(init(rngs.params(), (cfg.buckets, cfg.heads), jnp.float32))
    self.norm2 = RmsNorm(width, EPS)
    self.gate = Linear(width, cfg.ffn_width, rngs)
    self.up = Linear(width, cfg.ffn_width, rngs)
    self.down = Linear(cfg.ffn_width, width, rngs)
    self.heads = cfg.heads

  def __call__(self, x: Array, buckets: np.ndarray, mask: Array | None) -> Array:
    """`x [B, L, E]`, buckets `[L, L]` (query, key), mask `[B, L]` of keys -> `[B, L, E]`."""
    x = x + self.attend(self.norm1(x), self.bias(buckets, mask))
    h = self.norm2(x)
    return x + self.down(gelu(self.gate(h)) * self.up(h))

  def bias(self, buckets: np.ndarray, mask: Array | None) -> Array:
    """`[1 or B, N, L, L]` float32: biases of the relative positions, lowest at masked keys."""
    bias = self.positions[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
    if mask is None:
      return bias
    return jnp.where(mask[:, None, None, :] > 0, bias, jnp.finfo(jnp.float32).min)

  def attend(self, h: Array, bias: Array) -> Array:
    """Self-attention of normalised `h [B, L, E]`; logits and softmax in float32."""
    split = (*h.shape[:2], self.heads, -1)
    q, k, v = (project(h).reshape(split) for project in (self.q, self.k, self.v))
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias, -1).astype(v.dtype)
    out = jnp.einsum("bnqk,bknd->bqnd", weights, v, preferred_element_type=jnp.float32)
    return self.o(out.astype(h.dtype).reshape(*h.shape[:2], -1))


class TextEncoder(nnx.Module):
  """The encoder."""

  def __init__(self, cfg: Text, rngs: nnx.Rngs):
    init = jax.nn.initializers.normal(1.0)
    self.embedding = nnx.Param(init(rngs.params(), (cfg.vocabulary, cfg.width), jnp.float32))
    self.layers = stack_layers(lambda r: Layer(cfg, r), cfg.layers, rngs)
    self.norm = RmsNorm(cfg.width, EPS)
    self.buckets = cfg.buckets
    self.max_distance = cfg.max_distance

  def __call__(
    self,
    ids: Array,
    mask: Array | None,
    *,
    zero_padding: bool = True,
    dtype: str = "float32",
  ) -> Array:
    """Encodes prompts.

    Args:
      ids: `[B, L]` int32.
      mask: `[B, L]`, 1 at real tokens; None = all are real.
      zero_padding: set the rows of padding to 0.
      dtype: of activations and matrix products; norms and softmax are float32.

    Returns:
      `[B, L, E]` in `dtype`.
    """
    return self.end(self.run(self.begin(ids, dtype), mask)[0], mask, zero_padding)

  def hidden(self, ids: Array, mask: Array | None, dtype: str = "float32") -> Array:
    """Output of every layer, `[layers, B, L, E]`, before the last norm."""
    return self.run(self.begin(ids, dtype), mask)[1]

  def begin(self, ids: Array, dtype: str) -> Array:
    """What the first layer takes, `[B, L, E]` in `dtype`."""
    return self.embedding[...][ids].astype(dtype)

  def run(self, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Output of the last layer, and of every layer."""
    buckets = relative_buckets(x.shape[1], self.buckets, self.max_distance)
    graph, state = nnx.split(self.layers)

    def body(x: Array, params: Any) -> tuple[Array, Array]:
      x = nnx.merge(graph, params)(x, buckets, mask)
      return x, x

    return jax.lax.scan(body, x, state)

  def end(self, x: Array, mask: Array | None, zero_padding: bool = True) -> Array:
    """What the encoder returns, of the output of the last layer."""
    x = self.norm(x)
    return jnp.where(mask[..., None] > 0, x, 0) if zero_padding and mask is not None else x


def bucket_of(distance: int, buckets: int, max_distance: int) -> int:
  """Bucket of `distance` >= 0 within one direction that has `buckets` of them.

  The first half counts single distances; the rest grows with the logarithm,
  `e + floor((n - e) ln(d / e) / ln(D / e))` for e = n // 2, evaluated in whole numbers: it is the
  greatest t with `d^(n-e) e^t >= D^t e^(n-e)`.
  """
  exact = buckets // 2
  if distance < exact:
    return distance
  rest = buckets - exact
  step = 0
  while step + 1 < rest and (
    distance**rest * exact ** (step + 1) >= max_distance ** (step + 1) * exact**rest
  ):
    step += 1
  return exact + step


@functools.lru_cache(maxsize=16)
def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
  """Buckets `[L, L]` int32 (query, key): the first half looks back, the second ahead."""
  half = buckets // 2
  near = [bucket_of(d, half, max_distance) for d in range(min(length, max_distance + 1))]
  table = np.array(near + [half - 1] * (length - len(near)), np.int32)
  relative = np.arange(length)[None] - np.arange(length)[:, None]
  return table[np.abs(relative)] + half * (relative > 0).astype(np.int32)


def declare_text(cfg: Text) -> Network:
  """Declares the encoder of a configuration.

  Raises:
    ValueError: the widths do not divide into heads, or the buckets into two directions.
  """
  check_divides("model.text.attention_width", cfg.attention_width, "model.text.heads", cfg.heads)
  check_divides("model.text.buckets", cfg.buckets, "two directions of two", 4)
  return declare(lambda rngs: TextEncoder(cfg, rngs))


def frozen_params(network: Network, cfg: Text) -> PyTree:
  """Parameters of an encoder that is never trained: random features of the bytes around.

  Heads look at one fixed offset each (the first layer at -1, 1, -2, 2, ..., layer l at l + 1 times
  as far), and two at everything within `WIDE` bytes behind or ahead. With random values and a
  random gated FFN between, a row is a random nonlinear function of the text around its byte,
  from which words and their order can be read off by attention.

  Args:
    network: `declare_text(cfg)`.
    cfg: text encoder with `frozen_seed` >= 0.

  Returns:
    Nested dict of float32 arrays; the same seed gives the same numbers.

  Raises:
    ValueError: `frozen_seed` is negative.
  """
  if cfg.frozen_seed < 0:
    raise ValueError(f"model.text.frozen_seed={cfg.frozen_seed} must be >= 0 for a frozen encoder")
  params = network.init(cfg.frozen_seed)
  layers = dict(params["layers"])
  for name in ("q", "k"):
    layers[name] = jax.tree.map(lambda a: a * QUERY_SCALE, layers[name])
  tables = [local_bias(cfg, stride) for stride in range(1, cfg.layers + 1)]
  layers["positions"] = jnp.asarray(np.stack(tables), jnp.float32)
  return {**params, "layers": layers}


def local_bias(cfg: Text, stride: int) -> np.ndarray:
  """Bias table `[buckets, heads]` of heads that look at offsets -stride, stride, -2 stride, ..."""
  half = cfg.buckets // 2
  reach = range(cfg.max_distance + 1)
  near = [bucket_of(d, half, cfg.max_distance) for d in reach]
  first = np.array([near.index(b) for b in range(half)])  # smallest distance of each bucket
  relative = np.concatenate([-first, first])
  table = np.zeros((cfg.buckets, cfg.heads))
  wide = 2 if cfg.heads >= 4 else 0
  for head in range(cfg.heads - wide):
    offset = min((head // 2 + 1) * stride, half // 2 - 1) * (1 if head % 2 else -1)
    table[:, head] = -SHARPNESS * np.minimum(np.abs(relative - offset), CAP)
  for head in range(cfg.heads - wide, cfg.heads):
    side = relative if head % 2 else -relative
    table[:, head] = np.where((side > 0) & (side <= WIDE), 0.0, -SHARPNESS * CAP)
  return table
