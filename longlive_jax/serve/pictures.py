"""First frames that clients send: PNG, JPEG or WebP, read without trust."""

import base64
import binascii
import io
import re

import numpy as np
from PIL import Image

from longlive_jax.io.image import UNREADABLE, fitted

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 50_000_000
DATA_URL = re.compile(r"data:image/(?:png|jpeg|webp);base64,")


def from_base64(text: str) -> bytes:
  """The bytes of an image in base64, alone or as a data URL.

  Raises:
    ValueError: it is not base64.
  """
  match = DATA_URL.match(text[:64])
  try:
    return base64.b64decode(text[match.end() if match else 0 :], validate=True)
  except (binascii.Error, ValueError) as error:
    raise ValueError("the image is not base64, nor a data URL of a PNG, JPEG or WebP") from error


def read_picture(data: bytes, height: int, width: int) -> np.ndarray:
  """Decodes an image, upright, and fits it to the size of the video.

  Its EXIF orientation is applied; transparent parts become black; it is scaled until the frame is
  covered and the rest is cut away evenly. Of an animation, the first picture is taken.

  Args:
    data: a PNG, JPEG or WebP file.
    height: pixels.
    width: pixels.

  Returns:
    uint8 `[H, W, 3]`.

  Raises:
    ValueError: another format, damaged, or more than `MOST_PIXELS` pixels.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
      if opened.width * opened.height > MOST_PIXELS:
        size = f"{opened.width}x{opened.height}"
        raise ValueError(f"{size} pixels are more than {MOST_PIXELS // 1_000_000} million")
      return fitted(opened, height, width)
  except (*UNREADABLE, Image.DecompressionBombWarning) as error:
    reason = str(error).split("\n")[0]
    if isinstance(error, Image.UnidentifiedImageError):
      reason = "it is neither PNG, JPEG nor WebP"
    raise ValueError(f"the image cannot be read: {reason}") from error
