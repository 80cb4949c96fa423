"""Still images, for image-to-video."""

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from longlive_jax.checks import check_choice

UNREADABLE = (  # what Pillow raises for files that are damaged, or of no use
  OSError,
  SyntaxError,
  ValueError,
  RuntimeError,
  TypeError,
  LookupError,
  ArithmeticError,
  EOFError,
  struct.error,
  Image.DecompressionBombError,
)


def read_image(path: str | Path, height: int, width: int, fit: str = "crop") -> np.ndarray:
  """Reads an image, upright and at the size of the video.

  Args:
    path: any format that Pillow reads, of at most 178,956,970 pixels (the limit at which Pillow
      refuses); its EXIF orientation is applied, and what is transparent becomes black.
    height: pixels.
    width: pixels.
    fit: "crop" scales until the frame is covered and cuts the rest away evenly; "resize"
      stretches to the exact size, as the original does.

  Returns:
    uint8 `[H, W, 3]`, antialiased.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a readable image, is too large, or `fit` is unknown.

  Source: inference.md §3.2.
  """
  check_choice("fit", fit, ("crop", "resize"))
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"image file '{path}' does not exist")
  try:
    with warnings.catch_warnings():  # of half the limit on, and of files that it reads in part
      warnings.simplefilter("ignore")
      with Image.open(path) as opened:
        return fitted(opened, height, width, fit)
  except UNREADABLE as error:
    said = str(error) or type(error).__name__
    reason = said.split("\n")[0].replace(str(path), "the file")
    raise ValueError(f"image '{path}' cannot be read: {reason}") from error


def fitted(opened: Image.Image, height: int, width: int, fit: str = "crop") -> np.ndarray:
  """The pixels of an image that was opened, uint8 `[H, W, 3]`; see `read_image`."""
  image, method = on_black(ImageOps.exif_transpose(opened)), Image.Resampling.BILINEAR
  if image.size != (width, height):
    if fit == "crop":
      image = ImageOps.fit(image, (width, height), method)
    else:
      image = image.resize((width, height), method)
  return np.asarray(image)


def on_black(image: Image.Image) -> Image.Image:
  """An image as RGB, over black where it is transparent."""
  if image.mode.startswith("I;16"):  # 16 bits of grey, which `convert` would clip
    grey, transparent = np.asarray(image), image.info.get("transparency")
    grey = grey if transparent is None else np.where(grey == transparent, 0, grey)
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
  if image.mode in ("I", "F"):
    raise ValueError(f"its mode is {image.mode}: 32 bits a number; save it with 8 or 16")
  if not image.has_transparency_data:
    return image.convert("RGB")
  picture = image.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
