"""Convolutions of the VAE: causal in time with a carried history, spatial, pointwise.

A causal convolution with a kernel of three frames reads its own frame and the two before it:
`y_t = sum_i W_i x_(t - 2 + i)`. What it carries from one call to the next is the last two frames
of its input; a video starts from zeros.

Two forms of the same sum, because no form is fast everywhere: "conv3d" is one convolution over
(frame, row, column); "conv2d" is one over (row, column) that writes the product with each of the
three taps, which are then shifted in time and added. XLA's CPU backend has no fast path for the
first.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import lax

from longlive_jax.checks import check_choice
from longlive_jax.types import Array

FORMS = ("conv2d", "conv3d")
HISTORY = 2  # frames a causal convolution carries


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
  """Kernel uniform in +-1 / sqrt(fan in), as the original's; the last axis is the output.

  Drawn flat: XLA compiles the counters of a random array of many axes very slowly on CPU.
  """
  bound = math.prod(shape[:-1]) ** -0.5
  flat = jax.random.uniform(rngs.params(), (math.prod(shape),), jnp.float32, -bound, bound)
  return flat.reshape(shape)


def choose_form(form: str | None = None) -> str:
  """The form of the causal convolutions: `form`, or the faster one of the default backend.

  Raises:
    ValueError: unknown form.
  """
  if form is None:
    backend = jax.default_backend()
    form = "conv2d" if backend == "cpu" else "conv3d"
    logging.debug("VAE convolutions on %s: form %s", backend, form)
  check_choice("form", form, FORMS)
  return form


def summed(dtype: jax.typing.DTypeLike) -> np.dtype:
  """The dtype that sums of `dtype` are taken in: float32, or float64 for itself."""
  return jnp.promote_types(dtype, jnp.float32)


def _conv(
  x: Array, kernel: Array, strides: tuple[int, ...], padding: tuple[tuple[int, int], ...]
) -> Array:
  """Channels-last convolution of operands in the dtype of x, summed and given in float32.

  A GPU rounds a half precision sum to the dtype of x: its convolutions with wider results are those
  of widened operands, at a fraction of the speed.
  """
  layout = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
  wide = summed(x.dtype)

  def convolve(x: Array, kernel: Array, dtype: np.dtype) -> Array:
    y = lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=layout, preferred_element_type=dtype
    )
    return y.astype(wide)

  kernel = kernel.astype(x.dtype)
  if x.dtype == wide:
    return convolve(x, kernel, wide)
  return lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(convolve, dtype=wide),
    default=functools.partial(convolve, dtype=x.dtype),
  )


def spatial_conv(
  x: Array, kernel: Array, stride: int = 1, padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1))
) -> Array:
  """Convolves every frame: `[B, T, H, W, C] -> [B, T, H', W', O]` float32; kernel HWIO."""
  batch, frames = x.shape[:2]
  y = _conv(x.reshape(batch * frames, *x.shape[2:]), kernel, (stride, stride), padding)
  return y.reshape(batch, frames, *y.shape[1:])


def time_conv(x: Array, kernel: Array, form: str, stride: int = 1, bordered: bool = False) -> Array:
  """Convolution over frames, rows and columns, without padding in time.

  Args:
    x: `[B, 3 + stride (T - 1), H, W, C]`, the history in front.
    kernel: `[3, kh, kw, C, O]`; rows and columns are padded to keep their number.
    form: "conv2d" or "conv3d".
    stride: in time.
    bordered: x has the rows beside those of the result, which are not padded.

  Returns:
    `[B, T, H, W, O]` float32; kh - 1 rows fewer where `bordered`.

  Source: spec/models.md section 5.3.
  """
  taps, rows, columns, size_in, size_out = kernel.shape
  edge = 0 if bordered else rows // 2
  padding = ((edge, edge), (columns // 2, columns // 2))
  if form == "conv3d":
    return _conv(x, kernel, (stride, 1, 1), ((0, 0), *padding))
  reads = [slice(i, x.shape[1] - taps + i + 1, stride) for i in range(taps)]  # frames of a tap
  if stride == 1:  # one pass over x
    wide = kernel.transpose(1, 2, 3, 0, 4).reshape(rows, columns, size_in, taps * size_out)
    products = jnp.split(spatial_conv(x, wide, padding=padding), taps, -1)
    shifted = [y[:, read] for y, read in zip(products, reads, strict=True)]
  else:
    shifted = [spatial_conv(x[:, read], kernel[i], padding=padding) for i, read in enumerate(reads)]
  return functools.reduce(jnp.add, shifted)


class Pointwise(nnx.Module):
  """1x1x1 convolution, the dense layer over channels; kernel `[in, out]`."""

  def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs):
    self.kernel = nnx.Param(uniform(rngs, (size_in, size_out)))
    self.bias = nnx.Param(jnp.zeros((size_out,), jnp.float32))

  def __call__(self, x: Array) -> Array:
    kernel = self.kernel[...].astype(x.dtype)
    y = jnp.matmul(x, kernel, preferred_element_type=summed(x.dtype))
    return (y + self.bias[...]).astype(x.dtype)


class SpatialConv(nnx.Module):
  """3x3 convolution of every frame; kernel `[3, 3, in, out]`."""

  def __init__(self, size: int, rngs: nnx.Rngs):
    self.kernel = nnx.Param(uniform(rngs, (3, 3, size, size)))
    self.bias = nnx.Param(jnp.zeros((size,), jnp.float32))

  def halve(self, x: Array) -> Array:
    """`[B, T, H, W, C] -> [B, T, H/2, W/2, C]`; zeros on the right and below only."""
    y = spatial_conv(x, self.kernel[...], 2, ((0, 1), (0, 1)))
    return (y + self.bias[...]).astype(x.dtype)

  def double(self, x: Array, bordered: bool = False) -> Array:
    """Repeats every pixel 2x2, then convolves: `[B, T, H, W, C] -> [B, T, 2H, 2W, C]`.

    The three rows that an output row reads are copies of two input rows, so the kernel folds into
    four kernels of 2x2, one for each parity of (row, column): 4/9 of the work, and the repeated
    frames never exist. Where `bordered`, x has one more row above and below, instead of zeros.
    """
    batch, frames, _, width, size = x.shape
    edge = 0 if bordered else 1
    kernel = _fold(_fold(self.kernel[...], 0), 1).reshape(2, 2, size, 4 * size)
    y = spatial_conv(x, kernel, padding=((edge, edge), (1, 1)))
    height = y.shape[2] - 1
    y = y.reshape(batch, frames, height + 1, width + 1, 2, 2, size)
    rows = [
      jnp.stack([y[:, :, q : q + height, r : r + width, q, r] for r in range(2)], 4)
      for q in range(2)
    ]
    y = jnp.stack(rows, 3).reshape(batch, frames, 2 * height, 2 * width, size)
    return (y + self.bias[...]).astype(x.dtype)


def _fold(kernel: Array, axis: int) -> Array:
  """Three taps on doubled pixels as two taps on single ones, for even and odd outputs.

  Args:
    kernel: three taps (a, b, c) along `axis`; the last axis is the output.

  Returns:
    Two taps along `axis` and a new axis before the last one: even (a, b + c), odd (a + b, c).
  """
  a, b, c = jnp.split(kernel, 3, axis)
  even = jnp.concatenate([a, b + c], axis)
  odd = jnp.concatenate([a + b, c], axis)
  return jnp.stack([even, odd], -2)


class CausalConv(nnx.Module):
  """Causal convolution of `[B, T, H, W, C]` with the last two frames of its input as state.

  Args:
    size_in, size_out: channels.
    form: of `time_conv`.
    extent: rows and columns of the kernel, 3 or 1.
  """

  def __init__(self, size_in: int, size_out: int, form: str, rngs: nnx.Rngs, extent: int = 3):
    shape = (3, extent, extent, size_in, size_out)
    self.kernel = nnx.Param(uniform(rngs, shape))
    self.bias = nnx.Param(jnp.zeros((size_out,), jnp.float32))
    self.form = form

  def __call__(self, x: Array, state: Array | None) -> tuple[Array, Array]:
    """Convolves the next frames.

    Args:
      x: `[B, T, H, W, C]`; one frame at the start.
      state: `[B, 2, H, W, C]`; None at the start, which stands for zeros.

    Returns:
      (`[B, T, H, W, O]`, next state).
    """
    kernel = self.kernel[...]
    if state is None:  # two of the three taps would meet zeros
      pad = kernel.shape[1] // 2
      y = spatial_conv(x, kernel[-1], padding=((pad, pad), (pad, pad)))
      frames = jnp.concatenate([jnp.zeros_like(x), x], 1)
    else:
      frames = jnp.concatenate([state, x], 1)
      y = time_conv(frames, kernel, self.form)
    return (y + self.bias[...]).astype(x.dtype), frames[:, -HISTORY:]

  def inside(self, frames: Array) -> Array:
    """Convolves frames that have their history and the rows beside them.

    `[B, 2 + T, 1 + H + 1, W, C] -> [B, T, H, W, O]`.
    """
    y = time_conv(frames, self.kernel[...], self.form, bordered=True)
    return (y + self.bias[...]).astype(frames.dtype)

  def halve(self, x: Array, state: Array) -> tuple[Array, Array]:
    """Convolves every second frame: `[B, 2T, H, W, C] -> [B, T, H, W, O]`.

    Its state is the last frame only, `[B, 1, H, W, C]`.
    """
    frames = jnp.concatenate([state, x], 1)
    y = time_conv(frames, self.kernel[...], self.form, stride=2)
    return (y + self.bias[...]).astype(x.dtype), x[:, -1:]


class ChannelNorm(nnx.Module):
  """`x / max(|x|, 1e-12) sqrt(C) scale` with the length over channels, in float32."""

  def __init__(self, size: int):
    self.scale = nnx.Param(jnp.ones((size,), jnp.float32))

  def __call__(self, x: Array) -> Array:
    wide = x.astype(summed(x.dtype))
    square = jnp.sum(wide * wide, -1, keepdims=True)
    # the floor on the square keeps the gradient finite at zero
    wide = wide * lax.rsqrt(jnp.maximum(square, 1e-24)) * (x.shape[-1] ** 0.5)
    return (wide * self.scale[...]).astype(x.dtype)


def patchify(video: Array) -> Array:
  """`[B, T, 2h, 2w, C] -> [B, T, h, w, 4C]`, features ordered (C, column, row).

  Source: spec/models.md section 5.2.
  """
  batch, frames, height, width, channels = video.shape
  x = video.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
  x = x.transpose(0, 1, 2, 4, 6, 5, 3)
  return x.reshape(batch, frames, height // 2, width // 2, 4 * channels)


def unpatchify(x: Array) -> Array:
  """Inverse of `patchify`."""
  batch, frames, rows, columns, size = x.shape
  video = x.reshape(batch, frames, rows, columns, size // 4, 2, 2)
  video = video.transpose(0, 1, 2, 6, 3, 5, 4)
  return video.reshape(batch, frames, 2 * rows, 2 * columns, size // 4)
