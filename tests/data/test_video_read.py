"""Reading the frames of a plan: exactly those, wherever the decoder has to begin."""

from fractions import Fraction

import numpy as np
import pytest

from longlive_jax.data import video_read
from longlive_jax.data.video_index import Clip, Folder, read_index
from longlive_jax.data.video_plan import Plan, Rules, plan_from, starts
from longlive_jax.data.video_probe import probe
from longlive_jax.data.video_read import read_clip, read_frames
from longlive_jax.io.video import read_video, rgb, write_video

OPEN_GOP = {"g": "12", "bf": "3", "crf": "10", "x264-params": "open-gop=1:b-pyramid=normal"}
KINDS = {
  "b-frames": (".mp4", "libx264", {"g": "12", "bf": "3", "crf": "10"}),
  "open-gop": (".mp4", "libx264", OPEN_GOP),
  "one-keyframe": (".mp4", "libx264", {"g": "500", "crf": "10"}),
  "mkv": (".mkv", "libx264", {"g": "12", "bf": "3", "crf": "10"}),
  "mov": (".mov", "libx264", {"g": "7", "bf": "2", "crf": "10"}),
  "avi": (".avi", "libx264", {"g": "12", "bf": "3", "crf": "10"}),
  "fragments": (".mp4", "libx264", {"g": "12", "bf": "3", "crf": "10"}),
  "mpeg4": (".mp4", "mpeg4", {"g": "12", "bf": "2"}),
  "webm": (".webm", "libvpx-vp9", {"g": "12"}),
}


def clip_of(path) -> Clip:
  values = probe(path)
  return Clip(path.name, "a", **(values | {"fps": Fraction(*values["fps"])}))


def plan_of(clip: Clip, root, numbers) -> Plan:
  numbers = np.asarray(numbers)
  files = np.zeros(len(numbers), np.int32)
  return Plan(str(root), "s", (clip,), files, numbers, ("a",), np.zeros(1, np.int32), 8)


@pytest.fixture(scope="module", params=KINDS)
def numbered(request, tmp_path_factory, write_numbered):
  """A file of 90 frames, and all of them decoded from the beginning."""
  suffix, codec, options = KINDS[request.param]
  path = tmp_path_factory.mktemp("read") / f"clip{suffix}"
  movflags = "frag_keyframe+empty_moov" if request.param == "fragments" else ""
  write_numbered(path, 90, 25, codec=codec, options=options, movflags=movflags)
  return path, read_video(path)


def test_a_seek_gives_what_decoding_from_the_beginning_gives(numbered, number_of):
  path, whole = numbered
  clip = clip_of(path)
  assert clip.frames == len(whole) == 90
  assert [number_of(image) for image in whole] == list(range(90))
  for first in range(90):
    wanted = [n for n in (first, first + 1, first + 5) if n < 90]
    found = dict(read_clip(path.parent, clip, wanted))
    assert list(found) == list(range(len(wanted)))
    for at, frame in found.items():
      np.testing.assert_array_equal(rgb(frame), whole[wanted[at]])


def test_windows_make_up_the_sample(videos, number_of):
  """Of files of five rates, four containers and three sizes."""
  rules = Rules(3, 2, 24, 2, 3, "")
  for folder in read_index(videos).folders:
    for start in starts(folder, rules)[::7]:
      plan = plan_from(folder, rules, start)
      whole = read_frames(plan, 0, rules.frames, 32, 40, "stretch")
      assert whole.shape == (21, 32, 40, 3) and whole.dtype == np.uint8
      assert [number_of(image) for image in whole] == plan.frames.tolist()
      for left, right in ((0, 9), (5, 12), (12, 21), (20, 21)):
        np.testing.assert_array_equal(
          read_frames(plan, left, right, 32, 40, "stretch"), whole[left:right]
        )


def test_most_of_a_file_is_not_decoded(tmp_path, write_numbered, monkeypatch):
  path = write_numbered(tmp_path / "a.mp4", 400, 24)
  counts = []
  original = video_read.positions

  def count(*args):
    counts.append(0)
    for pair in original(*args):
      counts[-1] += 1
      yield pair

  monkeypatch.setattr(video_read, "positions", count)
  read_frames(plan_of(clip_of(path), tmp_path, [350, 351]), 0, 2, 32, 40)
  assert sum(counts) < 70


def test_frames_without_an_even_rate_are_taken_by_time(tmp_path, write_numbered, number_of):
  """What is shown 1.5 s after the start is that, however many frames came before."""
  times = [*range(20), *range(40, 60), *range(61, 101, 2)]  # a gap, then half the rate
  path = write_numbered(tmp_path / "a.mp4", 60, 24, times=times)
  clip = clip_of(path)
  numbers = range(clip.frames)
  fps = float(clip.fps)
  shown = [max(i for i, t in enumerate(times) if t / 24 * fps <= n + 0.5) for n in numbers]
  plan = plan_of(clip, tmp_path, numbers)
  whole = read_frames(plan, 0, clip.frames, 32, 40)
  assert [number_of(image) for image in whole] == shown and shown[-1] == 59
  for left in range(clip.frames):
    np.testing.assert_array_equal(read_frames(plan, left, left + 1, 32, 40)[0], whole[left])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_file_that_starts_late_counts_from_its_first_frame(
  tmp_path, write_numbered, number_of, suffix
):
  path = write_numbered(tmp_path / f"a{suffix}", 60, 24, times=list(range(30, 90)))
  clip = clip_of(path)
  assert clip.frames == 60 and clip.start > 0
  for first in (0, 1, 25, 59):
    plan = plan_of(clip, tmp_path, [first])
    assert number_of(read_frames(plan, 0, 1, 32, 40)[0]) == first


