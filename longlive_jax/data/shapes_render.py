"""Drawing the shapes world: one jnp renderer for the CPU, for `jit` and for bulk work on a GPU.

The picture is a torus. With the pixel centre p, the object centre c(t) = c0 + v t and the size D
of the picture, an object is drawn from the wrapped offset ((p - c + D/2) mod D) - D/2, so that what
leaves on one side comes back on the other, and frame t follows from t alone. Edges come from a
signed distance d in pixels: coverage = smoothstep(1/2 - d).

Lengths are in units of the shorter side, so that one description serves every video size.
"""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.types import Array

COLOURS: dict[str, tuple[int, int, int]] = {
  "red": (226, 42, 42),
  "green": (40, 184, 66),
  "blue": (44, 84, 232),
  "yellow": (238, 206, 32),
  "purple": (168, 52, 214),
  "cyan": (36, 204, 216),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {
  "left": (0, -1),
  "right": (0, 1),
  "up": (-1, 0),
  "down": (1, 0),
}
BACKGROUNDS = ("night", "snow", "fog", "sand", "slate", "checker")
SQUARE_SIDE = 0.9  # of the size of an object; a circle is one size wide
TRIANGLE_HEIGHT = 0.92

Packed = dict[str, Array]


def _mix(low: tuple[int, int, int], high: tuple[int, int, int], weight: Array) -> Array:
  """Returns low + (high - low) * weight for weight [H, W], as [H, W, 3] in 0..255."""
  a, b = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
  return a + (b - a) * weight[..., None]


def backgrounds(height: int, width: int) -> Array:
  """Draws all backgrounds, in the order of `BACKGROUNDS`.

  Args:
    height: pixels.
    width: pixels.

  Returns:
    [6, H, W, 3] float32 in 0..255.
  """
  unit = min(height, width)
  y = (jnp.arange(height, dtype=jnp.float32) + 0.5)[:, None] * jnp.ones((1, width))
  x = (jnp.arange(width, dtype=jnp.float32) + 0.5)[None, :] * jnp.ones((height, 1))
  flat = jnp.zeros((height, width))
  stripes = 0.5 + 0.5 * jnp.clip(2.0 * jnp.sin(2 * jnp.pi * (x + y) / (unit / 4)), -1.0, 1.0)
  cells = (jnp.floor(x * 6 / unit) + jnp.floor(y * 6 / unit)) % 2
  return jnp.stack(
    [
      _mix((8, 9, 14), (32, 33, 40), y / height),
      _mix((238, 241, 244), (238, 241, 244), flat),
      _mix((142, 144, 147), (142, 144, 147), flat),
      _mix((208, 195, 170), (208, 195, 170), flat),
      _mix((46, 53, 66), (82, 91, 106), stripes),
      _mix((92, 92, 94), (166, 166, 168), cells),
    ]
  )


def _distances(dy: Array, dx: Array, size: Array) -> Array:
  """Signed distances in pixels to all shapes of one size.

  Args:
    dy: [H, 1] offsets from the centre of the bounding box, pixels.
    dx: [1, W] the same.
    size: scalar, pixels.

  Returns:
    [3, H, W], in the order of `SHAPES`; negative inside.
  """
  circle = jnp.sqrt(dy**2 + dx**2) - size / 2
  square = jnp.maximum(jnp.abs(dy), jnp.abs(dx)) - SQUARE_SIDE * size / 2
  tall = TRIANGLE_HEIGHT * size
  slope = jnp.sqrt(tall**2 + (size / 2) ** 2)  # length of a flank
  flank = (jnp.abs(dx) * tall - (dy + tall / 2) * (size / 2)) / slope
  triangle = jnp.maximum(flank, dy - tall / 2)
  return jnp.stack(jnp.broadcast_arrays(circle, square, triangle))


def _coverage(shot: Packed, slot: int, age: Array, height: int, width: int) -> Array:
  """Returns [H, W]: how much of every pixel object `slot` covers, `age` frames after the cut."""
  unit = float(min(height, width))
  extent = jnp.asarray([height, width], jnp.float32)
  centre = shot["start"][slot] * extent + shot["velocity"][slot] * unit * age
  y = jnp.arange(height, dtype=jnp.float32) + 0.5 - centre[0]
  x = jnp.arange(width, dtype=jnp.float32) + 0.5 - centre[1]
  y = jnp.mod(y + height / 2, height) - height / 2
  x = jnp.mod(x + width / 2, width) - width / 2
  distance = _distances(y[:, None], x[None, :], shot["size"][slot] * unit)[shot["shape"][slot]]
  inside = jnp.clip(0.5 - distance, 0.0, 1.0)
  return inside * inside * (3.0 - 2.0 * inside) * shot["present"][slot]


def render_packed(packed: Packed, frame_indices: Array, height: int, width: int) -> Array:
  """Renders frames of one clip; works inside `jit` and `vmap`.

  Args:
    packed: one clip from `shapes.pack` (no batch axis).
    frame_indices: [T] int32, counted from the start of the clip; any order, any range.
    height: pixels, static.
    width: pixels, static.

  Returns:
    [T, H, W, 3] float32 in [-1, 1].
  """
  plates = backgrounds(height, width)
  palette = jnp.asarray(list(COLOURS.values()), jnp.float32)
  first = packed["first_frame"]  # [shots]

  def frame(index: Array) -> Array:
    number = jnp.maximum(jnp.sum(first <= index) - 1, 0)
    shot = {name: value[number] for name, value in packed.items()}
    age = (index - shot["first_frame"]).astype(jnp.float32)
    picture = plates[shot["background"]]
    for slot in range(packed["shape"].shape[-1]):
      cover = _coverage(shot, slot, age, height, width)[..., None]
      picture = picture + (palette[shot["colour"][slot]] - picture) * cover
    return picture / 127.5 - 1.0

  return jax.vmap(frame)(jnp.asarray(frame_indices, jnp.int32))


@functools.partial(jax.jit, static_argnames=("height", "width"))
def render_batch(packed: Packed, frame_indices: Array, *, height: int, width: int) -> Array:
  """Renders many clips in one call, one clip after the other, so that scratch memory is one clip's.

  Args:
    packed: clips from `shapes.pack_many`, every array with a leading axis B.
    frame_indices: [T] int32, the same frames of every clip.
    height: pixels, static.
    width: pixels, static.

  Returns:
    [B, T, H, W, 3] float32 in [-1, 1].
  """
  return jax.lax.map(lambda clip: render_packed(clip, frame_indices, height, width), packed)
