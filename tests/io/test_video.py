"""Videos and images, written and read."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longlive_jax.io.atomic import replacing
from longlive_jax.io.image import read_image
from longlive_jax.io.palette import spread
from longlive_jax.io.video import read_video, write_video


def clip(frames: int = 12, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
  """A square that moves over a coloured background; smooth enough for 4:2:0."""
  video = np.empty((frames, height, width, 3), np.uint8)
  video[:] = [[250, 30, 20], [20, 60, 230], [30, 200, 60]][seed % 3]
  for i in range(frames):
    video[i, 8:24, 2 * (i % 12) : 2 * (i % 12) + 16] = [240, 220, 30]
  return video


def groups(video: np.ndarray, size: int = 5):
  for start in range(0, len(video), size):
    yield video[start : start + size]


def test_mp4_round_trip(tmp_path):
  video = clip()
  assert write_video(tmp_path / "new" / "a.mp4", groups(video), 24) == len(video)
  back = read_video(tmp_path / "new" / "a.mp4")
  assert back.shape == video.shape
  assert np.abs(back.astype(int) - video).mean() < 6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mp4_keeps_colours(tmp_path, seed):
  """Without loss, because the encoder's own loss depends on its number of threads."""
  video = clip(seed=seed)
  write_video(tmp_path / "a.mp4", groups(video), 24, crf=0)
  inside = np.s_[:, 28:30, 2:46]  # away from edges, which 4:2:0 blurs
  back = read_video(tmp_path / "a.mp4")[inside]
  assert np.abs(back.astype(int) - video[inside]).max() <= 1


def test_mp4_is_what_players_expect(tmp_path):
  write_video(tmp_path / "a.mp4", [clip()], 24)
  with av.open(str(tmp_path / "a.mp4")) as container:
    stream = container.streams.video[0]
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == 24
    assert stream.frames == 12
    assert float(stream.duration * stream.time_base) == pytest.approx(0.5)
    assert stream.codec_context.colorspace == 1  # BT.709
  data = (tmp_path / "a.mp4").read_bytes()
  assert data.index(b"moov") < data.index(b"mdat")  # the index comes first


def test_crf_trades_size_for_quality(tmp_path):
  noise = np.random.default_rng(0).integers(0, 255, (8, 32, 48, 3), np.uint8)
  write_video(tmp_path / "fine.mp4", [noise], 24, crf=5)
  write_video(tmp_path / "coarse.mp4", [noise], 24, crf=40)
  assert os.path.getsize(tmp_path / "coarse.mp4") < os.path.getsize(tmp_path / "fine.mp4") / 2


def test_gif_has_one_palette_and_the_right_duration(tmp_path):
  video = np.concatenate([clip(seed=0), clip(seed=1), clip(seed=2)])
  assert write_video(tmp_path / "a.gif", groups(video), 24) == 36
  np.testing.assert_array_equal(read_video(tmp_path / "a.gif"), video)  # few colours: lossless
  with Image.open(tmp_path / "a.gif") as image:
    assert (image.n_frames, image.info["loop"], image.size) == (36, 0, (48, 32))
    durations = []
    for i in range(image.n_frames):
      image.seek(i)
      durations.append(image.info["duration"])
  assert sum(durations) == pytest.approx(36 / 24 * 1000, abs=20)


def test_wide_gifs_are_scaled_down(tmp_path):
  write_video(tmp_path / "a.gif", [np.zeros((2, 32, 1280, 3), np.uint8)], 24)
  assert read_video(tmp_path / "a.gif").shape == (2, 16, 640, 3)


def test_odd_sizes_are_fine_outside_mp4(tmp_path):
  video = clip(3, 31, 47)
  write_video(tmp_path / "a.gif", [video], 24)
  assert read_video(tmp_path / "a.gif").shape == video.shape
  write_video(tmp_path / "frames", [video], 24)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "frames" / "00002.png")), video[2])


@pytest.mark.parametrize(("path", "names"), [("out", "%05d.png"), ("out/f_%03d.png", "f_%03d.png")])
def test_png_frames(tmp_path, path, names):
  video = clip(4)
  for count in (4, 2):  # a shorter video leaves no frame of the longer one
    assert write_video(tmp_path / path, groups(video[:count]), 24) == count
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == [names % i for i in range(count)]
  with Image.open(tmp_path / "out" / (names % 1)) as image:
    np.testing.assert_array_equal(np.asarray(image), video[1])


