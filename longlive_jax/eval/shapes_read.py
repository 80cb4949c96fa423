"""Reads the shapes world back from pixels with plain image measurements.

Objects are what has chroma (max - min of RGB): connected components, joined across the border of
the torus. Colour is the nearest hue and direction the median step of the centroid. Shape comes
from moments, which blur and half-covered edges move little: the skewness E[y^3] / E[y^2]^(3/2) is
0.57 in size for a triangle and 0 for the others; E[y^2 x^2] / (E[y^2] E[x^2]) is 1 for a square
and 2/3 for a circle. All are taken over many frames, so that one bad frame decides nothing.
"""

import dataclasses
import functools
import itertools

import numpy as np
from scipy import ndimage, optimize, sparse

from longlive_jax import checks
from longlive_jax.data.shapes_render import BACKGROUNDS, COLOURS, DIRECTIONS, backgrounds

CHROMA = 64  # of 255; the backgrounds stay below 40, objects are above 140
EDGE = 0.55  # of a blob's mean chroma, which lies a little below that of its core: half coverage
LEAST_AREA = 0.01  # of the squared shorter side; the smallest triangle has 0.036
LEAST_STEP = 1 / 480  # shorter sides a frame; objects move at least four times as fast
TRIANGLE_SKEW = 0.2
# Sharp squares have 1 and circles 0.67; a slight blur brings them to 0.80 and 0.75.
SQUARE_CROSS = 0.78
LEAST_INNER = 3  # frames away from the border needed to leave out those that touch it
BACKGROUND_FRAMES = 8
LEAST_CUT = 4.0  # mean change of a cut, of 255
CUT_RATIO = 2.0  # a cut changes this much more than the median frame nearby


@dataclasses.dataclass(frozen=True)
class ObjectReading:
  """One object as measured; y, x are its mean place as fractions of height and width."""

  colour: str
  shape: str
  direction: str  # "still" if it does not move
  y: float
  x: float
  area: float  # pixels
  skew: float  # size of the vertical skewness
  cross: float  # E[y^2 x^2] / (E[y^2] E[x^2])


@dataclasses.dataclass(frozen=True)
class Blobs:
  """Blobs of many frames: frame, area, skew, cross, inner [n]; place [n, 2]; rgb [n, 3]."""

  frame: np.ndarray
  place: np.ndarray
  area: np.ndarray
  skew: np.ndarray
  cross: np.ndarray
  inner: np.ndarray  # does not touch the border
  rgb: np.ndarray

  def take(self, index: np.ndarray) -> "Blobs":
    return Blobs(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def chroma_of(frames: np.ndarray) -> np.ndarray:
  """Returns max - min over RGB, [...] uint8, of frames [..., 3] uint8."""
  r, g, b = frames[..., 0], frames[..., 1], frames[..., 2]
  return np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)


def _label(mask: np.ndarray) -> np.ndarray:
  """Labels the components of every frame of mask [T, H, W], joined across the borders.

  Returns:
    [T, H, W] int32; 0 is background, and no label is in two frames.
  """
  within = np.zeros((3, 3, 3), bool)
  within[1] = True
  labels, count = ndimage.label(mask, structure=within)
  first = np.concatenate([labels[:, 0].ravel(), labels[:, :, 0].ravel()])
  last = np.concatenate([labels[:, -1].ravel(), labels[:, :, -1].ravel()])
  both = (first > 0) & (last > 0)
  graph = sparse.coo_matrix(
    (np.ones(both.sum(), bool), (first[both], last[both])), shape=(count + 1, count + 1)
  )
  _, group = sparse.csgraph.connected_components(graph, directed=False)
  return group.astype(np.int32)[labels]  # background is the first node, so its group is 0


def _wrap(offset: np.ndarray, size: float | np.ndarray) -> np.ndarray:
  """Returns the offset on a circle of length `size`, in [-size/2, size/2)."""
  return (offset + size / 2) % size - size / 2


def _centres(position: np.ndarray, label: np.ndarray, area: np.ndarray, size: int) -> np.ndarray:
  """Mean position of every label along an axis that is a circle, in pixels."""
  angle = position * (2 * np.pi / size)
  sine = np.bincount(label, np.sin(angle), area.size)
  cosine = np.bincount(label, np.cos(angle), area.size)
  rough = np.arctan2(sine, cosine) * (size / (2 * np.pi))
  rest = np.bincount(label, _wrap(position - rough[label], size), area.size)
  return (rough + rest / np.maximum(area, 1)) % size


