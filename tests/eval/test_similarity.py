import numpy as np
import pytest

from longlive_jax.eval.similarity import psnr

VIDEO = np.zeros((2, 4, 4, 3), np.uint8)


def test_psnr():
  assert psnr(VIDEO, VIDEO) == 100.0
  assert psnr(VIDEO, VIDEO + 255) == pytest.approx(0.0)
  assert psnr(VIDEO, VIDEO + 51) == pytest.approx(20 * np.log10(5), rel=1e-5)


def test_videos_of_other_lengths_are_not_compared():
  with pytest.raises(ValueError, match="must be alike"):
    psnr(VIDEO, VIDEO[:1])