def test_pictures_of_another_shape_are_cropped_or_stretched(tmp_path):
  image = np.full((32, 96, 3), 20, np.uint8)
  image[:, 32:64] = 230  # the middle square
  write_video(tmp_path / "a.mp4", [np.stack([image] * 3)], 24, crf=0)
  plan = plan_of(clip_of(tmp_path / "a.mp4"), tmp_path, [0, 1])
  crop = read_frames(plan, 0, 2, 16, 16, "crop")
  assert crop.shape == (2, 16, 16, 3) and crop[:, :, 1:-1].min() > 200
  stretch = read_frames(plan, 0, 2, 16, 16, "stretch")
  assert stretch[:, :, :3].max() < 60 and stretch[:, :, 7:9].min() > 200
  with pytest.raises(ValueError, match=r"data\.fit='fill'"):
    read_frames(plan, 0, 2, 16, 16, "fill")


def test_colours_and_edges_survive_scaling(tmp_path):
  """The scaler's default was darker than the picture, by a level or two."""
  y, x = np.mgrid[:216, :384]
  waves = [127 + 90 * np.sin(x / 30 + y / 40), 127 + 90 * np.sin(x / 25), 127 + 90 * np.cos(y / 20)]
  image = np.stack(waves, -1).astype(np.uint8)
  write_video(tmp_path / "a.mp4", [image[None]], 24, crf=0)
  plan = plan_of(clip_of(tmp_path / "a.mp4"), tmp_path, [0])
  found = read_frames(plan, 0, 1, 108, 192)[0].astype(float)
  expected = image.reshape(108, 2, 192, 2, 3).mean((1, 3))
  assert np.abs(found - expected).mean() < 1.0
  assert np.abs((found - expected).mean((0, 1))).max() < 0.6


@pytest.mark.parametrize("size", [(48, 48), (32, 96), (40, 56), (96, 32)])
def test_any_shape_fits_any_other(tmp_path, write_numbered, size):
  for source in ((32, 40), (64, 32), (50, 50)):
    path = write_numbered(tmp_path / f"{source[0]}.mp4", 2, size=source)
    plan = plan_of(clip_of(path), tmp_path, [0, 1])
    for fit in ("crop", "stretch"):
      assert read_frames(plan, 0, 2, *size, fit).shape == (2, *size, 3)


def test_a_video_on_its_side_is_turned(tmp_path):
  """Telephones store videos with a matrix that turns them."""
  image = np.full((32, 64, 3), 20, np.uint8)
  image[:, :32] = 230  # the left half
  path = tmp_path / "a.mp4"
  write_video(path, [np.stack([image] * 3)], 24, crf=0)
  content = path.read_bytes()
  plain = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
  turned = b"".join(
    v.to_bytes(4, "big", signed=True)
    for v in (0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
  )
  track = content.index(b"tkhd")
  at = content.index(plain, track)
  path.write_bytes(content[:at] + turned + content[at + 36 :])
  clip = clip_of(path)
  assert (clip.height, clip.width) == (64, 32)
  pixels = read_frames(plan_of(clip, tmp_path, [0]), 0, 1, 64, 32)[0]  # 90 degrees clockwise
  assert pixels[:30].min() > 200 and pixels[34:].max() < 60


def test_broken_files_are_named(tmp_path, write_numbered):
  path = write_numbered(tmp_path / "a.mp4", 200, 24, movflags="+faststart")
  clip = clip_of(path)
  plan = plan_of(clip, tmp_path, [150, 151])
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) - 3000])
  with pytest.raises(ValueError, match=r"video '.*a\.mp4' "):
    read_frames(plan, 0, 2, 32, 40)
  path.write_bytes(b"nothing")
  with pytest.raises(ValueError, match=r"video '.*a\.mp4' cannot be read: Invalid data"):
    read_frames(plan, 0, 2, 32, 40)
  path.unlink()
  with pytest.raises(ValueError, match=r"video '.*a\.mp4' cannot be read: No such file"):
    read_frames(plan, 0, 2, 32, 40)
  write_numbered(path, 100, 24)
  with pytest.raises(ValueError, match=r"a\.mp4' ends at frame 99, and frame 150 is needed"):
    read_frames(plan, 0, 2, 32, 40)
  with pytest.raises(ValueError, match="frames 0..3 are not part of a sample of 2"):
    read_frames(plan, 0, 3, 32, 40)


def test_a_clip_of_one_frame(tmp_path, write_numbered):
  clip = clip_of(write_numbered(tmp_path / "a.mp4", 1, 24))
  assert clip.frames == 1
  rules = Rules(1, 1, 24, 0, 1, "")
  plan = plan_from(folder := Folder(str(tmp_path), "s", (clip,)), rules, starts(folder, rules)[0])
  assert read_frames(plan, 0, 1, 32, 32).shape == (1, 32, 32, 3)