def _moments(
  y: np.ndarray, x: np.ndarray, label: np.ndarray, area: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Skewness and cross moment of every label from offsets y, x to its centroid."""

  def mean(values: np.ndarray) -> np.ndarray:
    return np.bincount(label, values, area.size) / np.maximum(area, 1)

  tiny = np.finfo(np.float64).tiny
  yy, xx = mean(y**2), mean(x**2)
  skew = np.abs(mean(y**3)) / np.maximum(yy**1.5, tiny)
  return skew, mean(y**2 * x**2) / np.maximum(yy * xx, tiny)


def find_blobs(frames: np.ndarray) -> Blobs:
  """Measures every coloured blob of frames [T, H, W, 3] uint8."""
  _, height, width, _ = frames.shape
  chroma = chroma_of(frames)
  labels = _label(chroma > CHROMA).ravel()
  at = np.flatnonzero(labels)
  _, label = np.unique(labels[at], return_inverse=True)
  strength = chroma.ravel()[at].astype(np.float64)
  mean = np.bincount(label, strength) / np.maximum(np.bincount(label), 1)
  kept = strength > EDGE * mean[label] if at.size else np.zeros(0, bool)
  at, label, strength = at[kept], label[kept], strength[kept]
  area = np.bincount(label, minlength=mean.size).astype(np.float64)
  y, x = ((at // width) % height).astype(np.float64), (at % width).astype(np.float64)
  frame = np.zeros(mean.size, np.int64)
  frame[label] = at // (height * width)
  place = np.stack([_centres(y, label, area, height), _centres(x, label, area, width)], 1)
  dy, dx = _wrap(y - place[label, 0], height), _wrap(x - place[label, 1], width)
  skew, cross = _moments(dy, dx, label, area)
  border = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
  pixels = frames.reshape(-1, 3)[at]
  weight = np.bincount(label, strength**2, mean.size)
  rgb = [np.bincount(label, pixels[:, c] * strength**2, mean.size) for c in range(3)]
  blobs = Blobs(
    frame=frame,
    place=place,
    area=area,
    skew=skew,
    cross=cross,
    inner=np.bincount(label, border, mean.size) == 0,
    rgb=np.stack(rgb, 1) / np.maximum(weight, 1)[:, None],
  )
  order = np.argsort(frame, kind="stable")
  return blobs.take(order[area[order] >= LEAST_AREA * min(height, width) ** 2])


def _tracks(blobs: Blobs, frames: int, size: np.ndarray) -> list[Blobs]:
  """Follows objects through the frames that show the usual number of blobs."""
  per_frame = np.bincount(blobs.frame, minlength=frames)
  usual = int(np.bincount(per_frame).argmax())
  if usual == 0:
    return []
  good = blobs.take(np.flatnonzero(per_frame[blobs.frame] == usual))
  rows = np.arange(good.frame.size).reshape(-1, usual)
  for before, now in itertools.pairwise(rows):  # `before` is already in order
    step = _wrap(good.place[now][None] - good.place[before][:, None], size)
    tint = good.rgb[now][None] - good.rgb[before][:, None]
    cost = np.linalg.norm(step / size.min(), axis=-1) + np.linalg.norm(tint / 255, axis=-1)
    now[:] = now[optimize.linear_sum_assignment(cost)[1]]
  return [good.take(rows[:, i]) for i in range(usual)]


def hue(rgb: np.ndarray) -> np.ndarray:
  """Returns the hue angle in radians of colours [..., 3]."""
  r, g, b = np.moveaxis(np.asarray(rgb, np.float64), -1, 0)
  return np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)


def _vote_colour(rgb: np.ndarray) -> str:
  """Names the colour that most of the rows of rgb [n, 3] are nearest to in hue."""
  known = hue(np.asarray(list(COLOURS.values())))
  apart = np.abs(_wrap(hue(rgb)[:, None] - known, 2 * np.pi))
  return list(COLOURS)[np.bincount(apart.argmin(1)).argmax()]


def _direction(track: Blobs, stride: int, size: np.ndarray) -> str:
  """Names the median step of a track, or "still"."""
  gap = np.diff(track.frame)[:, None] * stride
  if gap.size == 0:
    return "still"
  step = np.median(_wrap(np.diff(track.place, axis=0), size) / gap, axis=0)
  if np.abs(step).max() < LEAST_STEP * size.min():
    return "still"
  return max(DIRECTIONS, key=lambda name: float(step @ np.asarray(DIRECTIONS[name])))


def _shape(skew: float, cross: float) -> str:
  """Names the shape with these moments."""
  if skew > TRIANGLE_SKEW:
    return "triangle"
  return "square" if cross > SQUARE_CROSS else "circle"


def _read_track(track: Blobs, stride: int, size: np.ndarray) -> ObjectReading:
  """Sums up one object."""
  clear = track.inner if track.inner.sum() >= LEAST_INNER else np.ones_like(track.inner)
  skew, cross = float(np.median(track.skew[clear])), float(np.median(track.cross[clear]))
  angle = np.exp(2j * np.pi * track.place / size).mean(axis=0)
  y, x = np.angle(angle) / (2 * np.pi) % 1.0
  return ObjectReading(
    colour=_vote_colour(track.rgb),
    shape=_shape(skew, cross),
    direction=_direction(track, stride, size),
    y=float(y),
    x=float(x),
    area=float(np.median(track.area)),
    skew=skew,
    cross=cross,
  )


def ordered(objects: list[ObjectReading], horizontal: bool | None = None) -> list[ObjectReading]:
  """Sorts readings like a caption does: upper first if they move horizontally, else left first.

  Args:
    objects: readings of one shot.
    horizontal: how the objects are meant to move; None goes by what most of them do.

  Returns:
    The same readings, sorted.
  """
  if horizontal is None:
    level = sum(o.direction in ("left", "right") for o in objects)
    horizontal = 2 * level >= len(objects)
  return sorted(objects, key=lambda o: o.y if horizontal else o.x)


def read_shot(frames: np.ndarray, stride: int = 2) -> list[ObjectReading]:
  """Measures the objects of a shot.

  Args:
    frames: [T, H, W, 3] uint8, all of one shot.
    stride: every how many frames to look.

  Returns:
    One reading for every object that is usually there, upper or left one first.
  """
  checks.check_shape("frames", frames.shape, (None, None, None, 3))
  if frames.dtype != np.uint8:
    raise ValueError(f"frames have dtype {frames.dtype}; they must be uint8")
  seen = frames[::stride]
  size = np.asarray(frames.shape[1:3], np.float64)
  tracks = _tracks(find_blobs(seen), len(seen), size)
  return ordered([_read_track(track, stride, size) for track in tracks])


@functools.lru_cache(maxsize=8)
def _plates(height: int, width: int) -> np.ndarray:
  """The backgrounds at half resolution, [6, H/2, W/2, 3] int16."""
  return np.asarray(backgrounds(height, width)).round().astype(np.int16)[:, ::2, ::2]


def read_background(frames: np.ndarray) -> str:
  """Names the background of frames [T, H, W, 3] uint8: the nearest picture outside of objects."""
  few = frames[:: -(-len(frames) // BACKGROUND_FRAMES), ::2, ::2]
  free = chroma_of(few) <= CHROMA
  if not free.any():
    free[:] = True
  plates = _plates(*frames.shape[1:3])
  pixels = few.astype(np.int16)
  return BACKGROUNDS[int(np.argmin([np.abs(pixels - p)[free].mean() for p in plates]))]


def find_cut(frames: np.ndarray, expected: int, search: int = 16) -> int | None:
  """Finds a cut: the largest difference between neighbouring frames.

  Args:
    frames: [T, H, W, 3] uint8.
    expected: where the first frame of the new shot should be.
    search: how many frames to either side to look.

  Returns:
    The first frame of the new shot, or None if no difference stands out.
  """
  low, high = max(expected - search, 1), min(expected + search, len(frames) - 1)
  if high < low:
    return None
  pixels = frames[low - 1 : high + 1, ::2, ::2].astype(np.int16)
  change = np.abs(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3))
  peak = int(change.argmax())
  if change[peak] < max(LEAST_CUT, CUT_RATIO * float(np.median(change))):
    return None
  return low + peak
