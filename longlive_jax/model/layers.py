"""Layers of the transformers: linear, norms, timestep embedding, patches.

Source: spec/models.md sections 1.2 to 1.8 and 1.12.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.model.ops import Ops
from longlive_jax.types import Array, Initializer

xavier = jax.nn.initializers.xavier_uniform()


class Linear(nnx.Module):
  """`y = x @ kernel + bias` through `Ops.matmul`; kernel `[in, out]` float32."""

  def __init__(
    self, size_in: int, size_out: int, path: str, rngs: nnx.Rngs, init: Initializer = xavier
  ):
    self.kernel = nnx.Param(init(rngs.params(), (size_in, size_out), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((size_out,), jnp.float32))
    self.path = path

  def __call__(self, x: Array, ops: Ops) -> Array:
    x = ops.prepare(x, (self.path,))
    kernel = self.kernel.get_value()  # an array, or a quantised one
    return ops.matmul(x, kernel, self.bias[...], path=self.path, key=ops.key_of(self.path))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """`x / rms(x) * weight` over the last axis, in float32 until the end."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
  return (wide * weight).astype(x.dtype)


class RmsNorm(nnx.Module):
  """`rms_norm` with its weight."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    return rms_norm(x, self.scale[...], self.eps)


class AffineNorm(nnx.Module):
  """Weight and bias of a LayerNorm."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))


@jax.custom_vjp
def gelu(x: Array) -> Array:
  """GELU, tanh approximation, in float32, result in the dtype of x.

  `(1 + tanh u) / 2` is the logistic function of 2 u, which takes a GPU fewer instructions. Its
  gradient is rounded before anything else is made of it: to be summed for a bias and multiplied, it
  would be written in float32.
  """
  wide = x.astype(jnp.float32)
  return (wide * jax.nn.sigmoid(_gelu_turn(wide))).astype(x.dtype)


def _gelu_turn(wide: Array) -> Array:
  return math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3)


def _gelu_gradient(x: Array, g: Array) -> tuple[Array]:
  wide = x.astype(jnp.float32)
  share, slope = jax.vjp(lambda w: jax.nn.sigmoid(_gelu_turn(w)), wide)
  dx = g.astype(jnp.float32)
  dx = dx * share + slope(dx * wide)[0]
  return (jax.lax.optimization_barrier(dx.astype(x.dtype)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


class Mlp(nnx.Module):
  """Two linear layers with an activation between them."""

  def __init__(self, sizes: tuple[int, int, int], path: str, rngs: nnx.Rngs, init: Initializer):
    self.up = Linear(sizes[0], sizes[1], f"{path}/up", rngs, init)
    self.down = Linear(sizes[1], sizes[2], f"{path}/down", rngs, init)


@functools.lru_cache(maxsize=8)
def _whole_timesteps(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Frequencies, and cos and sin `[1001, width / 2]` of the whole timesteps, from float64."""
  half = width // 2
  frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
  turn = np.arange(1001)[:, None] * frequencies
  return tuple(a.astype(np.float32) for a in (frequencies, np.cos(turn), np.sin(turn)))  # type: ignore[return-value]


def sinusoid(timesteps: Array, width: int) -> Array:
  """Embeds timesteps: `[cos(t w_i), sin(t w_i)]` with `w_i = 10000^(-2 i / width)`.

  Args:
    timesteps: any shape, float32 in [0, 1000].
    width: even.

  Returns:
    `[..., width]` float32, cosines first.

  Numerics: a float32 product t w loses 6e-5 rad at t = 1000. The whole part of t is looked up in
    a float64-made table and the angle of the fraction is added by the addition theorem, which is
    exact to float32 rounding.
  """
  frequencies, cos_table, sin_table = _whole_timesteps(width)
  whole = jnp.clip(jnp.floor(timesteps), 0, 1000)
  turn = (timesteps - whole)[..., None] * frequencies
  index = whole.astype(jnp.int32)
  cos_a, sin_a = jnp.asarray(cos_table)[index], jnp.asarray(sin_table)[index]
  cos_b, sin_b = jnp.cos(turn), jnp.sin(turn)
  return jnp.concatenate([cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b], -1)


def patchify(latents: Array, patch: int) -> Array:
  """`[B, F, H, W, C] -> [B, F * H/p * W/p, C * p * p]`, features ordered (C, row, column)."""
  batch, frames, height, width, channels = latents.shape
  rows, columns = height // patch, width // patch
  x = latents.reshape(batch, frames, rows, patch, columns, patch, channels)
  x = x.transpose(0, 1, 2, 4, 6, 3, 5)
  return x.reshape(batch, frames * rows * columns, channels * patch * patch)


def unpatchify(tokens: Array, shape: tuple[int, int, int], patch: int) -> Array:
  """Inverse of the head: `[B, F * H/p * W/p, p * p * C] -> [B, F, H, W, C]`.

  Args:
    tokens: features ordered (row, column, C): other than in `patchify`, as in the original.
    shape: (F, H, W).
    patch: p.
  """
  frames, height, width = shape
  rows, columns = height // patch, width // patch
  x = tokens.reshape(tokens.shape[0], frames, rows, columns, patch, patch, -1)
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(tokens.shape[0], frames, height, width, -1)
