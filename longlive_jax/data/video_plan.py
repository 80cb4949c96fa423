"""Which frames of which files make a training sample; nothing is decoded here.

A sample has `data.blocks` blocks of n = `model.block_latents` latents. The first block is 4n - 3
frames at `video.fps`, every other one 4n, so that F latents are 4 (F - 1) + 1 frames. Blocks are
served from the clips of one folder, forwards, and none reaches across two clips. With r the rate of
the clip over `video.fps`, frame i of a block that starts at source frame s is

    round(s + i r), halves to even,

and the next block starts at round(s + r * frames of the block).

A shot is a clip, or with `data.max_shot_blocks` a part of it: after that many blocks, one second
is left out and what follows is another shot. Source: training.md §10.1.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np

from longlive_jax.config.schema import Experiment
from longlive_jax.data.video_index import Clip, Folder

STARTS = 50  # about so many places of a clip where a sample may start


@dataclasses.dataclass(frozen=True)
class Rules:
  """The settings a plan follows from.

  Attributes:
    blocks: of a sample.
    block_latents: latents of a block.
    fps: of the sample, frames a second.
    max_shot_blocks: longest shot in blocks; 0 = no limit.
    least_blocks: that a folder must fill.
    cut_prefix: text put before the first prompt of a new shot.
  """

  blocks: int
  block_latents: int
  fps: int
  max_shot_blocks: int
  least_blocks: int
  cut_prefix: str

  @classmethod
  def of(cls, experiment: Experiment) -> "Rules":
    """The rules that an experiment sets."""
    data = experiment.data
    least = data.min_blocks if data.pad else data.blocks
    return cls(
      blocks=data.blocks,
      block_latents=experiment.model.block_latents,
      fps=experiment.video.fps,
      max_shot_blocks=data.max_shot_blocks,
      least_blocks=least,
      cut_prefix=experiment.sample.cut_prefix,
    )

  def block_frames(self, first: bool) -> int:
    """Frames of the first block or of any other."""
    return 4 * self.block_latents - 3 * first

  @property
  def frames(self) -> int:
    """T, the frames of a sample."""
    return 4 * (self.blocks * self.block_latents - 1) + 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a sample is made of.

  Attributes:
    root: folder of the data set.
    name: of the sample's folder.
    clips: the files.
    files: [T] int32, which of `clips` every frame is taken from.
    frames: [T] int64, its number in that clip.
    prompts: one a block, with the cut prefix where a new shot begins.
    shots: [blocks] int32, the shot of every block, counted from 0.
    valid_latents: what is not padding, a multiple of `model.block_latents`.
  """

  root: str
  name: str
  clips: tuple[Clip, ...]
  files: np.ndarray
  frames: np.ndarray
  prompts: tuple[str, ...]
  shots: np.ndarray
  valid_latents: int


@dataclasses.dataclass(frozen=True)
class Start:
  """Where a sample starts: a clip of its folder and a frame; `blocks` is what can be filled."""

  clip: int
  frame: int
  blocks: int


def sample_plan(folder: Folder, rules: Rules, rng: np.random.Generator) -> Plan:
  """Plans a sample that starts anywhere in the folder where it fits.

  Args:
    folder: the sample's clips.
    rules: the settings.
    rng: decides the start; one draw.

  Returns:
    The plan.

  Raises:
    ValueError: the folder is too short.
  """
  choices = starts(folder, rules)
  return plan_from(folder, rules, choices[int(rng.integers(len(choices)))])


