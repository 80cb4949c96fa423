"""Binary messages of frames: what is packed comes back, and nothing else is taken."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile

from longlive_jax.serve.frames import Form, decode, encode_block, encode_frame, join, split, unpack
from tests.serve.fake import picture

FRAMES = picture(1, 1, "a")


def test_the_header_is_as_documented():
  (message,) = encode_block(FRAMES[:2], 5, 37, Form("jpeg", 85, 8))
  assert message[:4] == b"LLF1" and message[4] == 1 and message[5] == 1
  count, block, first = struct.unpack("<HII", message[6:16])
  assert (count, block, first) == (2, 5, 37)
  lengths = struct.unpack("<2I", message[16:24])
  assert len(message) == 24 + sum(lengths)
  assert message[24:27] == b"\xff\xd8\xff"  # a JPEG


def test_a_jpeg_is_encoded_without_the_lock_of_the_interpreter(monkeypatch: pytest.MonkeyPatch):
  given: list[int | None] = []
  real = ImageFile._encode_tile

  def encode(image, file, tile, size, descriptor, *error) -> None:
    given.append(descriptor)  # Pillow gives the lock away only if there is one
    real(image, file, tile, size, descriptor, *error)

  monkeypatch.setattr(ImageFile, "_encode_tile", encode)
  data = encode_frame(FRAMES[0], Form())
  assert len(given) == 1 and given[0] is not None
  file = io.BytesIO()
  Image.fromarray(FRAMES[0]).save(file, "JPEG", quality=85)
  assert file.getvalue() == data


def test_frames_are_encoded_where_memory_has_no_files(monkeypatch: pytest.MonkeyPatch):
  expected = encode_frame(FRAMES[0], Form())
  monkeypatch.delattr("os.memfd_create")
  assert encode_frame(FRAMES[0], Form()) == expected


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_a_block_in_messages_comes_back(size):
  messages = [unpack(m) for m in encode_block(FRAMES, 1, 5, Form("webp", 100, size))]
  assert [m.last for m in messages] == [False] * (len(messages) - 1) + [True]
  assert [m.first_frame for m in messages] == list(range(5, 5 + len(FRAMES), size))
  np.testing.assert_array_equal(np.concatenate([decode(m) for m in messages]), FRAMES)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_lower_quality_takes_fewer_bytes_and_stays_near(form):
  smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(1, 64, 64, 3).astype(np.uint8)
  (good,), (poor,) = (encode_block(smooth, 0, 0, Form(form, q)) for q in (90, 20))
  assert len(poor) < len(good)
  assert np.abs(decode(unpack(good)).astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("cut", [0, 3, 15, 17, 30, -1])
def test_a_message_that_is_cut_short(cut):
  (message,) = encode_block(FRAMES, 0, 0, Form())
  with pytest.raises(ValueError, match="message"):
    unpack(message[:cut])
  with pytest.raises(ValueError, match="begins with"):
    unpack(b"LLF2" + message[4:])
  with pytest.raises(ValueError, match="bytes, not"):
    unpack(message + b"x")


def test_messages_in_a_file():
  messages = list(encode_block(FRAMES, 0, 0, Form(frames_a_message=3)))
  data = join(messages)
  assert split(data) == messages and split(b"") == []
  for wrong in (data[:-1], data + b"x", b"\0\0\0\0"):
    with pytest.raises(ValueError, match=r"cut short|message"):
      split(wrong)


@pytest.mark.parametrize(
  ("form", "line"),
  [
    (("gif", 85, 8), "--frame_format='gif' must be one of"),
    (("jpeg", 0, 8), "--quality=0 must be"),
    (("jpeg", 85, 0), "--frames_a_message=0 must be"),
  ],
)
def test_forms_that_cannot_be(form, line):
  with pytest.raises(ValueError, match=line):
    Form(*form)
