"""Frames a second that encoders make of a block, by format and threads, on this machine.

  python -m tests.serve.encoding --out=benchmarks/results/serve_encode_cpu.json

The pictures are smooth, with noise of a few levels, and move.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from longlive_jax.serve.frames import Form, messages_of
from tests.serve.record import write_record

FORMS = (Form("jpeg", 85), Form("webp", 85), Form("webp", 100))


def pictures(count: int, height: int, width: int) -> np.ndarray:
  """Frames uint8 `[count, height, width, 3]`."""
  rng, (y, x) = np.random.default_rng(0), np.mgrid[:height, :width]
  frames = np.empty((count, height, width, 3), np.uint8)
  for number, frame in enumerate(frames):
    for channel in range(3):
      waves = np.sin((x + 8 * number) / 97 + channel) * np.cos(y / 61 + channel)
      noise = rng.normal(0, 6, (height, width))
      frame[..., channel] = np.clip(127 + 100 * waves + noise, 0, 255)
  return frames


def rate(frames: np.ndarray, form: Form, threads: int, repeats: int) -> dict[str, object]:
  """The median of a few blocks."""
  seconds, size = [], 0
  with ThreadPoolExecutor(threads) as pool:
    for _ in range(repeats):
      began = time.perf_counter()
      works = [pool.submit(make) for make in messages_of(frames, 0, 0, form)]
      size = sum(len(work.result()) for work in works)
      seconds.append(time.perf_counter() - began)
  median = float(np.median(seconds))
  return {
    "format": form.format,
    "quality": form.quality,
    "threads": threads,
    "frames_a_second": round(len(frames) / median, 1),
    "block_seconds": round(median, 4),
    "bytes_a_frame": size // len(frames),
  }


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--height", type=int, default=704)
  parser.add_argument("--width", type=int, default=1280)
  parser.add_argument("--frames", type=int, default=32)
  parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--out", default="", help="file for the record")
  given = parser.parse_args()
  frames = pictures(given.frames, given.height, given.width)
  rates = [rate(frames, f, n, given.repeats) for f in FORMS for n in given.threads]
  for each in rates:
    print(*(f"{name}={value}" for name, value in each.items()))
  sizes = {"frames": given.frames, "height": given.height, "width": given.width}
  write_record(given.out, "tests.serve.encoding", sizes | {"rates": rates})


if __name__ == "__main__":
  main()