def test_png_frames_leave_other_files_alone(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  write_video(tmp_path / "f_%d.png", [clip(2)], 24)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["f_0.png", "f_1.png", "notes.txt"]


OUTPUTS = ("a.mp4", "a.gif", "frames", "f_%d.png")


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_video_leaves_nothing(tmp_path, name, error):
  def interrupted():
    yield clip()
    raise error("stop")

  with pytest.raises(error):
    write_video(tmp_path / name, interrupted(), 24)
  assert list(tmp_path.iterdir()) == []


def test_an_interrupted_video_keeps_the_old_one(tmp_path):
  write_video(tmp_path / "a.mp4", [clip()], 24)
  before = (tmp_path / "a.mp4").read_bytes()
  with pytest.raises(ValueError, match="changed from 48x32 to 64x32"):
    write_video(tmp_path / "a.mp4", [clip(), clip(width=64)], 24)
  assert (tmp_path / "a.mp4").read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
  ("name", "frames", "line"),
  [
    ("a.avi", [clip()], "the suffix must be .mp4, .gif, .png or a folder"),
    ("a.png", [clip()], r"put a number into the name \('a_%05d.png'\)"),
    ("a.mp4", [clip(height=31)], r"needs an even height and width, not 48x31"),
    ("a.mp4", [], "at least one frame"),
    ("a.gif", [], "at least one frame"),
    ("frames", [], "at least one frame"),
    ("a.mp4", [clip().astype(np.float32)], r"must be uint8 \[T, H, W, 3\]; got float32"),
    ("a.mp4", [clip()[0]], r"must be uint8 \[T, H, W, 3\]; got uint8 \[32, 48, 3\]"),
  ],
)
def test_wrong_videos_give_one_line_and_no_file(tmp_path, name, frames, line):
  with pytest.raises(ValueError, match=line) as caught:
    write_video(tmp_path / name, frames, 24)
  assert "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_work_is_refused_before_any_frame(tmp_path):
  def never():
    pytest.fail("a frame was made")
    yield

  (tmp_path / "a.mp4").mkdir()
  (tmp_path / "file").write_text("")
  for name in ("a.mp4", "file", "a.mov"):
    with pytest.raises(ValueError, match="cannot write"):
      write_video(tmp_path / name, never(), 24)
  with pytest.raises(ValueError, match="fps"):
    write_video(tmp_path / "b.mp4", never(), 0)
  with pytest.raises(ValueError, match="crf"):
    write_video(tmp_path / "b.mp4", never(), 24, crf=60)


