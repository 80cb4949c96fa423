"""Floating-point operations of the networks, counted from their configuration.

A multiply and an add are two operations; only matrix products and convolutions count. For a layer
of width E with a feed-forward of width M, over N tokens that see pairs of (query, key), next to
L tokens of text each:

    linear 2 N (6 E^2 + 2 E M)        attention 4 E pairs        text 4 E N L

Teacher forcing on K blocks of n tokens visits K^2 + K pairs of blocks: context i sees contexts
0..i, target i sees contexts 0..i-1 and itself.

Source: spec/training.md section 5.6, spec/models.md sections 1, 4 and 5.
"""

import dataclasses
import itertools

from longlive_jax.checks import check_at_least, check_divides
from longlive_jax.config import Experiment, Model, Text, Vae
from longlive_jax.model.vae import SPACE, TIME
from longlive_jax.model.vae_blocks import stage_factors

# dense bfloat16 operations a second, by a part of `device_kind`
PEAK_BF16 = {
  "GB300": 2500e12,
  "GB200": 2500e12,
  "B300": 2250e12,
  "B200": 2250e12,
  "H200": 989e12,
  "GH200": 989e12,
  "H100 PCIE": 756e12,
  "H100 NVL": 835e12,
  "H100": 989e12,
  "H800": 989e12,
  "A100": 312e12,
  "A800": 312e12,
  "L40S": 362e12,
  "L4": 121e12,
}


@dataclasses.dataclass(frozen=True)
class DitFlops:
  """Operations of a forward of the transformer.

  Attributes:
    linear: linear layers of the tokens, in all layers.
    self_attention: among tokens.
    cross_attention: to text.
    text: embedding of the prompts, and their keys and values in all layers.
    ends: embeddings of patches and timesteps, head.
    first: what of `text` and `ends` multiplies inputs, which need no gradient.
  """

  linear: int
  self_attention: int
  cross_attention: int
  text: int
  ends: int
  first: int

  @property
  def forward(self) -> int:
    """All of them."""
    return self.linear + self.self_attention + self.cross_attention + self.text + self.ends

  @property
  def backward(self) -> int:
    """Two products for each of the forward, but one where the input needs no gradient."""
    return 2 * self.forward - self.first

  @property
  def step(self) -> int:
    """Model operations of a training step, by convention three forwards; nothing twice."""
    return 3 * self.forward


def dit_flops(
  cfg: Model, *, tokens: int, pairs: int, times: int, prompts: int, shown: int
) -> DitFlops:
  """Operations of any forward.

  Args:
    cfg: the transformer.
    tokens: that go through the layers.
    pairs: (query, key) of self-attention.
    times: timesteps that are embedded, one a latent.
    prompts: whose keys and values are computed.
    shown: tokens that reach the head.
  """
  width, words = cfg.width, prompts * cfg.text.length
  features = cfg.vae.latent_channels * cfg.patch**2
  patches, text_in = 2 * tokens * features * width, 2 * words * cfg.text.width * width
  times_in = 2 * times * cfg.frequency_width * width
  return DitFlops(
    linear=2 * tokens * cfg.layers * (6 * width**2 + 2 * width * cfg.ffn_width),
    self_attention=4 * width * pairs * cfg.layers,
    cross_attention=4 * width * tokens * cfg.text.length * cfg.layers,
    text=text_in + 2 * words * width**2 * (1 + 2 * cfg.layers),
    ends=patches + times_in + 2 * times * 7 * width**2 + 2 * shown * width * features,
    first=patches + text_in + times_in,
  )


def teacher_forcing_flops(cfg: Model, latents: int, latent_tokens: int) -> DitFlops:
  """Of one clip, context and target, with one prompt a block.

  Args:
    cfg: the transformer.
    latents: F, a multiple of `model.block_latents`.
    latent_tokens: tokens of a latent.

  Raises:
    ValueError: the blocks do not fill the clip.
  """
  check_divides("latents of a clip", latents, "model.block_latents", cfg.block_latents)
  blocks, block = latents // cfg.block_latents, cfg.block_latents * latent_tokens
  return dit_flops(
    cfg,
    tokens=2 * latents * latent_tokens,
    pairs=(blocks**2 + blocks) * block**2,
    times=2 * latents,
    prompts=blocks,
    shown=latents * latent_tokens,
  )


def cached_flops(cfg: Model, latent_tokens: int, window_latents: int) -> DitFlops:
  """Of one block that sees a full window, and the keys and values of one prompt."""
  block = cfg.block_latents * latent_tokens
  pairs = block * window_latents * latent_tokens
  return dit_flops(cfg, tokens=block, pairs=pairs, times=cfg.block_latents, prompts=1, shown=block)


def step_flops(experiment: Experiment) -> int:
  """Model operations of an update of train.stage=ar over its batch: three forwards.

  What is computed a second time in the backward pass does not count, nor do text encoder and VAE.
  """
  latents = experiment.data.blocks * experiment.model.block_latents
  clip = teacher_forcing_flops(experiment.model, latents, experiment.latent_tokens)
  return experiment.train.batch * clip.step


def text_flops(cfg: Text, prompts: int) -> int:
  """Of the text encoder; prompts are padded to `length`."""
  linear = 4 * cfg.width * cfg.attention_width + 3 * cfg.width * cfg.ffn_width
  each = 2 * cfg.length * linear + 4 * cfg.length**2 * cfg.attention_width
  return prompts * cfg.layers * each


