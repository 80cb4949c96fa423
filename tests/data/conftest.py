"""Small data sets of real video files. Frame i of a clip can be read back from its pixels."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from longlive_jax.config import Data, Experiment, Model, Sample, Train, Video

BITS = 10  # of a frame number; drawn as white and black columns
X264 = {"g": "12", "bf": "3", "crf": "10"}


def picture(number: int, height: int, width: int) -> np.ndarray:
  """A frame whose columns spell its number, the lower half upside down in brightness."""
  bits = [(number >> i) & 1 for i in range(BITS)]
  columns = (np.asarray(bits, np.uint8) * 200 + 28)[np.arange(width) * BITS // width]
  image = np.repeat(np.broadcast_to(columns, (height, width))[..., None], 3, -1).copy()
  image[height // 2 :] = 255 - image[height // 2 :]
  return image


def read_number(image: np.ndarray) -> int:
  """The number that `picture` has drawn, whatever the size."""
  height, width = image.shape[:2]
  row = image[height // 4, :, 1].astype(int)
  lower = image[3 * height // 4, :, 1].astype(int)
  centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
  return int(sum(1 << i for i, c in enumerate(centres) if row[c] > lower[c]))


def write_file(
  path: Path,
  frames: int,
  fps: float | Fraction = 24,
  *,
  size: tuple[int, int] = (32, 40),
  codec: str = "libx264",
  options: dict[str, str] | None = None,
  times: list[int] | None = None,
  movflags: str = "",
) -> Path:
  """Writes a numbered clip; `times` are the frames' own time stamps, in frame lengths."""
  path.parent.mkdir(parents=True, exist_ok=True)
  flags = {"movflags": movflags} if movflags else {}
  with av.open(str(path), "w", options=flags) as container:
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
    stream.options = options if options is not None else X264 if codec == "libx264" else {}
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    for number in range(frames):
      frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
      frame.pts = times[number] if times else number
      frame.time_base = 1 / stream.codec_context.framerate
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def write_clip(root: Path, sample: str, stem: str, frames: int, fps: float = 24, **how) -> Path:
  """Writes a clip and its caption, `<sample> <stem>`."""
  suffix = how.pop("suffix", ".mp4")
  caption = root / "caption" / sample / f"{stem}.json"
  caption.parent.mkdir(parents=True, exist_ok=True)
  caption.write_text(json.dumps({"caption": f"{sample} {stem}"}))
  return write_file(root / "video" / sample / f"{stem}{suffix}", frames, fps, **how)


def small_experiment(path: Path, **data) -> Experiment:
  """Blocks of two latents of 32 x 32 pixels; two samples a batch."""
  values = {"source": "videos", "path": str(path), "blocks": 3, "readers": 2, "ahead": 1, **data}
  return Experiment(
    model=Model(block_latents=2),
    video=Video(height=32, width=32, fps=24),
    data=Data(**values),
    sample=Sample(cut_prefix="Cut. "),
    train=Train(batch=2),
  )


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
  """`write_clip`."""
  return write_clip


@pytest.fixture(scope="session")
def write_numbered() -> Callable[..., Path]:
  """`write_file`."""
  return write_file


@pytest.fixture(scope="session")
def number_of() -> Callable[[np.ndarray], int]:
  """`read_number`."""
  return read_number


@pytest.fixture(scope="session")
def experiment_of() -> Callable[..., Experiment]:
  """`small_experiment`."""
  return small_experiment


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Seven samples of one to three clips of many rates, sizes and containers. Not to be written."""
  root = tmp_path_factory.mktemp("videos")
  for number, fps in enumerate((24, 25, 30, 12, 24000 / 1001)):
    write_clip(root, f"s{number}", "0", 60, fps)
  write_clip(root, "two", "2", 30, size=(48, 32))
  write_clip(root, "two", "10", 40, 25, size=(32, 64), suffix=".mkv")
  write_clip(root, "vp9", "0", 50, codec="libvpx-vp9", suffix=".webm")
  return root
