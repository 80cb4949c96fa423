"""Decodes those frames of a training sample that are asked for.

A read starts at the last keyframe that is shown no later than the first wanted frame, and gives the
same pictures as decoding the file from its beginning. That takes care: containers find keyframes by
the time they are decoded, which is before they are shown, so a seek may land behind the wanted
frame; and a decoder gives nothing that needs frames from before the keyframe. So the first picture
after a seek is looked at, and if it is already too late, the next try begins earlier.
"""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from longlive_jax.checks import check_choice
from longlive_jax.data.video_index import Clip
from longlive_jax.data.video_plan import Plan
from longlive_jax.io.video import PRECISE

FITS = ("crop", "stretch")
EARLIER_SECONDS = (0, 2, 10, 30)  # before the wanted frame; after these, the whole file


def read_frames(
  plan: Plan, start: int, stop: int, height: int, width: int, fit: str = "crop"
) -> np.ndarray:
  """Decodes frames start..stop-1 of a sample.

  Args:
    plan: from `sample_plan`.
    start: first frame of the sample, at its own rate; 0 <= start < stop.
    stop: end, exclusive, at most T.
    height: pixels of the result.
    width: pixels.
    fit: "crop" scales until the picture is covered and cuts the rest away evenly; "stretch"
      gives up the aspect ratio.

  Returns:
    uint8 [stop - start, H, W, 3].

  Raises:
    ValueError: the range is none of the sample, or a file cannot be read; names it.

  Source: training.md §10.1.
  """
  check_choice("data.fit", fit, FITS)
  if not 0 <= start < stop <= len(plan.frames):
    raise ValueError(f"frames {start}..{stop} are not part of a sample of {len(plan.frames)}")
  out = np.empty((stop - start, height, width, 3), np.uint8)
  files, numbers = plan.files[start:stop], plan.frames[start:stop]
  borders = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), stop - start]
  for left, right in itertools.pairwise(borders):
    clip = plan.clips[files[left]]
    wanted = numbers[left:right].tolist()
    for at, frame in read_clip(Path(plan.root), clip, wanted):
      out[left + at] = pixels_of(frame, height, width, fit)
      for again in range(at + 1, right - left):  # a slow file, or padding
        if wanted[again] != wanted[at]:
          break
        out[left + again] = out[left + at]
  return out


def pixels_of(frame: av.VideoFrame, height: int, width: int, fit: str) -> np.ndarray:
  """A frame, upright and at another size, antialiased bilinear.

  Scaling and conversion to RGB are one step. The decoder's own scaler takes half the time of
  Pillow's, and told to round properly it is nearer to the truth: its default darkens by a level.

  Args:
    frame: as it was decoded.
    height: pixels of the result.
    width: pixels.
    fit: see `read_frames`.

  Returns:
    uint8 [H, W, 3].
  """
  quarters = round(frame.rotation / 90) % 4  # telephones store videos lying on their side
  size = (frame.height, frame.width) if quarters % 2 == 0 else (frame.width, frame.height)
  scaled = covering(*size, height, width) if fit == "crop" else (height, width)
  stored = scaled if quarters % 2 == 0 else scaled[::-1]
  made = frame.reformat(width=stored[1], height=stored[0], format="rgb24", interpolation=PRECISE)
  image = np.rot90(made.to_ndarray(), quarters)
  top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
  return image[top : top + height, left : left + width]


def covering(height: int, width: int, least_height: int, least_width: int) -> tuple[int, int]:
  """The smallest size of the same shape that covers another one."""
  scale = max(least_height / height, least_width / width)
  return max(least_height, round(height * scale)), max(least_width, round(width * scale))


def read_clip(root: Path, clip: Clip, wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
  """Decodes frames of one file.

  Args:
    root: folder of the data set.
    clip: the file.
    wanted: numbers of frames, none smaller than the one before.

  Yields:
    (index into `wanted`, frame) for every number that differs from the one before.

  Raises:
    ValueError: the file cannot be read, or ends before a wanted frame.
  """
  path = root / clip.file
  try:
    for seconds in (*EARLIER_SECONDS, None):
      with av.open(str(path)) as container:
        shown = positions(container, clip, wanted[0], seconds)
        first = next(shown, None)
        if seconds is None or (first is not None and first[0] <= wanted[0] + 0.5):
          yield from choose(path, first, shown, wanted)
          return
  except av.FFmpegError as error:
    raise ValueError(f"video '{path}' cannot be read: {error.strerror}") from error


def positions(
  container: Any, clip: Clip, number: int, seconds: int | None
) -> Iterator[tuple[float, av.VideoFrame]]:
  """Decodes from a keyframe on, or from the beginning.

  Args:
    container: the opened file.
    clip: what is known of it.
    number: the frame to seek.
    seconds: how much earlier to look for a keyframe; None decodes the whole file.

  Yields:
    (position in frames since the first, decoded frame).
  """
  stream = container.streams.video[0]
  stream.thread_type = "AUTO"
  if clip.start is None:
    yield from ((float(i), frame) for i, frame in enumerate(container.decode(stream)))
    return
  tick = Fraction(stream.time_base.numerator, stream.time_base.denominator)
  frames_a_tick = tick * clip.fps
  if seconds is not None:
    target = clip.start + int(number / frames_a_tick) - int(seconds / tick)
    if target > clip.start:
      container.seek(target, stream=stream)
  for frame in container.decode(stream):
    if frame.pts is not None:
      yield float((frame.pts - clip.start) * frames_a_tick), frame


def choose(
  path: Path,
  first: tuple[float, av.VideoFrame] | None,
  shown: Iterator[tuple[float, av.VideoFrame]],
  wanted: Sequence[int],
) -> Iterator[tuple[int, av.VideoFrame]]:
  """Yields the picture that is shown at the middle of every wanted frame; see `read_clip`."""
  current, at = first, 0
  following = next(shown, None)
  while at < len(wanted):
    while following is not None and following[0] <= wanted[at] + 0.5:
      current, following = following, next(shown, None)
    if current is None or (following is None and round(current[0]) < wanted[at]):
      ends = "has no frames" if current is None else f"ends at frame {round(current[0])}"
      raise ValueError(
        f"video '{path}' {ends}, and frame {wanted[at]} is needed: it is damaged, or has changed"
        " since the run has started"
      )
    yield at, current[1]
    number = wanted[at]
    while at < len(wanted) and wanted[at] == number:
      at += 1
