"""Indexing video files: what is found, what is skipped and why, what is looked at again."""

import json
import logging as std_logging
import os
from fractions import Fraction

import pytest

from longlive_jax.data import video_index
from longlive_jax.data.video_index import read_index


@pytest.fixture
def lines(caplog):
  """The logged warnings so far, as a function."""
  caplog.set_level(std_logging.INFO, logger="absl")
  return lambda level=std_logging.WARNING: [
    r.getMessage() for r in caplog.records if r.levelno == level
  ]


def test_clips_are_found_with_their_length_rate_and_size(videos):
  index = read_index(videos)
  assert [f.name for f in index.folders] == ["s0", "s1", "s2", "s3", "s4", "two", "vp9"]
  found = {c.file: (c.frames, c.fps, c.height, c.width) for f in index.folders for c in f.clips}
  assert found["video/s0/0.mp4"] == (60, 24, 32, 40)
  assert found["video/s1/0.mp4"] == (60, 25, 32, 40)
  assert found["video/s3/0.mp4"] == (60, 12, 32, 40)
  assert found["video/s4/0.mp4"] == (60, Fraction(24000, 1001), 32, 40)
  assert found["video/two/2.mp4"] == (30, 24, 48, 32)
  assert found["video/two/10.mkv"] == (40, 25, 32, 64)
  assert found["video/vp9/0.webm"] == (50, 24, 32, 40)
  assert index.folders[5].clips[1].caption == "two 10"


def test_clips_are_in_order_of_their_numbers(tmp_path, write):
  for stem in ("10", "9", "b", "a", "007"):
    write(tmp_path, "s", stem, 3)
  names = [clip.file for clip in read_index(tmp_path).folders[0].clips]
  assert names == [f"video/s/{stem}.mp4" for stem in ("007", "9", "10", "a", "b")]


@pytest.mark.parametrize("suffix", [".mp4", ".MOV", ".mkv", ".avi"])
def test_all_frames_are_counted_in_every_container(tmp_path, write, suffix):
  write(tmp_path, "s", "0", 37, 25, suffix=suffix)
  clip = read_index(tmp_path).folders[0].clips[0]
  assert (clip.frames, clip.fps) == (37, 25)
  assert (clip.start is None) == (suffix == ".avi")  # it has no time stamps to be trusted


