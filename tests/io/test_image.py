"""Images that are damaged, too large, or of a rare kind."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from longlive_jax.io.image import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


def encoded(kind: str) -> bytes:
  """An image file with an orientation and a description in its EXIF."""
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "a description"
  file = io.BytesIO()
  Image.fromarray(PIXELS).save(file, kind, exif=exif)
  return file.getvalue()


def check_one_line(path: Path) -> bool:
  """Reads an image; whether it was refused, as it must be if it cannot be read."""
  try:
    read_image(path, 32, 48)
  except ValueError as error:
    start, _, reason = str(error).partition(" cannot be read: ")
    assert start == f"image '{path}'" and reason and "\n" not in str(error)
    return True
  return False


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "TIFF", "PNG", "WEBP"])
def test_an_image_with_a_changed_byte_is_read_or_refused_by_one_line(tmp_path: Path, kind: str):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  whole, path = encoded(kind), tmp_path / "image"
  refused = 0
  for at in range(12, min(len(whole), 300)):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    refused += check_one_line(path)
  assert refused


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("a\nb"),
    TypeError("a"),
    struct.error("a"),
    KeyError("a"),
    EOFError(),
    IndexError(),
  ],
)
@pytest.mark.parametrize("where", ["PIL.ImageOps.exif_transpose", "PIL.Image.Image.load"])
def test_whatever_pillow_says_is_one_line(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
):
  def fail(*args: object, **options: object) -> None:
    raise error

  path = tmp_path / "image.png"
  Image.fromarray(PIXELS).save(path)
  monkeypatch.setattr(where, fail)
  assert check_one_line(path)


def png_of_grey(rows: np.ndarray, transparent: int) -> bytes:
  """A PNG with 16 bits of grey, one value of which is transparent."""

  def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  height, width = rows.shape
  head = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
  data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
  parts = (b"IHDR", head), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", zlib.compress(data))
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*parts, (b"IEND", b"")))


def test_a_transparent_value_of_16_bits_is_black(tmp_path: Path):
  rows = np.full((32, 48), 40_001, np.uint16)  # the same 8 bits, and not transparent
  rows[:, 24:] = 40_000
  (tmp_path / "image.png").write_bytes(png_of_grey(rows, 40_000))
  found = read_image(tmp_path / "image.png", 32, 48)
  assert (found[:, :24] == 40_001 >> 8).all() and (found[:, 24:] == 0).all()


def test_a_large_image_is_read_without_a_word_and_a_larger_one_is_refused(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  """By the one limit of Pillow, which is twice the number from which on it warns."""
  assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == 178_956_970
  path = tmp_path / "image.png"
  Image.fromarray(PIXELS).save(path)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS.size // 3 - 1)
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    np.testing.assert_array_equal(read_image(path, 32, 48), PIXELS)
  assert not said
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS.size // 6 - 1)
  with pytest.raises(ValueError, match=r"cannot be read: .*1536 pixels\) exceeds limit of 1534"):
    read_image(path, 32, 48)
