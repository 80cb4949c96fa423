"""A video as one picture: rows of frames with a line of text over each row."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longlive_jax.io.atomic import replacing

MARGIN, LINE = 4, 20
INK, PAPER = (24, 24, 24), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Row:
  """Frames `[n, H, W, 3]` uint8 side by side, under a caption."""

  caption: str
  frames: np.ndarray


def spread_frames(frames: np.ndarray, count: int) -> np.ndarray:
  """`count` frames of `[T, H, W, 3]`, evenly spaced, the first and the last among them."""
  return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]


def contact_sheet(rows: Sequence[Row], scale: int = 1) -> np.ndarray:
  """Lays rows out below one another.

  Args:
    rows: at least one; all frames of one size.
    scale: whole number that the frames are enlarged by.

  Returns:
    uint8 `[H, W, 3]`.

  Raises:
    ValueError: no rows, or frames of several sizes.
  """
  sizes = {row.frames.shape[1:3] for row in rows}
  if len(sizes) != 1:
    raise ValueError(f"a contact sheet needs rows of frames of one size; found {sorted(sizes)}")
  height, width = (scale * side + MARGIN for side in sizes.pop())
  most = max(len(row.frames) for row in rows)
  size = (most * width + MARGIN, len(rows) * (height + LINE) + MARGIN)
  sheet = Image.new("RGB", size, PAPER)
  write = functools.partial(ImageDraw.Draw(sheet).text, font=ImageFont.load_default(13), fill=INK)
  for i, row in enumerate(rows):
    top = MARGIN + i * (height + LINE)
    write((MARGIN, top), row.caption)
    for j, frame in enumerate(row.frames):
      tile = Image.fromarray(np.repeat(np.repeat(frame, scale, 0), scale, 1))
      sheet.paste(tile, (MARGIN + j * width, top + LINE))
  return np.asarray(sheet)


def write_contact_sheet(path: str | Path, rows: Sequence[Row], scale: int = 1) -> None:
  """Writes `contact_sheet(rows, scale)` as PNG; the file appears whole or not at all."""
  image = Image.fromarray(contact_sheet(rows, scale))
  with replacing(path) as part, part.open("wb") as file:
    image.save(file, "PNG", optimize=True)