def conv_flops(size_in: int, size_out: int, taps: int, places: int) -> int:
  """Of a convolution with so many taps in time and space, for so many results a channel."""
  return 2 * size_in * size_out * taps * places


def residual_flops(size_in: int, size_out: int, time: int, places: int) -> int:
  """Of a residual block of the VAE whose convolutions have `time` taps in time."""
  shortcut = conv_flops(size_in, size_out, 1, places) if size_in != size_out else 0
  return shortcut + sum(
    conv_flops(size, size_out, 9 * time, places) for size in (size_in, size_out)
  )


def middle_flops(size: int, time: int, frames: int, area: int) -> int:
  """Of two residual blocks and the attention within frames between them."""
  blocks = 2 * residual_flops(size, size, time, frames * area)
  return blocks + conv_flops(size, 4 * size, 1, frames * area) + 4 * size * frames * area**2


def stages_flops(
  sizes: list[int], count: int, factors: list[tuple[int, int]], start: bool, frames: int, area: int
) -> int:
  """Of the residual blocks of the stages of the VAE, at the size they have in each.

  Args:
    sizes: channels before the first stage and after each.
    count: residual blocks of a stage.
    factors: by which (frames, rows and columns) shrink after each.
    start: the first frame alone, of which nothing is before.
    frames, area: of the first stage; frames after it.
  """
  total, time = 0, 1 if start else 3
  for (before, after), (shrink, space) in zip(itertools.pairwise(sizes), factors, strict=True):
    places = frames * area
    total += residual_flops(before, after, time, places)
    total += (count - 1) * residual_flops(after, after, time, places)
    area //= space**2
    if space == 2:
      total += conv_flops(after, after, 9, frames * area)
    if shrink == 2 and not start:
      frames //= 2
      total += conv_flops(after, after, 3, frames * area)
  return total


def encode_flops(cfg: Vae, latents: int, height: int, width: int) -> int:
  """Of the encoder for a clip of `1 + 4 (latents - 1)` frames.

  Args:
    cfg: sizes of the VAE.
    latents: F, at least 1; the first is of one frame, which meets one tap of each kernel.
    height, width: pixels, multiples of 16.
  """
  check_at_least("latents", latents, 1)
  sizes = [cfg.encoder_width * m for m in (1, *cfg.multipliers)]
  factors, total = stage_factors(cfg.temporal_downsample), 0
  area, small, out = height * width // 4, height * width // SPACE**2, 2 * cfg.latent_channels
  for start, count in ((True, 1), (False, latents - 1)):
    frames, time = count * (1 if start else TIME), 1 if start else 3
    total += conv_flops(12, sizes[0], 9 * time, frames * area)
    total += stages_flops(sizes, cfg.residual_blocks, factors, start, frames, area)
    total += middle_flops(sizes[-1], time, count, small)
    total += conv_flops(sizes[-1], out, 9 * time, count * small)
    total += conv_flops(out, out, 1, count * small)
  return total


def decode_flops(cfg: Vae, latents: int, height: int, width: int, *, folded: bool = True) -> int:
  """Of the decoder for `latents` that are not the first of a video.

  Args:
    cfg: sizes of the VAE.
    latents: F.
    height, width: pixels, multiples of 16.
    folded: convolutions on pixels that were repeated 2x2 count as the four taps that they fold
      into, see `SpatialConv.double`; False counts all nine.
  """
  sizes = [cfg.decoder_width * m for m in (cfg.multipliers[-1], *cfg.multipliers[::-1])]
  frames, area, total = latents, height * width // SPACE**2, 0
  total += conv_flops(cfg.latent_channels, cfg.latent_channels, 1, frames * area)
  total += conv_flops(cfg.latent_channels, sizes[0], 27, frames * area)
  total += middle_flops(sizes[0], 3, frames, area)
  factors = stage_factors(cfg.temporal_downsample[::-1])
  for (before, after), (grow, space) in zip(itertools.pairwise(sizes), factors, strict=True):
    total += residual_flops(before, after, 3, frames * area)
    total += cfg.residual_blocks * residual_flops(after, after, 3, frames * area)
    if grow == 2:
      total += conv_flops(after, 2 * after, 3, frames * area)
      frames *= 2
    area *= space**2
    if space == 2:
      total += conv_flops(after, after, 4 if folded else 9, frames * area)
  return total + conv_flops(sizes[-1], 12, 27, frames * area)


def peak_flops(kind: str) -> float | None:
  """Dense bfloat16 operations a second of a `device_kind`, such as "NVIDIA H200"; None = unknown.

  Source: the vendor's data sheets, without sparsity.
  """
  known = (name for name in PEAK_BF16 if name in kind.upper())
  return PEAK_BF16.get(max(known, key=len, default=""))


def mfu(flops: float, seconds: float, devices: int, kind: str) -> float | None:
  """Share of the devices' peak that model operations took, 0 to 1; None = unknown device.

  Args:
    flops: model operations of a step on all devices, as `step_flops`.
    seconds: that it took.
    devices: that took part.
    kind: their `device_kind`.
  """
  peak = peak_flops(kind)
  return None if peak is None else flops / (seconds * devices * peak)
