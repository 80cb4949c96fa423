"""Encoder and decoder of the VAE, as sequences of parts with carried state.

Every part maps `(x, state) -> (x, state)`. The state of a part is a nested tuple of the frames its
convolutions carry, in the order in which they run; a part without memory has the empty tuple. None
instead of a state means the start of a video: one frame (or latent), nothing before it.

The large parts of the decoder compute all but the start in `tiles` strips of rows.

Source: spec/models.md sections 5.3 to 5.7.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import Vae as Config
from longlive_jax.model.conv import (
  HISTORY,
  CausalConv,
  ChannelNorm,
  Pointwise,
  SpatialConv,
  summed,
)
from longlive_jax.model.tiles import Strip, by_strips, convolved
from longlive_jax.types import Array

State = Any  # nested tuple of arrays
Pair = tuple[int, int]
Part = Callable[[Array, State | None], tuple[Array, State]]


def _split(state: State | None, count: int) -> tuple[State | None, ...]:
  return (None,) * count if state is None else state


def run(parts: Sequence[Part], x: Array, state: State | None) -> tuple[Array, State]:
  """Runs parts in order; their states together are a tuple."""
  states = []
  for part, before in zip(parts, _split(state, len(parts)), strict=True):
    x, after = part(x, before)
    states.append(after)
  return x, tuple(states)


class Residual(nnx.Module):
  """`shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))`."""

  def __init__(self, size_in: int, size_out: int, form: str, rngs: nnx.Rngs):
    self.norm1 = ChannelNorm(size_in)
    self.conv1 = CausalConv(size_in, size_out, form, rngs)
    self.norm2 = ChannelNorm(size_out)
    self.conv2 = CausalConv(size_out, size_out, form, rngs)
    self.shortcut = Pointwise(size_in, size_out, rngs) if size_in != size_out else None

  def __call__(self, x: Array, state: State | None, tiles: int = 1) -> tuple[Array, State]:
    def skip(strip: Strip | None) -> Array:
      part = x if strip is None else strip.rows(x)
      return part if self.shortcut is None else self.shortcut(part)

    first, second = _split(state, 2)
    y, first = convolved(self.norm1, self.conv1, x, first, tiles)
    y, second = convolved(self.norm2, self.conv2, y, second, tiles, skip)
    return y, (first, second)


def residuals(sizes: Pair, count: int, form: str, rngs: nnx.Rngs) -> list[Residual]:
  """`count` residual blocks, of which the first changes the number of channels."""
  size_in, size_out = sizes
  return [Residual(size_out if i else size_in, size_out, form, rngs) for i in range(count)]


class FrameAttention(nnx.Module):
  """Single-head self-attention over the positions of each frame, with a residual."""

  def __init__(self, size: int, rngs: nnx.Rngs):
    self.norm = ChannelNorm(size)
    self.qkv = Pointwise(size, 3 * size, rngs)
    self.out = Pointwise(size, size, rngs)

  def __call__(self, x: Array, state: State | None) -> tuple[Array, State]:
    batch, frames, height, width, size = x.shape
    tokens = self.qkv(self.norm(x)).reshape(batch, frames, height * width, 3 * size)
    q, k, v = jnp.split(tokens, 3, -1)
    logits = jnp.einsum("btqc,btkc->btqk", q, k, preferred_element_type=summed(x.dtype))
    weights = jax.nn.softmax(logits * size**-0.5, -1).astype(x.dtype)
    y = jnp.einsum("btqk,btkc->btqc", weights, v, preferred_element_type=summed(x.dtype))
    return x + self.out(y.astype(x.dtype).reshape(x.shape)), ()


class Downsample(nnx.Module):
  """Halves rows and columns, then frames where `temporal`; the first frame stays alone."""

  def __init__(self, size: int, temporal: bool, form: str, rngs: nnx.Rngs):
    self.spatial = SpatialConv(size, rngs)
    self.temporal = CausalConv(size, size, form, rngs, extent=1) if temporal else None

  def __call__(self, x: Array, state: State | None) -> tuple[Array, State]:
    x = self.spatial.halve(x)
    if self.temporal is None:
      return x, ()
    if state is None:
      return x, x
    return self.temporal.halve(x, state)


class Upsample(nnx.Module):
  """Doubles frames where `temporal`, with `frames`, then rows and columns, with `spatial.double`.

  The first latent is not doubled and the temporal convolution never sees it.
  """

  def __init__(self, size: int, temporal: bool, form: str, rngs: nnx.Rngs):
    self.spatial = SpatialConv(size, rngs)
    self.temporal = CausalConv(size, 2 * size, form, rngs, extent=1) if temporal else None

  def frames(self, x: Array, state: State | None) -> tuple[Array, State]:
    batch, frames, height, width, size = x.shape
    if self.temporal is None:
      return x, ()
    if state is None:
      return x, jnp.zeros((batch, HISTORY, height, width, size), x.dtype)
    x, state = self.temporal(x, state)
    x = x.reshape(batch, frames, height, width, 2, size).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(batch, 2 * frames, height, width, size), state


def average_down(x: Array, size_out: int, time: int, space: int) -> Array:
  """Shortcut of an encoder stage: averages groups of (channel, frame, row, column).

  Args:
    x: `[B, T, H, W, C]`; frames are filled up with zeros in front to a multiple of `time`.
    size_out: channels O; C time space^2 / O elements are averaged, channel slowest.
    time, space: factors.

  Returns:
    `[B, T', H / space, W / space, O]`.
  """
  missing = -x.shape[1] % time
  x = jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
  batch, frames, height, width, size = x.shape
  shape = (batch, frames // time, height // space, width // space)
  x = x.reshape(*shape[:2], time, shape[2], space, shape[3], space, size)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(*shape, size_out, -1)
  return jnp.mean(x, -1, dtype=summed(x.dtype)).astype(x.dtype)


def duplicate_up(x: Array, size_out: int, time: int, space: int, first: bool) -> Array:
  """Shortcut of a decoder stage: the element (channel, frame, row, column) with flat index i,
  channel slowest, copies input channel i // (O time space^2 / C).

  Args:
    x: `[B, T, H, W, C]`.
    size_out: channels O.
    time, space: factors.
    first: start of a video, where the first `time - 1` frames are dropped.

  Returns:
    `[B, T', H space, W space, O]`.
  """
  batch, frames, height, width, size = x.shape
  x = jnp.repeat(x, size_out * time * space**2 // size, axis=-1)
  x = x.reshape(batch, frames, height, width, size_out, time, space, space)
  x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
  x = x.reshape(batch, frames * time, height * space, width * space, size_out)
  return x[:, time - 1 :] if first else x


def stage_factors(temporal: Sequence[bool]) -> list[Pair]:
  """Factors of (frames, rows and columns) of every stage; the last stage keeps its size."""
  return [(1 + t, 2) for t in temporal] + [(1, 1)]


class EncoderStage(nnx.Module):
  """Residual blocks, `Downsample` where rows and columns shrink, and the averaging shortcut.

  Args:
    sizes: channels before and after.
    count: residual blocks.
    factors: by which (frames, rows and columns) shrink.
    form: of the causal convolutions.
  """

  def __init__(self, sizes: Pair, count: int, factors: Pair, form: str, rngs: nnx.Rngs):
    self.size, self.factors = sizes[1], factors
    self.blocks = nnx.List(residuals(sizes, count, form, rngs))
    time, space = factors
    self.resample = Downsample(self.size, time == 2, form, rngs) if space == 2 else None

  def __call__(self, x: Array, state: State | None) -> tuple[Array, State]:
    parts = [*self.blocks, self.resample] if self.resample is not None else [*self.blocks]
    y, after = run(parts, x, state)
    return y + average_down(x, self.size, *self.factors), after


class DecoderStage(nnx.Module):
  """Residual blocks; where rows and columns grow, `Upsample` and the duplicating shortcut.

  Arguments of `EncoderStage`; here the factors are those of growth. `tiles` are strips of rows.
  """

  def __init__(self, sizes: Pair, count: int, factors: Pair, form: str, rngs: nnx.Rngs):
    self.size, self.factors = sizes[1], factors
    self.blocks = nnx.List(residuals(sizes, count, form, rngs))
    time, space = factors
    self.resample = Upsample(self.size, time == 2, form, rngs) if space == 2 else None

  def __call__(self, x: Array, state: State | None, tiles: int = 1) -> tuple[Array, State]:
    blocks = [functools.partial(block, tiles=tiles) for block in self.blocks]
    if self.resample is None:
      return run(blocks, x, state)
    y, after = run([*blocks, self.resample.frames], x, state)
    double, up = self.resample.spatial.double, (self.size, *self.factors)
    if tiles == 1 or state is None:
      return double(y) + duplicate_up(x, *up, first=state is None), after

    def compute(strip: Strip, _: None) -> tuple[Array, None]:
      part = double(strip.bordered(y), bordered=True)
      return part + duplicate_up(strip.rows(x), *up, first=False), None

    return by_strips(compute, x, tiles, None)[0], after


class Middle(nnx.Module):
  """Residual block, attention, residual block."""

  def __init__(self, size: int, form: str, rngs: nnx.Rngs):
    self.before = Residual(size, size, form, rngs)
    self.attention = FrameAttention(size, rngs)
    self.after = Residual(size, size, form, rngs)


class Head(nnx.Module):
  """Norm, SiLU, convolution."""

  def __init__(self, size_in: int, size_out: int, form: str, rngs: nnx.Rngs):
    self.norm = ChannelNorm(size_in)
    self.conv = CausalConv(size_in, size_out, form, rngs)

  def __call__(self, x: Array, state: State | None, tiles: int = 1) -> tuple[Array, State]:
    return convolved(self.norm, self.conv, x, state, tiles)


class Encoder(nnx.Module):
  """`[B, T, H, W, 12]` patches of frames to `[B, F, h, w, 2C]` moments."""

  def __init__(self, cfg: Config, form: str, rngs: nnx.Rngs):
    sizes = [cfg.encoder_width * m for m in (1, *cfg.multipliers)]
    self.conv_in = CausalConv(12, sizes[0], form, rngs)
    factors, count = stage_factors(cfg.temporal_downsample), cfg.residual_blocks
    self.stages = nnx.List(
      EncoderStage(pair, count, factor, form, rngs)
      for pair, factor in zip(itertools.pairwise(sizes), factors, strict=True)
    )
    self.middle = Middle(sizes[-1], form, rngs)
    self.head = Head(sizes[-1], 2 * cfg.latent_channels, form, rngs)

  def parts(self) -> list[Part]:
    """The parts in the order in which they run."""
    middle = self.middle
    return [self.conv_in, *self.stages, middle.before, middle.attention, middle.after, self.head]

  def __call__(self, x: Array, state: State | None) -> tuple[Array, State]:
    return run(self.parts(), x, state)


class Decoder(nnx.Module):
  """`[B, F, h, w, C]` latents to `[B, T, H, W, 12]` patches of frames."""

  def __init__(self, cfg: Config, form: str, rngs: nnx.Rngs):
    sizes = [cfg.decoder_width * m for m in (cfg.multipliers[-1], *cfg.multipliers[::-1])]
    self.conv_in = CausalConv(cfg.latent_channels, sizes[0], form, rngs)
    self.middle = Middle(sizes[0], form, rngs)
    factors, count = stage_factors(cfg.temporal_downsample[::-1]), cfg.residual_blocks + 1
    self.stages = nnx.List(
      DecoderStage(pair, count, factor, form, rngs)
      for pair, factor in zip(itertools.pairwise(sizes), factors, strict=True)
    )
    self.head = Head(sizes[-1], 12, form, rngs)

  def parts(self, tiles: int = 1) -> list[Part]:
    """The parts in the order in which they run."""
    middle = self.middle
    small, *large = *self.stages, self.head
    large = [functools.partial(part, tiles=tiles) for part in large]
    return [self.conv_in, middle.before, middle.attention, middle.after, small, *large]

  def __call__(self, x: Array, state: State | None, tiles: int = 1) -> tuple[Array, State]:
    return run(self.parts(tiles), x, state)
