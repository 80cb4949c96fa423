"""What happens in the shapes world: objects, shots and clips, their captions, and drawing lots.

The grammar keeps the two objects of a shot apart by their near bytes, because a frozen random text
encoder has to bind them: the first is announced by its lane and `moving`, the second by the
opposite lane and `heading`.

  one red circle moving left, over snow
  north red circle moving left, south blue square heading right, over snow
  west red circle moving up, east blue square heading down, over night
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax import checks
from longlive_jax import config as config_lib
from longlive_jax.data.shapes_render import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

MAX_OBJECTS = 2
MAX_CAPTION_BYTES = 96
TWO_OBJECTS = 0.5  # probability of a second object
SIZES = (0.28, 0.33)  # of the shorter side
SPEEDS = (0.8 / 96, 1.6 / 96)  # shorter sides a frame
MARGIN = 0.03  # of the shorter side, free space between an object and its lane's border
LANES = {0: ("north", "south"), 1: ("west", "east")}  # by the axis on which the lanes lie apart
PAIRS = (("left", "right"), ("up", "down"))  # directions along one axis
SAME_LAYOUT = 0.8  # probability that the objects go on from where they are when no cut is made
SAME_BACKGROUND = 0.5  # probability that the background then stays


@dataclasses.dataclass(frozen=True)
class ObjectSpec:
  """A moving shape; `start` is its centre (y, x) as fractions of height and width."""

  colour: str
  shape: str
  direction: str
  speed: float  # shorter sides a frame
  size: float  # shorter sides
  start: tuple[float, float]

  @property
  def horizontal(self) -> bool:
    return DIRECTIONS[self.direction][1] != 0

  def place(self, age: int, video: config_lib.Video) -> tuple[float, float]:
    """Its centre (y, x) `age` frames on, on the torus, as fractions of height and width."""
    y, x = self.start
    down, right = DIRECTIONS[self.direction]
    way = self.speed * age * min(video.height, video.width)  # pixels
    return (y + down * way / video.height) % 1.0, (x + right * way / video.width) % 1.0

  def words(self, verb: str) -> str:
    return f"{self.colour} {self.shape} {verb} {self.direction}"


@dataclasses.dataclass(frozen=True)
class ShotSpec:
  """What one caption describes: objects (upper or left one first), background and length.

  With `follows` the picture goes on from the shot before without a cut, under another caption.
  """

  objects: tuple[ObjectSpec, ...]
  background: str
  frames: int
  follows: bool = False

  def caption(self) -> str:
    """Returns the text that names everything but speed, size and place."""
    if len(self.objects) == 1:
      return f"one {self.objects[0].words('moving')}, over {self.background}"
    first, second = self.objects
    lanes = LANES[0 if first.horizontal else 1]
    return (
      f"{lanes[0]} {first.words('moving')}, {lanes[1]} {second.words('heading')},"
      f" over {self.background}"
    )


@dataclasses.dataclass(frozen=True)
class ClipSpec:
  """Shots, cut apart unless one follows the shot before."""

  shots: tuple[ShotSpec, ...]

  @property
  def frames(self) -> int:
    return sum(shot.frames for shot in self.shots)

  @property
  def first_frames(self) -> tuple[int, ...]:
    """The first frame of every shot."""
    return tuple(sum(shot.frames for shot in self.shots[:i]) for i in range(len(self.shots)))


def shot_frames(shot_blocks: Sequence[int], block_latents: int) -> tuple[int, ...]:
  """Frames of shots that start at block borders; the very first latent is a single frame.

  Args:
    shot_blocks: blocks of every shot.
    block_latents: latents of a block.

  Returns:
    One length a shot: 4 * block_latents * blocks, less 3 for the first.
  """
  checks.check_at_least("block_latents", block_latents, 1)
  for blocks in shot_blocks:
    checks.check_at_least("shot_blocks", blocks, 1)
  return tuple(4 * block_latents * n - 3 * (i == 0) for i, n in enumerate(shot_blocks))


def _sample_object(
  rng: np.random.Generator, colour: str, direction: str, lane: int | None, video: config_lib.Video
) -> ObjectSpec:
  """Draws one object; `lane` is 0 or 1 of two, or None for the whole picture."""
  extent = (video.height, video.width)
  unit = min(extent)
  size = rng.uniform(*SIZES)
  start = [float(rng.uniform()), float(rng.uniform())]
  across = 0 if DIRECTIONS[direction][1] else 1  # the axis it does not move along
  room = (size / 2 + MARGIN) * unit / extent[across]
  low, high = (0.0, 1.0) if lane is None else (lane / 2, (lane + 1) / 2)
  start[across] = float(rng.uniform(low + room, high - room))
  shape = SHAPES[rng.integers(len(SHAPES))]
  speed = float(rng.uniform(*SPEEDS))
  return ObjectSpec(colour, shape, direction, speed, float(size), (start[0], start[1]))


def _sample_shot(
  rng: np.random.Generator, frames: int, previous: ShotSpec | None, video: config_lib.Video
) -> ShotSpec:
  """Draws a shot that shares neither background nor colours with the one before."""
  taken = {o.colour for o in previous.objects} if previous else set()
  colours = [c for c in COLOURS if c not in taken]
  scenes = [b for b in BACKGROUNDS if previous is None or b != previous.background]
  background = scenes[rng.integers(len(scenes))]
  count = 2 if rng.uniform() < TWO_OBJECTS else 1
  chosen = [colours[i] for i in rng.permutation(len(colours))[:count]]
  pair = PAIRS[rng.integers(2)]
  objects = tuple(
    _sample_object(rng, colour, pair[rng.integers(2)], lane if count == 2 else None, video)
    for lane, colour in enumerate(chosen)
  )
  return ShotSpec(objects, background, frames)


def _same_layout(
  rng: np.random.Generator, frames: int, previous: ShotSpec, video: config_lib.Video
) -> ShotSpec:
  """Draws new looks and directions for the objects of the shot before, which go on from there.

  Two objects keep to the axis they move along, on which their lanes depend.
  """
  count, level = len(previous.objects), previous.objects[0].horizontal
  names = list(COLOURS)
  directions = tuple(DIRECTIONS) if count == 1 else PAIRS[0 if level else 1]
  objects = tuple(
    dataclasses.replace(
      thing,
      colour=names[colour],
      shape=SHAPES[rng.integers(len(SHAPES))],
      direction=directions[rng.integers(len(directions))],
      start=thing.place(previous.frames, video),
    )
    for thing, colour in zip(previous.objects, rng.permutation(len(names))[:count], strict=True)
  )
  background = previous.background
  if rng.uniform() >= SAME_BACKGROUND:
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
  return ShotSpec(objects, background, frames)


def _follow(
  rng: np.random.Generator, frames: int, previous: ShotSpec, video: config_lib.Video
) -> ShotSpec:
  """Draws a shot of another caption that goes on from the shot before."""
  same_layout = rng.uniform() < SAME_LAYOUT
  shot = previous
  while shot.caption() == previous.caption():
    if same_layout:
      shot = _same_layout(rng, frames, previous, video)
    else:
      shot = _sample_shot(rng, frames, None, video)
  return dataclasses.replace(shot, follows=True)


def sample_clip(
  rng: np.random.Generator,
  shot_frames: Sequence[int],
  video: config_lib.Video,
  change_share: float = 0.0,
) -> ClipSpec:
  """Draws a clip.

  Args:
    rng: source of all randomness; the same state gives the same clip.
    shot_frames: length of every shot in frames, for instance from `shot_frames`.
    video: size of the picture; the height and width must be multiples of 32.
    change_share: probability that a shot follows the one before instead of being cut to.

  Returns:
    A clip. The shots on the two sides of a cut differ in background and in all colours; those on
    the two sides of a change without a cut have different captions.
  """
  checks.check_divides("video.height", video.height, "pixels_per_token", 32)
  checks.check_divides("video.width", video.width, "pixels_per_token", 32)
  checks.check_at_least("the number of shots", len(shot_frames), 1)
  shots: list[ShotSpec] = []
  for frames in shot_frames:
    checks.check_at_least("shot_frames", frames, 1)
    previous = shots[-1] if shots else None
    if previous and change_share > 0 and rng.uniform() < change_share:
      shots.append(_follow(rng, int(frames), previous, video))
    else:
      shots.append(_sample_shot(rng, int(frames), previous, video))
  return ClipSpec(tuple(shots))
