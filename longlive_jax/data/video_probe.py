"""Looks at a video file without decoding it: how long it is, its rate and size, and if it is whole.

Frames are numbered by time: frame n is what is shown n + 1/2 frame lengths after the first frame.
In a file of constant rate, that is the n-th frame; in others it is what plays at the right speed.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av

MOST_FPS = 1000  # what is above is the clock of a file that does not know its rate


def probe(path: Path) -> dict[str, Any]:
  """Length, rate and size of a video file, from its first frame and its last packets.

  Args:
    path: any container that FFmpeg reads.

  Returns:
    frames; fps as numerator and denominator; height and width of the upright picture; start, the
    time stamp of the first frame, or None where a file has none to be trusted.

  Raises:
    ValueError: it cannot be used, and why.
  """
  try:
    with av.open(str(path)) as container:
      if not container.streams.video:
        raise ValueError("it holds no video stream")
      stream = container.streams.video[0]
      given = stream.average_rate or stream.guessed_rate
      if not given or not 0 < given <= MOST_FPS:
        raise ValueError("its frame rate is unknown")
      rate = Fraction(given.numerator, given.denominator)
      frame = next(container.decode(stream), None)
      if frame is None:
        raise ValueError("it has no frames")
      start = None if container.format.name == "avi" else frame.pts
      turned = frame.rotation % 180 != 0
      size = (frame.width, frame.height) if turned else (frame.height, frame.width)
    frames = count_frames(path, start, rate)
  except av.FFmpegError as error:
    raise ValueError(f"it is not a readable video: {error.strerror}") from error
  fps = [rate.numerator, rate.denominator]
  return {"frames": frames, "fps": fps, "height": size[0], "width": size[1], "start": start}


def count_frames(path: Path, start: int | None, rate: Fraction) -> int:
  """Frames from the first to the last that is stored, without decoding.

  The header is not asked: it says what a file that is cut short once had.
  """
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    if start is not None and stream.duration and "mp4" in container.format.name:
      container.seek(start + stream.duration, stream=stream)  # its tables find the last keyframe
    packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
    if not packets or any(packet.is_corrupt for packet in packets):
      raise ValueError("it is cut short")
    if start is None:
      return len(packets)
    last = max((p.pts for p in packets if p.pts is not None), default=start)
    tick = Fraction(stream.time_base.numerator, stream.time_base.denominator)
    return round((last - start) * tick * rate) + 1
