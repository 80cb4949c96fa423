"""The Wan 2.2 VAE: video to latents and back, 16 times smaller in space and 4 times in time.

The first frame is a latent of its own, so `T = 1 + 4 (F - 1)`. All computation is causal; the only
memory is an explicit state, so a whole clip is the first piece followed by later pieces, and any
split of a clip gives the same result. Latents are normalised with one mean and deviation for each
channel, `(mu - mean) / std`, in float32.

Source: spec/models.md section 5.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.checks import check_at_least, check_divides, check_remainder, check_shape
from longlive_jax.config import Vae as Config
from longlive_jax.config.rules import check_vae
from longlive_jax.model.conv import (
  HISTORY,
  Pointwise,
  choose_form,
  patchify,
  summed,
  unpatchify,
)
from longlive_jax.model.module import Network, declare
from longlive_jax.model.vae_blocks import Decoder, Encoder, State
from longlive_jax.types import Array

SPACE, TIME = 16, 4  # pixels a latent, frames a later latent

# mean and deviation of the 48 latent channels of the released weights (section 5.8)
WAN_MEAN = (
  *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
  *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
  *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
  *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
  *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
  *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN_STD = (
  *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
  *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
  *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
  *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
  *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
  *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


def latents_per_call(cfg: Config, batch: int, height: int, width: int) -> int:
  """Most latents at a time that keep every array under 2^31 elements, but at least one.

  Beyond that GPU libraries leave their fast path.

  Args:
    cfg: sizes of the VAE.
    batch: videos.
    height, width: of a video, in pixels.
  """
  sizes = [max(cfg.encoder_width, cfg.decoder_width) * m for m in cfg.multipliers]
  # `Upsample` leaves the channels of stage i at the resolution of stage i - 1
  widest = max(size / 4 ** max(i - 1, 0) for i, size in enumerate(sizes))
  frames = int(2**31 / (batch * widest * (height // 2) * (width // 2))) - HISTORY
  return max(frames // TIME, 1)


def from_uint8(video: Array) -> Array:
  """uint8 to float32 in [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Array) -> Array:
  """Clamps to [-1, 1] and rounds to the nearest uint8; NaN is black."""
  video = jnp.nan_to_num(video.astype(jnp.float32), nan=-1.0)
  return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def _in_pieces(
  step: Callable[[Array, State | None], tuple[Array, State]],
  x: Array,
  state: State | None,
  size: int,
) -> tuple[Array, State]:
  """Runs `step` over axis 1 of x: at the start the first alone, then `size` at a time in a scan."""
  done = []
  if state is None:
    y, state = step(x[:, :1], None)
    done, x = [y], x[:, 1:]
  if x.shape[1] > size:
    count = x.shape[1] // size
    pieces = x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:])
    state, y = jax.lax.scan(lambda s, p: step(p, s)[::-1], state, jnp.moveaxis(pieces, 1, 0))
    y = jnp.moveaxis(y, 0, 1)
    done.append(y.reshape(y.shape[0], -1, *y.shape[3:]))
    x = x[:, count * size :]
  if x.shape[1]:
    y, state = step(x, state)
    done.append(y)
  return jnp.concatenate(done, 1), state


