"""The size and the colours of a GIF, which has 256 of them."""

from typing import Any

import av
import numpy as np
from PIL import Image

GIF_MAX_WIDTH = 640  # wider videos are scaled down: a GIF spends about a byte a pixel
PALETTE_FRAMES = 48  # frames the shared palette of a GIF is computed from


def gif_size(height: int, width: int) -> tuple[int, int]:
  """Height and width of the GIF of a video."""
  if width <= GIF_MAX_WIDTH:
    return height, width
  return max(1, round(height * GIF_MAX_WIDTH / width)), GIF_MAX_WIDTH


def spread(count: int, most: int) -> list[int]:
  """At most `most` indices spread evenly over `range(count)`."""
  return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def shared_palette(images: list[Image.Image]) -> Image.Image:
  """An image whose palette of 256 colours fits all `images` (of one size)."""
  width, height = images[0].size
  step = max(1, height * width * len(images) // 2**21)  # two million pixels are plenty
  pixels = np.stack([np.asarray(image) for image in images]).reshape(-1, 3)[::step]
  sheet = Image.fromarray(np.ascontiguousarray(pixels)[None])
  return sheet.quantize(256, method=Image.Quantize.MEDIANCUT)


def indexed(image: Image.Image, palette: Image.Image) -> av.VideoFrame:
  """The nearest colours of the palette, as a paletted frame."""
  chosen = image.quantize(palette=palette, dither=Image.Dither.NONE)
  colours = np.asarray(palette.getpalette("RGB"), np.uint8).reshape(-1, 3)
  table = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
  table[: len(colours), 1:] = colours
  pair: Any = np.asarray(chosen), table  # the form that pal8 takes, though it is not declared
  return av.VideoFrame.from_ndarray(pair, format="pal8")