MEMORY = """
import resource, sys
import numpy as np
from longlive_jax.io.video import write_video
frame = np.random.default_rng(0).integers(0, 255, (8, 128, 128, 3), np.uint8)
write_video(sys.argv[1], (frame for _ in range(int(sys.argv[2]))), 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_memory_does_not_grow_with_the_length(tmp_path, name, root):
  def peak(count: int) -> int:
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name), str(count)]
    return int(subprocess.run(command, capture_output=True, check=True, cwd=root).stdout)

  short, long = peak(12), peak(96)  # 672 more frames would be 33 MB
  assert long - short < 12, (short, long)


def test_resampling_takes_the_nearest_source_frame(tmp_path):
  video = np.zeros((40, 16, 16, 3), np.uint8)
  video += (np.arange(40, dtype=np.uint8) * 6)[:, None, None, None]
  write_video(tmp_path / "a.mp4", [video], 30, crf=0)
  back = read_video(tmp_path / "a.mp4", fps=24)
  indices = np.rint(back[:, 8, 8].mean(-1) / 6).astype(int)
  expected = [round(i * 30 / 24) for i in range(40)]
  expected = [i for i in expected if i < 40]
  assert indices.tolist() == expected  # 0, 1, 2, 4, 5, 6, 8, ...
  assert expected[:8] == [0, 1, 2, 4, 5, 6, 8, 9]
  faster = read_video(tmp_path / "a.mp4", fps=60, frames=7)
  assert np.rint(faster[:, 8, 8].mean(-1) / 6).tolist() == [0, 0, 1, 2, 2, 2, 3]


def test_reading_at_another_size(tmp_path):
  write_video(tmp_path / "a.mp4", [clip()], 24)
  assert read_video(tmp_path / "a.mp4", height=16, width=64, frames=5).shape == (5, 16, 64, 3)


def test_wrong_files_to_read(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"video file '.*none.mp4' does not exist"):
    read_video(tmp_path / "none.mp4")
  (tmp_path / "text.mp4").write_text("not a video")
  with pytest.raises(ValueError, match=r"video '.*text.mp4' cannot be read") as caught:
    read_video(tmp_path / "text.mp4")
  assert "\n" not in str(caught.value)
  write_video(tmp_path / "a.mp4", [clip(4)], 24)
  with pytest.raises(ValueError, match="has 4 frames; 9 are needed"):
    read_video(tmp_path / "a.mp4", frames=9)


def test_spread():
  assert spread(3, 48) == [0, 1, 2]
  assert spread(1, 48) == [0]
  assert len(spread(1000, 48)) == 48


def image_with(tmp_path: Path, pixels: np.ndarray, orientation: int | None = None) -> Path:
  image = Image.fromarray(pixels)
  exif = image.getexif()
  if orientation:
    exif[0x0112] = orientation
  image.save(tmp_path / "image.png", exif=exif)
  return tmp_path / "image.png"


def test_an_image_of_the_right_size_is_unchanged(tmp_path):
  pixels = clip(1)[0]
  np.testing.assert_array_equal(read_image(image_with(tmp_path, pixels), 32, 48), pixels)


def test_exif_orientation_is_applied(tmp_path):
  pixels = clip(1)[0]
  upright = read_image(image_with(tmp_path, pixels, orientation=6), 48, 32)
  np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


def test_fit(tmp_path):
  pixels = np.zeros((32, 96, 3), np.uint8)
  pixels[:, :32, 0] = pixels[:, 32:64, 1] = pixels[:, 64:, 2] = 200
  path = image_with(tmp_path, pixels)
  middle = read_image(path, 32, 32)
  assert middle.shape == (32, 32, 3)
  np.testing.assert_array_equal(middle, pixels[:, 32:64])
  squeezed = read_image(path, 32, 48, fit="resize")
  np.testing.assert_array_equal(squeezed[16, [4, 24, 44]].argmax(-1), [0, 1, 2])
  with pytest.raises(ValueError, match="fit='stretch' must be one of crop, resize"):
    read_image(path, 32, 32, fit="stretch")


def test_reduction_is_antialiased(tmp_path):
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  small = read_image(image_with(tmp_path, stripes), 16, 16)
  assert np.abs(small[4:-4, 4:-4].astype(int) - 127).max() < 20


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
  Image.fromarray(clip(1)[0]).convert(mode).save(tmp_path / "a.tiff")
  assert read_image(tmp_path / "a.tiff", 32, 48).shape == (32, 48, 3)


def test_unreadable_images_give_one_line(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"image file '.*none.png' does not exist"):
    read_image(tmp_path / "none.png", 32, 32)
  (tmp_path / "text.png").write_text("not an image")
  whole = image_with(tmp_path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
  (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
  for name in ("text.png", "cut.png"):
    with pytest.raises(ValueError, match=rf"image '.*{name}' cannot be read: ") as caught:
      read_image(tmp_path / name, 32, 32)
    assert "\n" not in str(caught.value)


def test_replacing_a_folder_keeps_the_old_one_on_failure(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "old").write_text("")
  with pytest.raises(RuntimeError), replacing(tmp_path / "a") as partial:
    partial.mkdir()
    raise RuntimeError
  assert (tmp_path / "a" / "old").exists()
  with replacing(tmp_path / "a") as partial:
    partial.mkdir()
    (partial / "new").write_text("")
  assert [p.name for p in tmp_path.rglob("*")] == ["a", "new"]


def test_what_is_transparent_in_an_image_is_black(tmp_path):
  pixels = np.full((32, 48, 4), 200, np.uint8)
  pixels[..., 3], pixels[:, 24:, 3], pixels[0, 0, 3] = 255, 0, 128
  Image.fromarray(pixels).save(tmp_path / "a.png")
  found = read_image(tmp_path / "a.png", 32, 48)
  assert (found[:, 24:] == 0).all() and (found[1:, :24] == 200).all()
  assert abs(int(found[0, 0, 0]) - 100) <= 1
  Image.fromarray(np.full((32, 48), 40_000, np.uint16)).save(tmp_path / "b.png")
  assert (read_image(tmp_path / "b.png", 32, 48) == 40_000 >> 8).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_images_of_32_bits_a_number_are_refused(tmp_path, dtype):
  """What is black or white in them is not said."""
  path = tmp_path / "wide.tiff"
  Image.fromarray(np.ones((32, 48), dtype)).save(path)
  with pytest.raises(ValueError, match="wide.tiff' cannot be read: its mode is [IF]: 32 bits"):
    read_image(path, 32, 48)
