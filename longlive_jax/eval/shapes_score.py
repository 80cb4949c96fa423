"""Scores videos of the shapes world: is what the script says what the pixels show?

Per shot, colour, shape and direction are the share of objects that are right, of the larger of
expected and found: a missing or an extra object counts as wrong. The score of a shot is the mean
of the three. Chance for one object is 1/6, 1/3 and 1/4; `chance()` takes the number of objects
into account. Scores of shots that begin without a cut are also given apart, as "changed".
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from longlive_jax.data.shapes_render import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from longlive_jax.data.shapes_spec import TWO_OBJECTS, ClipSpec, ShotSpec
from longlive_jax.eval.shapes_read import (
  ObjectReading,
  find_cut,
  ordered,
  read_background,
  read_shot,
)

__all__ = [
  "ClipReading",
  "ObjectReading",
  "ShotReading",
  "chance",
  "compare_clip",
  "find_cut",
  "paired",
  "permuted",
  "read_clip",
  "read_shot",
  "score",
  "score_clip",
]

SKIP_FRAMES = 4  # after a change of the caption: one latent
CUT_TOLERANCE = 4  # frames: one latent
SHARES = ("colour", "shape", "direction")  # what the score is the mean of
PER_SHOT = ("score", *SHARES, "objects", "background")
MEASURES = (*PER_SHOT, "cut", "changed")

Result = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class ShotReading:
  """What one shot shows."""

  objects: tuple[ObjectReading, ...]
  background: str


@dataclasses.dataclass(frozen=True)
class ClipReading:
  """What a clip shows: its shots, and where a cut is found at each border (None: nowhere)."""

  shots: tuple[ShotReading, ...]
  cuts: tuple[int | None, ...]


def read_clip(frames: np.ndarray, spec: ClipSpec, search: int = 16) -> ClipReading:
  """Measures a clip; of the script only the lengths of the shots are used.

  Args:
    frames: [T, H, W, 3] uint8.
    spec: the script.
    search: frames to either side of a border in which to look for a cut.

  Returns:
    The measurements.

  Raises:
    ValueError: the video has not the length of the script.
  """
  if len(frames) != spec.frames:
    raise ValueError(f"the video has {len(frames)} frames; its script has {spec.frames}")
  shots = []
  for i, (first, shot) in enumerate(zip(spec.first_frames, spec.shots, strict=True)):
    skip = min(SKIP_FRAMES, shot.frames - 1) if i else 0
    part = frames[first + skip : first + shot.frames]
    shots.append(ShotReading(tuple(read_shot(part)), read_background(part)))
  cuts = tuple(find_cut(frames, first, search) for first in spec.first_frames[1:])
  return ClipReading(tuple(shots), cuts)


def _matched(reading: ShotReading, shot: ShotSpec) -> list[tuple[int, ObjectReading]]:
  """Pairs readings with the objects of a shot by their place; extra readings are left out."""
  count = len(shot.objects)
  level = shot.objects[0].horizontal
  found = sorted(reading.objects, key=lambda o: -o.area)[:count]
  if count == 2 and len(found) == 1:
    return [(int((found[0].y if level else found[0].x) >= 0.5), found[0])]
  return list(enumerate(ordered(found, level)))


def compare_shot(reading: ShotReading, shot: ShotSpec) -> dict[str, float]:
  """Returns the shares of `PER_SHOT` for one shot, each in 0..1."""
  most = max(len(reading.objects), len(shot.objects))
  right = {
    name: sum(getattr(o, name) == getattr(shot.objects[i], name) for i, o in pairs) / most
    for pairs in (_matched(reading, shot),)
    for name in SHARES
  }
  return {
    "score": sum(right.values()) / len(SHARES),
    **right,
    "objects": float(len(reading.objects) == len(shot.objects)),
    "background": float(reading.background == shot.background),
  }


def compare_clip(reading: ClipReading, spec: ClipSpec) -> Result:
  """Compares measurements with a script.

  Args:
    reading: from `read_clip`.
    spec: a script of as many shots.

  Returns:
    For every name of `PER_SHOT` one value a shot, "cut" with one value a cut, and "changed" with
    the score of every shot that follows the one before without a cut.
  """
  shots = [compare_shot(r, s) for r, s in zip(reading.shots, spec.shots, strict=True)]
  result = {name: [shot[name] for shot in shots] for name in PER_SHOT}
  borders = zip(reading.cuts, spec.first_frames[1:], spec.shots[1:], strict=True)
  result["cut"] = [
    float(cut is not None and abs(cut - first) <= CUT_TOLERANCE)
    for cut, first, shot in borders
    if not shot.follows
  ]
  pairs = zip(result["score"], spec.shots, strict=True)
  result["changed"] = [value for value, shot in pairs if shot.follows]
  return result


def score_clip(frames: np.ndarray, spec: ClipSpec, search: int = 16) -> Result:
  """Measures a clip and compares it with its script: `compare_clip(read_clip(...))`."""
  return compare_clip(read_clip(frames, spec, search), spec)


def _pooled(results: Sequence[Mapping[str, list[float]]], name: str) -> np.ndarray:
  return np.asarray([value for result in results for value in result[name]], np.float64)


def _summary(name: str, values: np.ndarray) -> dict[str, float]:
  """Mean and standard error; no error from one value, nothing from none."""
  out = {}
  if values.size:
    out[name] = float(values.mean())
  if values.size > 1:
    out[f"{name}_error"] = float(values.std(ddof=1) / np.sqrt(values.size))
  return out


def score(results: Sequence[Result]) -> dict[str, float]:
  """Pools results.

  Args:
    results: from `score_clip`, one a clip.

  Returns:
    The mean and, as `<name>_error`, the standard error over shots of every name of `PER_SHOT`,
    over cuts of "cut" and over shots without one of "changed" (absent without any); "shots",
    their number.
  """
  out: dict[str, float] = {"shots": len(_pooled(results, "score"))}
  for name in MEASURES:
    out |= _summary(name, _pooled(results, name))
  return out


def paired(first: Sequence[Result], second: Sequence[Result]) -> dict[str, float]:
  """Compares two sets of videos of the same scripts, shot by shot.

  Args:
    first: results of one set.
    second: results of the other, in the same order.

  Returns:
    Like `score`, of the differences first - second.

  Raises:
    ValueError: the results are not of the same scripts.
  """
  out: dict[str, float] = {"shots": len(_pooled(first, "score"))}
  for name in MEASURES:
    a, b = _pooled(first, name), _pooled(second, name)
    if a.shape != b.shape:
      raise ValueError(f"cannot pair {a.size} values of {name} with {b.size}: other scripts")
    out |= _summary(name, a - b)
  return out


def permuted(readings: Sequence[ClipReading], specs: Sequence[ClipSpec]) -> list[Result]:
  """Control: compares every clip with the script of the next one.

  Args:
    readings: from `read_clip`, at least two.
    specs: their scripts, all with the same number of shots.

  Returns:
    Results that should be at `chance()`.
  """
  if len(specs) < 2:
    raise ValueError(f"a permutation needs at least 2 clips; there are {len(specs)}")
  shifted = [*specs[1:], specs[0]]
  return [compare_clip(r, s) for r, s in zip(readings, shifted, strict=True)]


def chance() -> dict[str, float]:
  """Expected result of a perfect video of another script from the same sampler.

  With p the probability of two objects, the counts agree with p^2 + (1-p)^2; if they differ, one
  of two objects is compared and the other is wrong.

  Returns:
    The expected mean of every name of `PER_SHOT`.
  """
  agree = TWO_OBJECTS**2 + (1 - TWO_OBJECTS) ** 2
  compared = agree + (1 - agree) / 2
  kinds = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
  out = {name: compared / len(kinds[name]) for name in SHARES}
  out["score"] = sum(out[name] for name in SHARES) / len(SHARES)
  return {**out, "objects": agree, "background": 1 / len(BACKGROUNDS)}
