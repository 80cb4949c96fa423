"""Videos and images, in and out.

Writing streams: one group of frames is held at a time, so memory does not grow with the length
of the video, and the file appears under its name only when it is complete. The form is chosen
by the suffix of the path.
"""

import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image

from longlive_jax.checks import check_at_least
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.io.palette import PALETTE_FRAMES, gif_size, indexed, shared_palette, spread

PRECISE = (  # colours within one level, and the same ones on every processor
  Interpolation.BILINEAR
  | Interpolation.ACCURATE_RND
  | Interpolation.BITEXACT
  | Interpolation.FULL_CHR_H_INT
  | Interpolation.FULL_CHR_H_INP
)
PNG_NUMBER = re.compile(r"%0?\d*d")

Frames = Iterable[np.ndarray]


def write_video(path: str | Path, frames: Frames, fps: float, *, crf: int = 18) -> int:
  """Writes a video while its frames arrive.

  Args:
    path: `.mp4` (H.264, yuv420p), `.gif` (one palette, at most 640 pixels wide), a pattern such
      as `frame_%05d.png`, or a folder (no suffix), which then holds `00000.png` and so on.
    frames: groups `[T, H, W, 3]` uint8, all of one size; a group may hold any number of frames.
    fps: frames a second, > 0.
    crf: constant rate factor of H.264, 0 (lossless) to 51.

  Returns:
    The number of frames written.

  Raises:
    ValueError: unknown suffix, odd size for .mp4, no frames, wrong dtype or changing shape;
      nothing is left behind then, nor on any other interruption.
    OSError: the place cannot be written.
  """
  path = Path(path)
  write = writer_for(path)
  if not fps > 0:
    raise ValueError(f"video.fps={fps} must be more than 0")
  if not 0 <= crf <= 51:
    raise ValueError(f"crf={crf} must be between 0 and 51")
  return write(path, single_frames(frames), Fraction(fps).limit_denominator(1001), crf)


def writer_for(path: Path) -> Callable[[Path, Iterator[np.ndarray], Fraction, int], int]:
  """The writer of this suffix; refuses a path that cannot work before any frame is made."""
  suffix = path.suffix.lower()
  writers = {".mp4": write_mp4, ".gif": write_gif, ".png": write_pngs, "": write_pngs}
  if suffix not in writers:
    raise ValueError(f"cannot write '{path}': the suffix must be .mp4, .gif, .png or a folder")
  if suffix == ".png" and not PNG_NUMBER.search(path.name):
    raise ValueError(
      f"cannot write many frames to '{path}': put a number into the name"
      f" ('{path.stem}_%05d.png') or give a folder"
    )
  if suffix and path.is_dir():
    raise ValueError(f"cannot write '{path}': it is a folder")
  if not suffix and path.is_file():
    raise ValueError(f"cannot write frames into '{path}': it is a file, not a folder")
  check_writable(path, folder=not suffix)
  return writers[suffix]


def single_frames(groups: Frames) -> Iterator[np.ndarray]:
  """Yields frames `[H, W, 3]` one by one, all checked to be of one size."""
  size: tuple[int, ...] | None = None
  for group in groups:
    group = np.asarray(group)
    if group.ndim != 4 or group.shape[-1] != 3 or group.dtype != np.uint8:
      raise ValueError(f"frames must be uint8 [T, H, W, 3]; got {group.dtype} {list(group.shape)}")
    size = size or group.shape[1:]
    if group.shape[1:] != size:
      raise ValueError(
        f"frames changed from {size[1]}x{size[0]} to {group.shape[2]}x{group.shape[1]} pixels;"
        " a video has one size"
      )
    yield from group