class Vae(nnx.Module):
  """The autoencoder.

  Args:
    cfg: sizes; narrower widths are the Light VAE.
    rngs: of the initialisation.
    dtype: of the activations, "float32" or "bfloat16"; norms, softmax and sums are float32.
    form: of the causal convolutions, "conv3d" or "conv2d"; None takes the faster one of the
      default backend.

  Raises:
    ValueError: sizes that `config.rules.check_vae` refuses.

  Attributes:
    latent_mean, latent_std: `[C]` float32, not trained.
  """

  def __init__(
    self, cfg: Config, rngs: nnx.Rngs, *, dtype: str = "float32", form: str | None = None
  ):
    check_vae(cfg)
    form = choose_form(form)
    channels = cfg.latent_channels
    self.cfg, self.dtype = cfg, dtype
    self.encoder = Encoder(cfg, form, rngs)
    self.to_moments = Pointwise(2 * channels, 2 * channels, rngs)
    self.from_latent = Pointwise(channels, channels, rngs)
    self.decoder = Decoder(cfg, form, rngs)
    known = channels == len(WAN_MEAN)
    mean = jnp.asarray(WAN_MEAN) if known else jnp.zeros((channels,))
    std = jnp.asarray(WAN_STD) if known else jnp.ones((channels,))
    self.latent_mean = nnx.Variable(mean.astype(jnp.float32))
    self.latent_std = nnx.Variable(std.astype(jnp.float32))

  def normalise(self, mean: Array) -> Array:
    """Raw posterior means `[..., C]` to normalised latents."""
    return (mean - self.latent_mean[...]) / self.latent_std[...]

  def denormalise(self, latents: Array) -> Array:
    """Inverse of `normalise`."""
    check_shape("channels of latents", latents.shape[-1:], (self.cfg.latent_channels,))
    return latents.astype(jnp.float32) * self.latent_std[...] + self.latent_mean[...]

  def _encode(self, video: Array, state: State | None) -> tuple[Array, State]:
    """Moments `[B, F, h, w, 2C]` float32 of the next frames."""
    y, state = self.encoder(patchify(video.astype(self.dtype)), state)
    return self.to_moments(y).astype(summed(y.dtype)), state

  def _decode(self, raw: Array, state: State | None, tiles: int) -> tuple[Array, State]:
    """Frames float32 of the next raw latents."""
    y, state = self.decoder(self.from_latent(raw.astype(self.dtype)), state, tiles)
    return unpatchify(y).astype(jnp.float32), state

  def _latents_per_step(self, batch: int, height: int, width: int, wanted: int | None) -> int:
    if wanted is None:
      return latents_per_call(self.cfg, batch, height, width)
    check_at_least("latents_per_step", wanted, 1)
    return wanted

  def encode_next(
    self, video: Array, state: State | None, latents_per_step: int | None = None
  ) -> tuple[Array, Array, State]:
    """Encodes the next frames.

    Args:
      video: `[B, 4m, H, W, 3]` in [-1, 1]; `[B, 1 + 4m, H, W, 3]` at the start.
      state: of the frames before; None at the start.
      latents_per_step: latents computed at a time, which bounds memory and changes nothing else;
        None for as many as `latents_per_call` says.

    Returns:
      (raw mean, raw log-variance, each `[B, F, h, w, C]` float32 with F = m, 1 + m at the start;
      state).

    Raises:
      ValueError: another number of frames, or a size that is not a multiple of 16.
    """
    check_shape("video", video.shape, (None, None, None, None, 3))
    batch, frames, height, width, _ = video.shape
    if state is None:
      check_remainder("frames of video", frames, TIME, 1)
    else:
      check_divides("frames of video", frames, "frames of a latent", TIME)
    for name, pixels in (("height", height), ("width", width)):
      check_divides(f"{name} of video", pixels, "pixels of a latent", SPACE)
    size = TIME * self._latents_per_step(batch, height, width, latents_per_step)
    moments, state = _in_pieces(self._encode, video, state, size)
    mean, log_variance = jnp.split(moments, 2, -1)
    return mean, log_variance, state

  def moments(self, video: Array, latents_per_step: int | None = None) -> tuple[Array, Array]:
    """Raw mean and log-variance of a whole clip, as `encode_next` gives them."""
    return self.encode_next(video, None, latents_per_step)[:2]

  def encode(self, video: Array, latents_per_step: int | None = None) -> Array:
    """Normalised posterior mean `[B, 1 + m, h, w, C]` of a clip `[B, 1 + 4m, H, W, 3]`."""
    return self.normalise(self.moments(video, latents_per_step)[0])

  def _decode_raw(
    self, raw: Array, state: State | None, latents_per_step: int | None, tiles: int = 1
  ) -> tuple[Array, State]:
    check_shape("latents", raw.shape, (None, None, None, None, self.cfg.latent_channels))
    check_at_least("number of latents", raw.shape[1], 1)
    batch, _, rows, columns, _ = raw.shape
    check_divides("rows of latents", rows, "tiles", tiles)
    size = self._latents_per_step(batch, SPACE * rows, SPACE * columns, latents_per_step)
    step = functools.partial(self._decode, tiles=tiles)
    return _in_pieces(step, raw, state, size)

  def decode_next(
    self,
    latents: Array,
    state: State | None,
    latents_per_step: int | None = None,
    tiles: int = 1,
  ) -> tuple[Array, State]:
    """Decodes the next latents.

    Args:
      latents: `[B, F, h, w, C]` normalised.
      state: of the latents before; None at the start.
      latents_per_step: as for `encode_next`.
      tiles: strips of rows, a divisor of h, that later latents are computed in, one after the
        other; they too bound memory and change nothing else.

    Returns:
      (video `[B, T, H, W, 3]` float32, not clamped, with T = 4F, 4F - 3 at the start; state).

    Raises:
      ValueError: no latents, another number of channels, or rows that `tiles` does not divide.
    """
    return self._decode_raw(self.denormalise(latents), state, latents_per_step, tiles)

  def decode_raw(self, raw: Array, latents_per_step: int | None = None) -> Array:
    """Video of a clip of latents that are not normalised, as the means of `moments`."""
    return self._decode_raw(raw, None, latents_per_step)[0]

  def decode(self, latents: Array, latents_per_step: int | None = None) -> Array:
    """Video `[B, 4F - 3, H, W, 3]` float32, not clamped, of a clip of normalised latents."""
    return self.decode_next(latents, None, latents_per_step)[0]


def declare_vae(cfg: Config, *, dtype: str = "float32", form: str | None = None) -> Network:
  """Declares the VAE as a network; arguments of `Vae`."""
  form = choose_form(form)
  return declare(lambda rngs: Vae(cfg, rngs, dtype=dtype, form=form))
