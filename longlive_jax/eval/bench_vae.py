"""The jobs of the suite "vae": blocks of latents to frames, and the convolutions of it.

A block is decoded as a rollout does, with carried state: by `sample.decoder.Decoder`, so many
latents a call. "light" is the decoder with a quarter of the channels. Weights are random. Errors of
a whole picture are against one latent a call; that of bfloat16 against float32 is measured on a
small one, which is compiled and held easily. A convolution has the channels and sizes of a stage of
the decoder, and all frames of a block, cut so that no array has 2^31 elements: beyond that GPU
libraries leave their fast path.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment, Vae
from longlive_jax.eval.bench import Case, Record, memory_of
from longlive_jax.eval.flops import conv_flops, decode_flops
from longlive_jax.model.conv import FORMS, HISTORY, time_conv
from longlive_jax.model.narrow import cast_matrices
from longlive_jax.model.vae import SPACE, declare_vae
from longlive_jax.model.vae_blocks import stage_factors
from longlive_jax.sample.decoder import Decoder
from longlive_jax.sample.latents import block_shape
from longlive_jax.types import Array, PyTree

AT_A_TIME = (1, 2, 4)  # latents
NORMAL = "normal(0, 1), seed 0"
MOST = 2**31  # elements of an array
COMPARED = 32  # rows and columns of a convolution's first frame


def cases(experiment: Experiment) -> Iterator[Case]:
  """All jobs of the suite, for this device."""
  vae, shape = experiment.model.vae, block_shape(experiment, 1)
  light = dataclasses.replace(vae, decoder_width=max(vae.decoder_width // 4, 1))
  counts = [n for n in AT_A_TIME if shape[1] % n == 0]
  for name, cfg in (("decode a block", vae), ("decode a block, light", light)):
    kinds = {f"{n} a call": (n, "bfloat16") for n in counts}
    yield decoding(name, cfg, shape, kinds, f"{counts[0]} a call")
  small = (*shape[:2], *(max(size // 4, 1) for size in shape[2:4]), shape[4])
  kinds = {dtype: (1, dtype) for dtype in ("bfloat16", "float32")}
  yield decoding("decode a small picture", vae, small, kinds, "float32")
  for stage in stages(vae, shape):
    yield convolving(*stage)


def streaming(
  cfg: Vae, shape: tuple[int, ...], latents: int, dtype: str
) -> tuple[Callable[[Array], Array], Record]:
  """A decoder of one video: latents of its next block to frames uint8, and what is known of it."""
  form = None if cfg.convolution == "auto" else cfg.convolution
  network = declare_vae(cfg, dtype=dtype, form=form)
  params = cast_matrices(network.init(0), dtype)
  began = time.perf_counter()
  decoder, state = Decoder(network, params, shape, latents), None
  seconds = time.perf_counter() - began

  def run(block: Array) -> Array:
    nonlocal state
    frames, state = decoder.decode(block, state)
    return frames

  return run, {"compile_seconds": seconds, **memory_of(decoder.later), "dtype": dtype}


def decoding(
  name: str,
  cfg: Vae,
  shape: tuple[int, ...],
  kinds: dict[str, tuple[int, str]],
  reference: str,
) -> Case:
  """A block in the steady state; errors are those of the first block of a video.

  Args:
    name: of the case.
    cfg: sizes of the VAE.
    shape: of a block of latents.
    kinds: implementation -> (latents a call, dtype).
    reference: one of them.
  """
  size = shape[1], SPACE * shape[2], SPACE * shape[3]
  counted = {"unfolded_flops": decode_flops(cfg, *size, folded=False)}

  def make(kind: tuple[int, str], args: tuple[PyTree, ...]) -> tuple[Callable[..., Any], Record]:
    del args
    return streaming(cfg, shape, *kind)

  return Case(
    name,
    {"latents": size[0], "height": size[1], "width": size[2], "decoder_width": cfg.decoder_width},
    f"random weights, latents {NORMAL}",
    kinds,
    (jax.random.normal(jax.random.key(0), shape),),
    lambda frames: frames[:, -1].astype(jnp.float32) - 127.5,
    reference,
    flops=float(decode_flops(cfg, *size)),
    more={kind: counted for kind in kinds},
    make=make,
  )


def stages(cfg: Vae, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
  """Channels, frames, rows and columns of a block in each stage of the decoder."""
  _, frames, rows, columns, _ = shape
  factors = stage_factors(cfg.temporal_downsample[::-1])
  for multiplier, (grow, space) in zip(cfg.multipliers[::-1], factors, strict=True):
    yield cfg.decoder_width * multiplier, frames, rows, columns
    frames, rows, columns = frames * grow, rows * space, columns * space


def most_frames(frames: int, each: int, most: int = MOST) -> int:
  """The largest divisor of `frames` whose frames and history, `each` elements, are below `most`."""
  fits = [n for n in range(1, frames + 1) if frames % n == 0 and (n + HISTORY) * each < most]
  return max(fits, default=1)


def cut(x: Array, size: int) -> list[Array]:
  """Pieces of `size` frames, each with its history in front, of frames that have theirs."""
  return [x[:, i : i + size + HISTORY] for i in range(0, x.shape[1] - HISTORY, size)]


def convolving(size: int, frames: int, rows: int, columns: int) -> Case:
  """A causal 3x3x3 convolution that keeps the number of channels, in both forms."""
  keys = jax.random.split(jax.random.key(0))
  shape, taps = (1, frames + HISTORY, rows, columns, size), (3, 3, 3, size, size)
  x = jax.random.normal(keys[0], shape, jnp.bfloat16)
  kernel = (jax.random.normal(keys[1], taps) * (27 * size) ** -0.5).astype(jnp.bfloat16)
  # one that is two-dimensional writes three products for each result
  wide = {form: 3 if form == "conv2d" else 1 for form in FORMS}
  each = {n: most_frames(frames, w * rows * columns * size) for n, w in wide.items()}

  def job(form: str) -> Callable[..., list[Array]]:
    def run(pieces: Sequence[Array], kernel: Array) -> list[Array]:
      return [time_conv(piece, kernel, form).astype(jnp.bfloat16) for piece in pieces]

    return run

  def corner(y: Array) -> Array:
    return y[:, 0, :COMPARED, :COMPARED].astype(jnp.float32)

  def truth() -> Array:
    part = x[:, : 1 + HISTORY, : COMPARED + 1, : COMPARED + 1].astype(jnp.float32)
    return corner(time_conv(part, kernel.astype(jnp.float32), "conv2d"))

  return Case(
    "convolution",
    {"channels": size, "frames": frames, "height": rows, "width": columns},
    NORMAL,
    {form: job(form) for form in FORMS},
    (kernel,),
    lambda results: corner(results[0]),
    f"float32, the first {COMPARED} rows and columns",
    flops=float(conv_flops(size, size, 27, frames * rows * columns)),
    bytes_moved=dict.fromkeys(FORMS, 2.0 * (math.prod(shape) * 2 + math.prod(taps))),
    more={form: {"frames_a_call": each[form]} for form in FORMS},
    own={form: (cut(x, each[form]),) for form in FORMS},
    truth=truth,
  )