def with_first(frames: Iterator[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
  """The first frame, and all frames."""
  first = next(frames, None)
  if first is None:
    raise ValueError("a video needs at least one frame; there is none to write")
  return first, itertools.chain([first], frames)


def write_mp4(path: Path, frames: Iterator[np.ndarray], fps: Fraction, crf: int) -> int:
  """H.264, 4:2:0, BT.709, the index in front so that players start while it loads."""
  first, frames = with_first(frames)
  height, width = first.shape[:2]
  if height % 2 or width % 2:
    raise ValueError(
      f"a .mp4 (yuv420p) needs an even height and width, not {width}x{height} pixels;"
      " write a .gif or .png frames instead"
    )
  with replacing(path) as partial:
    options = {"movflags": "+faststart"}
    with av.open(str(partial), "w", format="mp4", options=options) as container:
      stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
      stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
      stream.thread_type = "AUTO"
      context = stream.codec_context
      context.colorspace = Colorspace.ITU709
      context.color_primaries = ColorPrimaries.BT709
      context.color_trc = ColorTrc.BT709
      context.color_range = ColorRange.MPEG
      return encode(container, stream, (bt709_frame(frame) for frame in frames))


def bt709_frame(frame: np.ndarray) -> av.VideoFrame:
  """A frame `[H, W, 3]` as limited-range BT.709 4:2:0."""
  return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
    format="yuv420p",
    dst_colorspace=Colorspace.ITU709,
    dst_color_range=ColorRange.MPEG,
    interpolation=PRECISE,
  )


def encode(container: Any, stream: Any, frames: Iterable[av.VideoFrame]) -> int:
  """Encodes all frames, one tick of the stream apart; returns their number."""
  count = 0
  for frame in frames:
    frame.pts = count
    frame.time_base = 1 / stream.codec_context.framerate
    container.mux(stream.encode(frame))
    count += 1
  container.mux(stream.encode(None))
  return count


def write_gif(path: Path, frames: Iterator[np.ndarray], fps: Fraction, crf: int) -> int:
  """An endless GIF with one palette for the whole video.

  The palette needs all frames before the first is written, so they wait in an unnamed file in the
  same folder: memory stays constant.
  """
  del crf
  first, frames = with_first(frames)
  height, width = gif_size(*first.shape[:2])
  with replacing(path) as partial, tempfile.TemporaryFile(dir=path.parent) as spool:
    count = 0
    for frame in frames:
      spool.write(resized(frame, height, width).tobytes())
      count += 1

    def stored(index: int) -> Image.Image:
      spool.seek(index * height * width * 3)
      return Image.frombytes("RGB", (width, height), spool.read(height * width * 3))

    palette = shared_palette([stored(i) for i in spread(count, PALETTE_FRAMES)])
    with av.open(str(partial), "w", format="gif") as container:
      stream = container.add_stream("gif", rate=fps)
      stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
      return encode(container, stream, (indexed(stored(i), palette) for i in range(count)))


def write_pngs(path: Path, frames: Iterator[np.ndarray], fps: Fraction, crf: int) -> int:
  """Numbered images; older frames of the same pattern in that folder are replaced."""
  del fps, crf
  folder, pattern = (path.parent, path.name) if path.suffix else (path, "%05d.png")
  _, frames = with_first(frames)
  with contextlib.ExitStack() as stack:
    fresh = not folder.exists()
    target = folder if fresh else folder / f".{pattern}.done"
    partial = stack.enter_context(replacing(target))
    partial.mkdir()
    count = 0
    for frame in frames:
      Image.fromarray(frame).save(partial / (pattern % count))
      count += 1
    if not fresh:
      replace_numbered(folder, pattern, partial)
  if not fresh:
    target.rmdir()
  return count


def replace_numbered(folder: Path, pattern: str, source: Path) -> None:
  """Moves the images of `source` into `folder` in place of older ones of the pattern."""
  before, after = (re.escape(part) for part in PNG_NUMBER.split(pattern, maxsplit=1))
  for old in folder.iterdir():
    if re.fullmatch(f"{before}\\d+{after}", old.name):
      old.unlink()
  for new in source.iterdir():
    new.rename(folder / new.name)


def resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
  """A frame `[H, W, 3]` at another size, antialiased bilinear."""
  if frame.shape[:2] == (height, width):
    return frame
  image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image)


def read_video(
  path: str | Path,
  *,
  fps: float | None = None,
  height: int | None = None,
  width: int | None = None,
  frames: int | None = None,
) -> np.ndarray:
  """Decodes a video, optionally at another rate and size.

  Frame i of the result is the source frame nearest to `i * source_fps / fps` (halves to even).

  Args:
    path: any container that FFmpeg reads.
    fps: frames a second of the result; None keeps the source's.
    height: pixels; None keeps the source's. Aspect ratio is not kept.
    width: pixels; None keeps the source's.
    frames: how many frames of the result to read; None reads all.

  Returns:
    uint8 `[T, H, W, 3]`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a readable video, or has fewer than `frames` frames.

  Source: training.md §10.1 step 2.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"video file '{path}' does not exist")
  if frames is not None:
    check_at_least("frames", frames, 1)
  kept: list[np.ndarray] = []
  try:
    with av.open(str(path)) as container:
      if not container.streams.video:
        raise ValueError(f"'{path}' holds no video")
      for frame in nearest_frames(container, fps):
        image = rgb(frame)
        kept.append(resized(image, height or image.shape[0], width or image.shape[1]))
        if len(kept) == frames:
          break
  except av.FFmpegError as error:
    raise ValueError(f"video '{path}' cannot be read: {error.strerror}") from error
  if not kept or (frames is not None and len(kept) < frames):
    raise ValueError(f"video '{path}' has {len(kept)} frames; {frames or 1} are needed")
  return np.stack(kept)


def rgb(frame: av.VideoFrame) -> np.ndarray:
  """The pixels of a decoded frame, `[H, W, 3]` uint8, by the matrix and range that it names."""
  return frame.reformat(format="rgb24", interpolation=PRECISE).to_ndarray()


def nearest_frames(container: Any, fps: float | None) -> Iterator[av.VideoFrame]:
  """Yields decoded frames, dropped or repeated to reach `fps`."""
  stream = container.streams.video[0]
  stream.thread_type = "AUTO"
  step = 1.0 if fps is None else float(stream.average_rate or fps) / fps
  count = 0
  for index, frame in enumerate(container.decode(stream)):
    while round(count * step) == index:
      yield frame
      count += 1