def starts(folder: Folder, rules: Rules) -> list[Start]:
  """The places where a sample may start: about 50 a clip, evenly spread, that fill most blocks.

  Skips within long clips (`data.max_shot_blocks`) are taken into account.

  Raises:
    ValueError: no place fills enough blocks.
  """
  later = blocks_after(folder, rules)
  reach = rules.block_frames(first=True) - 1
  found = []
  for number, clip in enumerate(folder.clips):
    last = clip.frames - 1 - round(reach * clip.fps / rules.fps)
    for frame in range(0, last + 1, max(1, -(-last // STARTS))):
      filled = len(blocks_of(clip, frame, rules, first=True))
      if filled:
        found.append(Start(number, frame, min(rules.blocks, filled + later[number])))
  most = max((start.blocks for start in found), default=0)
  if most < rules.least_blocks:
    raise ValueError(too_short(folder, rules, most))
  return [start for start in found if start.blocks == most]


def check_long_enough(folder: Folder, rules: Rules) -> None:
  """Raises ValueError if no sample can be made of a folder; quicker than `starts`."""
  later = blocks_after(folder, rules)
  most = 0
  for clip, more in zip(folder.clips, later, strict=True):
    filled = len(blocks_of(clip, 0, rules, first=True))  # an earlier start never fills less
    most = max(most, min(rules.blocks, filled + more) if filled else 0)
  if most < rules.least_blocks:
    raise ValueError(too_short(folder, rules, most))


def too_short(folder: Folder, rules: Rules, most: int) -> str:
  """The line that says so."""
  if rules.least_blocks < rules.blocks:
    advice = f"data.min_blocks={rules.least_blocks} are needed"
  else:
    advice = f"data.blocks={rules.blocks} are needed, or data.pad=true with fewer"
  return f"video/{folder.name}: it fills {most} blocks at {rules.fps} frames a second; {advice}"


def blocks_after(folder: Folder, rules: Rules) -> list[int]:
  """For every clip, how many blocks the clips after it fill, each from its beginning."""
  counts = [len(blocks_of(clip, 0, rules, first=False)) for clip in folder.clips]
  return [sum(counts[i + 1 :]) for i in range(len(counts))]


def blocks_of(clip: Clip, start: int, rules: Rules, first: bool) -> list[tuple[int, bool]]:
  """The blocks that one clip fills.

  Args:
    clip: the file.
    start: source frame of the first of them.
    rules: the settings.
    first: whether the first of them is the first of the sample.

  Returns:
    At most `rules.blocks` pairs (source frame where it starts, whether it begins a shot).
  """
  step = clip.fps / rules.fps
  p, q = step.numerator, step.denominator
  found: list[tuple[int, bool]] = []
  at, run = start, 0
  while len(found) < rules.blocks:
    jump = run > 0 and run == rules.max_shot_blocks
    if jump:
      at, run = at + round(clip.fps), 0
    count = rules.block_frames(first and not found)
    if nearest(at * q + (count - 1) * p, q) >= clip.frames:
      break
    found.append((at, jump or not found))
    at, run = nearest(at * q + count * p, q), run + 1
  return found


def nearest(numerator: Any, denominator: int) -> Any:
  """The whole number nearest to a fraction, or to each of an array of them; halves to even."""
  whole, rest = numerator // denominator, numerator % denominator
  return whole + ((2 * rest > denominator) | ((2 * rest == denominator) & (whole % 2 == 1)))


def plan_from(folder: Folder, rules: Rules, start: Start) -> Plan:
  """The plan of a sample that starts at a given place.

  What `start.blocks` leaves of `rules.blocks` repeats the last frame and its caption.

  Args:
    folder: the sample's clips.
    rules: the settings.
    start: one of `starts(folder, rules)`.

  Returns:
    The plan.
  """
  files: list[np.ndarray] = []
  frames: list[np.ndarray] = []
  prompts: list[str] = []
  shots: list[int] = []
  for number in range(start.clip, len(folder.clips)):
    clip = folder.clips[number]
    at = start.frame if number == start.clip else 0
    for begin, opens in blocks_of(clip, at, rules, first=not shots)[: rules.blocks - len(shots)]:
      count = rules.block_frames(first=not shots)
      frames.append(picks(begin, count, clip.fps / rules.fps))
      files.append(np.full(count, number, np.int32))
      prompts.append((rules.cut_prefix if opens and shots else "") + clip.caption)
      shots.append(shots[-1] + opens if shots else 0)
  missing = rules.blocks - len(shots)
  short = rules.frames - sum(map(len, frames))
  files.append(np.full(short, files[-1][-1], np.int32))
  frames.append(np.full(short, frames[-1][-1], np.int64))
  caption = folder.clips[files[-2][-1]].caption
  return Plan(
    root=folder.root,
    name=folder.name,
    clips=folder.clips,
    files=np.concatenate(files),
    frames=np.concatenate(frames),
    prompts=(*prompts, *[caption] * missing),
    shots=np.asarray(shots + [shots[-1]] * missing, np.int32),
    valid_latents=len(shots) * rules.block_latents,
  )


def picks(start: int, count: int, step: Fraction) -> np.ndarray:
  """Source frames of one block.

  Args:
    start: source frame of the first.
    count: frames of the block.
    step: source frames from one frame to the next.

  Returns:
    [count] int64, round(start + i * step).
  """
  index = np.arange(count, dtype=np.int64)
  return nearest(start * step.denominator + index * step.numerator, step.denominator)