def test_what_cannot_be_used_is_skipped_with_a_line(tmp_path, write, lines):
  write(tmp_path, "good", "0", 5)
  for stem in ("broken", "missing", "empty", "bad", "half", "list", "cut", "nothing"):
    write(tmp_path, "bad", stem, 30, movflags="+faststart")
  video, caption = tmp_path / "video" / "bad", tmp_path / "caption" / "bad"
  (video / "broken.mp4").write_bytes(b"no video at all")
  (caption / "missing.json").unlink()
  (caption / "empty.json").write_text('{"caption": "  "}')
  (caption / "bad.json").write_text('{"caption": ')
  (caption / "half.json").write_text('{"caption": "\\ud800 x"}')  # of a surrogate pair
  (caption / "list.json").write_text('["caption"]')
  whole = (video / "cut.mp4").read_bytes()
  (video / "cut.mp4").write_bytes(whole[:-300])
  (video / "nothing.mp4").write_bytes(b"")
  (tmp_path / "video" / "hollow").mkdir()
  (video / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
  (caption / "link.json").write_text('{"caption": "a"}')
  index = read_index(tmp_path)
  assert [folder.name for folder in index.folders] == ["good"]
  text = "\n".join(lines())
  for line in (
    "skipped video/bad/broken.mp4: it is not a readable video: Invalid data",
    "skipped video/bad/missing.mp4: its caption caption/bad/missing.json does not exist",
    "skipped video/bad/empty.mp4: its caption caption/bad/empty.json is empty",
    "skipped video/bad/bad.mp4: its caption caption/bad/bad.json is not JSON: ",
    r"skipped video/bad/half.mp4: its caption caption/bad/half.json holds \ud800, which is no char",
    'skipped video/bad/list.mp4: its caption caption/bad/list.json is not of the form {"caption"',
    "skipped video/bad/cut.mp4: it is cut short",
    "skipped video/bad/link.mp4: it is not a readable video: No such file or directory",
    "skipped video/bad: the sample has no usable clip",
    "skipped video/hollow: the sample has no usable clip",
  ):
    assert line in text
  assert len(lines()) == 11 and "/." not in text


def test_a_file_that_is_cut_short_without_a_header_counts_what_is_there(tmp_path, write):
  path = write(tmp_path, "s", "0", 60, suffix=".mkv")
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  assert 3 < read_index(tmp_path).folders[0].clips[0].frames < 57


def test_a_video_without_pictures_is_named(tmp_path, lines):
  import av
  import numpy as np

  (tmp_path / "video" / "s").mkdir(parents=True)
  (tmp_path / "caption" / "s").mkdir(parents=True)
  (tmp_path / "caption" / "s" / "0.json").write_text('{"caption": "a"}')
  with av.open(str(tmp_path / "video" / "s" / "0.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
    frame.rate = 44100
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  with pytest.raises(ValueError, match=r"no usable sample: .*0\.mp4: it holds no video stream"):
    read_index(tmp_path)


def test_wrong_folders_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"data\.path='.*nowhere' is not a folder"):
    read_index(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"data\.path=.* has no folder 'video'"):
    read_index(tmp_path)
  (tmp_path / "video").mkdir()
  with pytest.raises(ValueError, match=r"data\.path=.* no usable sample"):
    read_index(tmp_path)


def test_only_changed_files_are_looked_at_again(tmp_path, write, monkeypatch):
  looked = []

  def probe(path):
    looked.append(path.name)
    return original(path)

  original = video_index.probe
  monkeypatch.setattr(video_index, "probe", probe)
  for stem in "012":
    write(tmp_path, "s", stem, 5)
  (tmp_path / "video" / "s" / "2.mp4").write_bytes(b"broken")
  first = read_index(tmp_path)
  assert sorted(looked) == ["0.mp4", "1.mp4", "2.mp4"]
  stamp = (tmp_path / video_index.CACHE).stat().st_mtime_ns
  assert read_index(tmp_path) == first and len(looked) == 3  # what is broken stays so
  assert (tmp_path / video_index.CACHE).stat().st_mtime_ns == stamp

  caption = tmp_path / "caption" / "s" / "1.json"
  caption.write_text('{"caption": "another"}')
  write(tmp_path, "s", "3", 6)
  (tmp_path / "video" / "s" / "0.mp4").unlink()
  second = read_index(tmp_path)
  assert sorted(looked[3:]) == ["1.mp4", "3.mp4"]
  assert [c.caption for c in second.folders[0].clips] == ["another", "s 3"]
  assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize("text", ["", "{", '{"version": 0, "clips": {}}', '{"version": 1}', "[]"])
def test_an_unusable_cache_is_made_again(tmp_path, write, text):
  write(tmp_path, "s", "0", 5)
  whole = read_index(tmp_path)
  (tmp_path / video_index.CACHE).write_text(text)
  assert read_index(tmp_path) == whole
  assert json.loads((tmp_path / video_index.CACHE).read_text())["version"] == video_index.VERSION


def test_a_folder_that_cannot_be_written_works(tmp_path, write, lines, monkeypatch):
  write(tmp_path, "s", "0", 5)

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(video_index, "replacing", refuse)
  assert len(read_index(tmp_path).folders) == 1
  assert not (tmp_path / video_index.CACHE).exists()
  assert "video_index.json cannot be written" in lines()[0]


def test_the_index_is_the_same_wherever_the_files_lie(tmp_path, write):
  for place in ("a", "b"):
    write(tmp_path / place, "s", "0", 5)
  a, b = read_index(tmp_path / "a"), read_index(tmp_path / "b")
  assert a.fingerprint == b.fingerprint
  os.utime(tmp_path / "b" / "video" / "s" / "0.mp4")
  assert read_index(tmp_path / "b").fingerprint == a.fingerprint
