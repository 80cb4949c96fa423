"""How alike two videos are."""

import numpy as np

MOST = 100.0  # dB, of equal videos, so that means stay finite


def psnr(video: np.ndarray, other: np.ndarray) -> float:
  """Peak signal-to-noise ratio of two uint8 videos `[T, H, W, 3]` in dB, at most 100.

  Raises:
    ValueError: they differ in shape.
  """
  if video.shape != other.shape:
    raise ValueError(f"the videos are {video.shape} and {other.shape}; they must be alike")
  squared = np.mean((video.astype(np.float32) - other.astype(np.float32)) ** 2)
  return MOST if squared == 0 else float(min(MOST, 10.0 * np.log10(255.0**2 / squared)))
