"""Frames as they go over the WebSocket: encoded images behind a small header.

A binary message, integers little-endian:

    offset  type      meaning
    0       4 bytes   "LLF1"
    4       uint8     1 = JPEG, 2 = WebP
    5       uint8     bit 0: the last message of its block
    6       uint16    number of frames n
    8       uint32    block
    12      uint32    index of the first frame in the video
    16      uint32    length in bytes of each frame, n times
    16+4n             the frames, one after the other
"""

import dataclasses
import functools
import io
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import Image

from longlive_jax.checks import check_choice

MAGIC = b"LLF1"
HEADER = struct.Struct("<4sBBHII")
FORMATS = {"jpeg": 1, "webp": 2}
LOSSLESS = 100  # quality of WebP that keeps every pixel
LAST = 1  # flag
MOST_FRAMES = 64  # of a message


@dataclasses.dataclass(frozen=True)
class Form:
  """How frames are encoded.

  Attributes:
    format: "jpeg" or "webp".
    quality: 1 to 100; WebP with 100 is lossless.
    frames_a_message: at most.
  """

  format: str = "jpeg"
  quality: int = 85
  frames_a_message: int = 8

  def __post_init__(self) -> None:
    check_choice("--frame_format", self.format, FORMATS)
    if not 1 <= self.quality <= 100:
      raise ValueError(f"--quality={self.quality} must be from 1 to 100")
    if not 1 <= self.frames_a_message <= MOST_FRAMES:
      raise ValueError(
        f"--frames_a_message={self.frames_a_message} must be from 1 to {MOST_FRAMES}"
      )


@dataclasses.dataclass(frozen=True)
class Packed:
  """What a binary message holds.

  Attributes:
    format: "jpeg" or "webp".
    last: whether the block ends with it.
    block: index.
    first_frame: index in the video.
    images: encoded frames.
  """

  format: str
  last: bool
  block: int
  first_frame: int
  images: tuple[bytes, ...]


def encode_frame(frame: np.ndarray, form: Form) -> bytes:
  """A frame uint8 `[H, W, 3]` as a JPEG or WebP file."""
  options = {}
  if form.format == "webp":  # method 0: six times as fast as the default, twice as large
    options = {"method": 0, "lossless": form.quality == LOSSLESS, "exact": True}
  with _memory() as file:
    Image.fromarray(frame).save(file, form.format.upper(), quality=form.quality, **options)
    file.seek(0)
    return file.read()


def _memory() -> IO[bytes]:
  """A file in memory, with a descriptor: without one, Pillow encodes JPEG under Python's lock.

  The model's thread would wait for it, and several threads would be no faster than one.
  """
  if hasattr(os, "memfd_create"):
    return os.fdopen(os.memfd_create("frame"), "w+b", buffering=0)
  return tempfile.TemporaryFile(buffering=0)


def encode_message(
  frames: np.ndarray, block: int, first_frame: int, form: Form, *, last: bool
) -> bytes:
  """One binary message of frames uint8 `[n, H, W, 3]`."""
  images = tuple(encode_frame(frame, form) for frame in frames)
  return pack(Packed(form.format, last, block, first_frame, images))


def messages_of(
  frames: np.ndarray, block: int, first_frame: int, form: Form
) -> list[Callable[[], bytes]]:
  """What makes the binary messages of a block, in order; each may run in a thread of its own.

  Args:
    frames: of the block, uint8 `[T, H, W, 3]`.
    block: index.
    first_frame: index in the video.
    form: how they are encoded.
  """
  step, makers = form.frames_a_message, []
  for start in range(0, len(frames), step):
    part, last = frames[start : start + step], start + step >= len(frames)
    makers.append(
      functools.partial(encode_message, part, block, first_frame + start, form, last=last)
    )
  return makers


def encode_block(frames: np.ndarray, block: int, first_frame: int, form: Form) -> tuple[bytes, ...]:
  """The binary messages of a block; see `messages_of`."""
  return tuple(make() for make in messages_of(frames, block, first_frame, form))


def pack(packed: Packed) -> bytes:
  """The message of these frames."""
  images = packed.images
  flags, kind = LAST * packed.last, FORMATS[packed.format]
  head = HEADER.pack(MAGIC, kind, flags, len(images), packed.block, packed.first_frame)
  lengths = struct.pack(f"<{len(images)}I", *map(len, images))
  return b"".join([head, lengths, *images])


def unpack(message: bytes) -> Packed:
  """Reads a message.

  Raises:
    ValueError: it is not one, or is cut short.
  """
  if len(message) < HEADER.size:
    raise ValueError(f"a message of frames has at least {HEADER.size} bytes, not {len(message)}")
  magic, kind, flags, count, block, first_frame = HEADER.unpack_from(message)
  names = {number: name for name, number in FORMATS.items()}
  if magic != MAGIC or kind not in names:
    raise ValueError(f"a message of frames begins with {MAGIC!r} and a known format")
  start = HEADER.size + 4 * count
  if len(message) < start:
    raise ValueError("the message of frames is cut short")
  lengths = struct.unpack_from(f"<{count}I", message, HEADER.size)
  if len(message) != start + sum(lengths):
    raise ValueError(f"the message has {len(message)} bytes, not {start + sum(lengths)}")
  images = []
  for length in lengths:
    images.append(message[start : start + length])
    start += length
  return Packed(names[kind], bool(flags & LAST), block, first_frame, tuple(images))


def decode(packed: Packed) -> np.ndarray:
  """The frames of a message, uint8 `[n, H, W, 3]`."""
  opened = [Image.open(io.BytesIO(image)) for image in packed.images]
  return np.stack([np.asarray(image.convert("RGB")) for image in opened])


def join(messages: Sequence[bytes]) -> bytes:
  """Messages as one file: each behind its length, uint32."""
  return b"".join(struct.pack("<I", len(m)) + m for m in messages)


def split(data: bytes) -> list[bytes]:
  """What `join` joined.

  Raises:
    ValueError: it is cut short, or holds something else.
  """
  messages, at = [], 0
  while at < len(data):
    if at + 4 > len(data):
      raise ValueError("the file of frames is cut short")
    (length,) = struct.unpack_from("<I", data, at)
    messages.append(data[at + 4 : at + 4 + length])
    at += 4 + length
    unpack(messages[-1])
  return messages
