"""Contact sheets: every tile is where it belongs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longlive_jax.io.contact_sheet import (
  LINE,
  MARGIN,
  Row,
  contact_sheet,
  spread_frames,
  write_contact_sheet,
)

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 6, 10, 3), np.uint8)


def test_frames_are_spread_from_the_first_to_the_last():
  np.testing.assert_array_equal(spread_frames(FRAMES, 3), FRAMES[[0, 2, 4]])
  np.testing.assert_array_equal(spread_frames(FRAMES[:2], 3), FRAMES[:2])


def test_tiles_are_the_frames_enlarged():
  sheet = contact_sheet([Row("first", FRAMES[:2]), Row("second", FRAMES[2:])], scale=2)
  top, left = MARGIN + 12 + MARGIN + 2 * LINE, MARGIN + 2 * (20 + MARGIN)
  tile = sheet[top : top + 12, left : left + 20]
  np.testing.assert_array_equal(tile[::2, ::2], FRAMES[4])
  np.testing.assert_array_equal(tile[1::2, 1::2], FRAMES[4])
  assert (sheet[MARGIN + LINE : MARGIN + LINE + 12, left:] == 255).all(), "row one has two tiles"
  assert sheet[MARGIN : MARGIN + LINE].min() < 128, "no caption"


def test_the_file_holds_the_sheet(tmp_path: Path):
  write_contact_sheet(tmp_path / "sheet.png", [Row("a", FRAMES)])
  expected = contact_sheet([Row("a", FRAMES)])
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), expected)
  assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_frames_of_several_sizes_are_refused():
  with pytest.raises(ValueError, match="one size"):
    contact_sheet([Row("a", FRAMES), Row("b", FRAMES[:, :4])])
  with pytest.raises(ValueError, match="one size"):
    contact_sheet([])
