"""Images that clients send: upright, on black, cut to size; what is no image is refused."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from longlive_jax.serve.pictures import MOST_PIXELS, from_base64, read_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def file_of(image: Image.Image, form: str = "PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def two_halves(width: int, height: int) -> Image.Image:
  """Red on the left, blue on the right."""
  pixels = np.empty((height, width, 3), np.uint8)
  pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
  return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_format(form):
  frame = read_picture(file_of(two_halves(64, 32), form), 16, 32)
  assert frame.shape == (16, 32, 3) and frame.dtype == np.uint8
  assert np.abs(frame[8, 4].astype(int) - RED).max() < 40
  assert np.abs(frame[8, 28].astype(int) - BLUE).max() < 40


def test_the_middle_is_kept():
  pixels = np.zeros((10, 40, 3), np.uint8)
  pixels[:, 10:30] = RED
  frame = read_picture(file_of(Image.fromarray(pixels)), 10, 20)
  np.testing.assert_array_equal(frame, np.broadcast_to(RED, (10, 20, 3)))


def test_the_camera_may_have_been_held_sideways():
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter, clockwise
  frame = read_picture(file_of(two_halves(32, 32), "PNG", exif=exif), 32, 32)
  assert tuple(frame[2, 16]) == RED and tuple(frame[29, 16]) == BLUE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_black(mode):
  pixels = np.full((8, 8, 4), 255, np.uint8)
  pixels[:, 4:, 3] = 0
  image = Image.fromarray(pixels)
  options = {}
  if mode == "P":
    image, options = image.convert("RGB").quantize(2), {"transparency": 0}
    image.putdata([1] * 32 + [0] * 32)
    image.putpalette([9, 9, 9, 255, 255, 255])
    image = image.transpose(Image.Transpose.TRANSPOSE)
  frame = read_picture(file_of(image.convert(mode), **options), 8, 8)
  assert tuple(frame[4, 1]) == (255, 255, 255) and tuple(frame[4, 6]) == (0, 0, 0)


def test_sixteen_bits_and_grey():
  grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
  assert read_picture(file_of(grey), 8, 8)[0, 0].tolist() == [128, 128, 128]
  assert read_picture(file_of(Image.new("1", (8, 8), 1)), 8, 8)[0, 0].tolist() == [255] * 3
  cmyk = Image.new("CMYK", (8, 8))
  assert read_picture(file_of(cmyk, "JPEG"), 8, 8)[0, 0].min() > 240


def bomb(side: int) -> bytes:
  """The beginning of a PNG that would have side x side pixels."""
  body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  head = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
  data = zlib.compress(b"\0" * 100)
  idat = (
    struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
  )
  return b"\x89PNG\r\n\x1a\n" + head + idat


WRONG = {
  "nothing": (b"", "neither PNG, JPEG nor WebP"),
  "text": (b"hello", "neither PNG, JPEG nor WebP"),
  "gif": (file_of(Image.new("RGB", (8, 8)), "GIF"), "neither PNG, JPEG nor WebP"),
  "half": (file_of(two_halves(64, 64))[:100], "cannot be read"),
  "half a jpeg": (file_of(two_halves(64, 64), "JPEG")[:300], "cannot be read"),
  "large": (bomb(7100), f"more than {MOST_PIXELS // 1_000_000} million"),
  "huge": (bomb(60_000), "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image(name):
  data, line = WRONG[name]
  with pytest.raises(ValueError, match=line) as refused:
    read_picture(data, 16, 32)
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_base64():
  data = b"\x89PNG..."
  text = base64.b64encode(data).decode()
  assert from_base64(text) == from_base64(f"data:image/webp;base64,{text}") == data
  for wrong in ("data:text/html;base64,AAAA", "a", "é", "AAAA AAAA", "data:image/png;base64,!"):
    with pytest.raises(ValueError, match="not base64"):
      from_base64(wrong)
