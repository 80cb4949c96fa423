"""The VAE around a rollout: blocks of latents to frames with carried state, images to latents."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from longlive_jax.checks import check_divides, check_remainder
from longlive_jax.model.module import Network
from longlive_jax.model.vae import SPACE, TIME, from_uint8, to_uint8
from longlive_jax.parallel.rules import at, home_of
from longlive_jax.parallel.space import fetched, split_rows
from longlive_jax.sample.aside import begun
from longlive_jax.sample.together import compile_all
from longlive_jax.types import Array, ArrayLike, PyTree


class Decoder:
  """Executables that decode blocks of one shape; all are compiled at once.

  Args:
    network: declared VAE.
    params: its parameters.
    block_shape: `(B, F, H, W, C)` of a block's latents.
    latents_per_call: decoded at a time, a divisor of F; 0 = F. Fewer take less memory.
    tiles: strips of rows that a call computes one after the other, a divisor of H. More take less
      memory.

  Raises:
    ValueError: several tiles, and devices that share the rows.

  Attributes:
    state: shapes and placement of the carried state.
    later: executable of every call but the first of a video.

  Sharding: latents are whole wherever parameters are; frames and carried state have their rows
    split over "seq", see `parallel.space`. On several processes frames are whole.
  """

  def __init__(
    self,
    network: Network,
    params: PyTree,
    block_shape: tuple[int, ...],
    latents_per_call: int = 0,
    tiles: int = 1,
  ):
    self.network, self.params, self.block_shape = network, params, block_shape
    self.size = size = latents_per_call or block_shape[1]
    home = home_of(params)
    rows = split_rows(home, block_shape[2])
    if tiles > 1 and rows is not home:
      raise ValueError(
        f"sample.decode_tiles={tiles} is for one device, and here several share the rows of a"
        " video: use sample.decode_tiles=1 or parallel.seq=1"
      )
    shown = fetched(rows, home)
    latents = jax.ShapeDtypeStruct(block_shape, jnp.float32, sharding=home)
    start = jax.ShapeDtypeStruct((), jnp.int32)

    def decode(params: PyTree, latents: Array, start: Array, state: Any) -> tuple[Array, Any]:
      latents = jax.lax.dynamic_slice_in_dim(latents, start, size, 1)
      latents = jax.lax.with_sharding_constraint(latents, rows)
      video, state = network.bind(params).decode_next(latents, state, tiles=tiles)
      return to_uint8(video), state

    step = jax.jit(decode, donate_argnums=3, out_shardings=(shown, rows))
    self.state = at(rows, jax.eval_shape(decode, params, latents, start, None)[1])
    states = {"first": None, "later": self.state}
    made = compile_all({n: step.lower(params, latents, start, s) for n, s in states.items()})
    self._first, self.later = made["first"], made["later"]
    self._join = _joining(self._first, self.later, block_shape[1] // size, shown)
    self._encode: Any = None

  def decode(self, latents: ArrayLike, state: Any) -> tuple[Array, Any]:
    """Decodes the next block.

    Args:
      latents: `[B, F, H, W, C]` normalised.
      state: carried state, donated; None at the start of a video.

    Returns:
      (frames uint8 `[B, T, H, W, 3]`, state).
    """
    join = self._join[state is None]
    parts, state = self._parts(latents, state)
    return join(*parts), state

  def frames(self, latents: ArrayLike, state: Any) -> tuple[np.ndarray, Any]:
    """`decode` to host memory: frames of a call are fetched while the next is computed."""
    parts, state = self._parts(latents, state)
    batch, _, height, width, _ = self.block_shape
    count = sum(part.shape[1] for part in begun(parts))
    frames, at = np.empty((batch, count, SPACE * height, SPACE * width, 3), np.uint8), 0
    for part in parts:
      frames[:, at : at + part.shape[1]] = part
      at += part.shape[1]
    return frames, state

  def _parts(self, latents: ArrayLike, state: Any) -> tuple[list[Array], Any]:
    """Frames of each call."""
    parts = []
    for start in range(0, self.block_shape[1], self.size):
      step = self._first if state is None else self.later
      part, state = step(self.params, latents, np.int32(start), state)
      parts.append(part)
    return parts, state

  def encode_images(self, images: np.ndarray) -> np.ndarray:
    """Latents `[B, 1, h, w, C]` of images uint8 `[B, H, W, 3]`; compiled at the first use.

    Raises:
      ValueError: images of another number or size.
    """
    batch, _, height, width, _ = self.block_shape
    expected = (batch, SPACE * height, SPACE * width, 3)
    if images.shape != expected or images.dtype != np.uint8:
      raise ValueError(f"images are {images.dtype} {images.shape}; they must be uint8 {expected}")
    if self._encode is None:

      def encode(params: PyTree, images: Array) -> Array:
        return self.network.bind(params).encode(from_uint8(images[:, None]))

      shapes = jax.ShapeDtypeStruct(images.shape, images.dtype)
      self._encode = jax.jit(encode).lower(self.params, shapes).compile()
    return np.asarray(self._encode(self.params, images))


def _joining(
  first: Any, later: Any, count: int, place: Sharding
) -> dict[bool, Callable[..., Array]]:
  """Executables that join frames of `count` calls, by whether a video starts with them."""
  if count == 1:
    return dict.fromkeys((True, False), lambda frames: frames)

  def join(*parts: Array) -> Array:
    return jnp.concatenate(parts, 1)

  def compiled(before: Any) -> Callable[..., Array]:
    parts = at(place, [step.out_info[0] for step in (before, *[later] * (count - 1))])
    return jax.jit(join, out_shardings=place).lower(*parts).compile()

  return {True: compiled(first), False: compiled(later)}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _encode(network: Network, params: PyTree, video: Array, state: Any) -> tuple[Array, Any]:
  """Normalised latents `[F, h, w, C]` of the next frames uint8 `[T, H, W, 3]`, and the state."""
  vae = network.bind(params)
  mean, _, state = vae.encode_next(from_uint8(video[None]), state)
  return vae.normalise(mean)[0], state


def encode_frames(
  network: Network, params: PyTree, frames: np.ndarray, group: int = 32
) -> np.ndarray:
  """Latents `[F, h, w, C]` of a video uint8 `[4 F - 3, H, W, 3]`, `group` frames at a time.

  Raises:
    ValueError: another dtype, number or size of frames, or `group` is not a multiple of 4.
  """
  if frames.dtype != np.uint8:
    raise ValueError(f"frames are {frames.dtype}; they must be uint8")
  check_remainder("number of frames", len(frames), TIME, 1)
  check_divides("group", group, "frames of a latent", TIME)

  latents, state = _encode(network, params, frames[:1], None)
  parts = [np.asarray(latents)]
  for start in range(1, len(frames), group):
    latents, state = _encode(network, params, frames[start : start + group], state)
    parts.append(np.asarray(latents))
  return np.concatenate(parts)
