"""The Wan 2.2 VAE: video to latents and back, 16 times smaller in space and 4 times in time.

The first frame is a latent of its own, so `T = 1 + 4 (F - 1)`. All computation is causal; the only
memory is an explicit state, so a whole clip is the first piece followed by later pieces, and any
split of a clip gives the same result. Latents are normalised with one mean and deviation for each
channel, `(mu - mean) / std`, in float32.

Source: spec/models.md section 5.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.checks import check_at_least, check_divides, check_remainder, check_shape
from longlive_jax.config import Vae as Config
from longlive_jax.model.conv import Pointwise, choose_form, patchify, unpatchify
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


def check_config(cfg: Config) -> None:
  """Refuses sizes that do not give 16x in space and 4x in time.

  Raises:
    ValueError: names the field, what it is and what it must be.
  """
  check_at_least("vae.encoder_width", cfg.encoder_width, 1)
  check_at_least("vae.decoder_width", cfg.decoder_width, 1)
  check_at_least("vae.residual_blocks", cfg.residual_blocks, 1)
  sizes, flags = cfg.multipliers, cfg.temporal_downsample
  if len(sizes) != 4:
    raise ValueError(
      f"vae.multipliers={sizes} has {len(sizes)} stages; it must have 4: three halvings after the"
      " 2x2 patches make 16x in space"
    )
  if len(flags) != 3 or sum(flags) != 2:
    raise ValueError(
      f"vae.temporal_downsample={flags} must have 3 entries, two of them true: 4x in time"
    )
  for i, (size_in, size_out) in enumerate(zip((1, *sizes[:-1]), sizes, strict=True)):
    factor = 4 * (1 + flags[i]) if i < 3 else 1
    name = f"vae.multipliers[{i - 1}]*{factor}" if i else f"{factor}"
    check_divides(name, size_in * factor, f"vae.multipliers[{i}]", size_out)
  for i, (size_in, size_out) in enumerate(
    zip((sizes[3], *sizes[:1:-1]), sizes[:0:-1], strict=True)
  ):
    factor = 4 * (1 + flags[2 - i])
    name = f"vae.multipliers[{3 - i}]*{factor}"
    check_divides(name, size_out * factor, f"vae.multipliers[{min(4 - i, 3)}]", size_in)


def latents_per_call(cfg: Config, height: int, width: int) -> int:
  """Most latents a call that keeps every array under 2^31 elements, where GPU libraries are fast.

  Args:
    cfg: sizes of the VAE.
    height, width: of the video, in pixels.
  """
  widths = [max(cfg.encoder_width, cfg.decoder_width) * m for m in cfg.multipliers]
  widest = max(size / 4 ** max(i - 1, 0) for i, size in enumerate(widths))
  frames = int(2**31 / (widest * (height // 2) * (width // 2))) - 2
  return max(frames // TIME, 1)


def from_uint8(video: Array) -> Array:
  """uint8 to float32 in [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Array) -> Array:
  """Clamps to [-1, 1] and rounds to the nearest uint8."""
  return jnp.round((jnp.clip(video.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def _pieces(
  step: Callable[[Array, State], tuple[Array, State]], x: Array, state: State, size: int | None
) -> Array:
  """Runs `step` over axis 1 of x, `size` at a time in a scan, or all at once."""
  if size is None or x.shape[1] <= size:
    return step(x, state)[0]
  count = x.shape[1] // size
  whole = x[:, : count * size].reshape(x.shape[0], count, size, *x.shape[2:])

  def body(state: State, piece: Array) -> tuple[State, Array]:
    y, state = step(piece, state)
    return state, y

  state, y = jax.lax.scan(body, state, jnp.moveaxis(whole, 1, 0))
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], -1, *y.shape[3:])
  if count * size == x.shape[1]:
    return y
  return jnp.concatenate([y, step(x[:, count * size :], state)[0]], 1)


class Vae(nnx.Module):
  """The autoencoder.

  Args:
    cfg: sizes; narrower widths are the Light VAE.
    rngs: of the initialisation.
    dtype: of the activations, "float32" or "bfloat16"; norms, softmax and sums are float32.
    form: of the causal convolutions, "conv3d" or "conv2d"; None takes the faster one of the
      default backend.

  Raises:
    ValueError: sizes that `check_config` refuses.

  Attributes:
    latent_mean, latent_std: `[C]` float32, not trained.
  """

  def __init__(
    self, cfg: Config, rngs: nnx.Rngs, *, dtype: str = "float32", form: str | None = None
  ):
    check_config(cfg)
    form = choose_form(form)
    channels = cfg.latent_channels
    self.channels, self.dtype = channels, dtype
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
    return latents.astype(jnp.float32) * self.latent_std[...] + self.latent_mean[...]

  def _encode(self, video: Array, state: State | None) -> tuple[Array, State]:
    """Moments `[B, F, h, w, 2C]` float32 of the next frames."""
    check_shape("video", video.shape, (None, None, None, None, 3))
    for name, size in zip(("height", "width"), video.shape[2:4], strict=True):
      check_divides(f"video.{name}", size, "pixels of a latent", SPACE)
    y, state = self.encoder(patchify(video.astype(self.dtype)), state)
    return self.to_moments(y).astype(jnp.float32), state

  def _decode(self, raw: Array, state: State | None) -> tuple[Array, State]:
    """Frames float32 of the next raw latents."""
    check_shape("latents", raw.shape, (None, None, None, None, self.channels))
    y, state = self.decoder(self.from_latent(raw.astype(self.dtype)), state)
    return unpatchify(y).astype(jnp.float32), state

  def encode_first(self, video: Array) -> tuple[Array, Array, State]:
    """Encodes the first frame.

    Args:
      video: `[B, 1, H, W, 3]` in [-1, 1].

    Returns:
      (raw mean `[B, 1, h, w, C]`, raw log-variance of the same shape, state).
    """
    check_shape("video", video.shape, (None, 1, None, None, 3))
    moments, state = self._encode(video, None)
    return *jnp.split(moments, 2, -1), state

  def encode_next(self, video: Array, state: State) -> tuple[Array, Array, State]:
    """Encodes the next 4k frames.

    Args:
      video: `[B, 4k, H, W, 3]` in [-1, 1].
      state: of the frames before.

    Returns:
      (raw mean `[B, k, h, w, C]`, raw log-variance, state).

    Raises:
      ValueError: the number of frames is not a multiple of 4.
    """
    check_divides("frames of video", video.shape[1], "frames of a latent", TIME)
    moments, state = self._encode(video, state)
    return *jnp.split(moments, 2, -1), state

  def moments(self, video: Array, latents_per_step: int | None = None) -> tuple[Array, Array]:
    """Encodes a whole clip.

    Args:
      video: `[B, 1 + 4m, H, W, 3]` in [-1, 1].
      latents_per_step: after the first frame, latents encoded at a time; None for all at once.
        It bounds memory and changes nothing else.

    Returns:
      (raw mean, raw log-variance), each `[B, 1 + m, h, w, C]` float32.

    Raises:
      ValueError: a number of frames that is not 1 + 4m, or a size that is not a multiple of 16.
    """
    check_remainder("frames of video", video.shape[1], TIME, 1)
    moments, state = self._encode(video[:, :1], None)
    if video.shape[1] > 1:
      frames = None if latents_per_step is None else TIME * latents_per_step
      later = _pieces(self._encode, video[:, 1:], state, frames)
      moments = jnp.concatenate([moments, later], 1)
    mean, log_variance = jnp.split(moments, 2, -1)
    return mean, log_variance

  def encode(self, video: Array, latents_per_step: int | None = None) -> Array:
    """Normalised posterior mean `[B, 1 + m, h, w, C]` of a clip; arguments of `moments`."""
    return self.normalise(self.moments(video, latents_per_step)[0])

  def decode_first(self, latents: Array) -> tuple[Array, State]:
    """Decodes the first latent.

    Args:
      latents: `[B, 1, h, w, C]` normalised.

    Returns:
      (video `[B, 1, H, W, 3]` float32, not clamped; state).
    """
    check_shape("latents", latents.shape, (None, 1, None, None, self.channels))
    return self._decode(self.denormalise(latents), None)

  def decode_next(self, latents: Array, state: State) -> tuple[Array, State]:
    """Decodes the next k latents: `[B, k, h, w, C]` to (video `[B, 4k, H, W, 3]`, state)."""
    return self._decode(self.denormalise(latents), state)

  def decode_start(self, latents: Array) -> tuple[Array, State]:
    """Decodes the first k latents: `[B, k, h, w, C]` to (video `[B, 4k - 3, H, W, 3]`, state)."""
    video, state = self.decode_first(latents[:, :1])
    if latents.shape[1] == 1:
      return video, state
    later, state = self.decode_next(latents[:, 1:], state)
    return jnp.concatenate([video, later], 1), state

  def decode_raw(self, raw: Array, latents_per_step: int | None = None) -> Array:
    """Decodes a whole clip of latents that are not normalised.

    Args:
      raw: `[B, F, h, w, C]`, as the means of `moments`.
      latents_per_step: after the first, latents decoded at a time; None for all at once.

    Returns:
      Video `[B, 4F - 3, H, W, 3]` float32, not clamped.
    """
    video, state = self._decode(raw[:, :1], None)
    if raw.shape[1] == 1:
      return video
    later = _pieces(self._decode, raw[:, 1:], state, latents_per_step)
    return jnp.concatenate([video, later], 1)

  def decode(self, latents: Array, latents_per_step: int | None = None) -> Array:
    """Video of a clip of normalised latents; arguments of `decode_raw`."""
    return self.decode_raw(self.denormalise(latents), latents_per_step)


def declare_vae(cfg: Config, *, dtype: str = "float32", form: str | None = None) -> Network:
  """Declares the VAE as a network; arguments of `Vae`."""
  form = choose_form(form)
  return declare(lambda rngs: Vae(cfg, rngs, dtype=dtype, form=form))
