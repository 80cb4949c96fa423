"""`launch.sample`: scripts and inputs in, videos in every form out, each with its configuration."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
from longlive_jax.data.prompts import load_script
from longlive_jax.io.video import read_video, write_video

BLOCKS = 4  # of the script below; frames: 5 of the first block, 8 of every other
FRAMES = 5 + 3 * 8


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
  path = tmp_path_factory.mktemp("script") / "script.json"
  shots = [{"prompt": "one red circle, over snow", "blocks": 3}, {"prompt": "sand", "blocks": 1}]
  path.write_text(json.dumps({"seed": 7, "shots": shots}))
  return path


def pictures(folder: Path) -> np.ndarray:
  """The frames of a folder, `[T, H, W, 3]`."""
  return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture
def frames(sample, script, tmp_path) -> np.ndarray:
  """What the script gives, without loss."""
  done = sample(f"--script={script}", f"--out={tmp_path / 'plain'}")
  assert done.code == 0, done.stderr
  return pictures(tmp_path / "plain")


def test_a_script_gives_the_video_of_the_library(frames, checkpoint, script):
  assert frames.shape == (FRAMES, 32, 32, 3)
  expected = Pipeline.from_checkpoint(checkpoint).generate(load_script(script))
  np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("name", ["new/video.mp4", "video.gif", "f_%03d.png"])
def test_every_form(sample, script, tmp_path, name):
  out = tmp_path / name
  done = sample(f"--script={script}", f"--out={out}", "--config.video.fps=10")
  assert done.code == 0, done.stderr
  assert f"{out}: {FRAMES} frames, 2.9 s of video" in done.stdout
  assert "error" not in done.stderr and f"{BLOCKS}/{BLOCKS}" in done.stderr  # the progress bar
  config = load_config(out.with_name(out.name + ".config.json"))
  assert (config.video.fps, config.model.width) == (10, 24)
  names = sorted(path.name for path in out.parent.iterdir())
  made = [f"f_{i:03d}.png" for i in range(FRAMES)] if "%" in name else [out.name]
  assert names == sorted([*made, out.name + ".config.json"])
  if "%" not in name:
    with av.open(str(out)) as video:
      assert video.streams.video[0].average_rate == 10
      assert sum(1 for _ in video.decode(video=0)) == FRAMES


def test_the_seed_of_the_script_decides_then_that_of_the_configuration(sample, frames, tmp_path):
  text, out = tmp_path / "script.txt", tmp_path / "frames"
  text.write_text("# two shots\none red circle, over snow\n\nsand\n")

  def run(seed: int) -> np.ndarray:
    done = sample(f"--script={text}", f"--out={out}", f"--config.sample.seed={seed}")
    assert done.code == 0, done.stderr
    return pictures(out)

  a, b = run(7), run(8)
  assert len(a) == 5 + 5 * 8  # three blocks a shot
  np.testing.assert_array_equal(a[: 5 + 16], frames[: 5 + 16])  # the same first shot and seed
  assert (a[:5] != b[:5]).any()


def test_an_image_is_the_first_frame_and_may_come_from_the_script(sample, script, tmp_path):
  image = np.zeros((32, 32, 3), np.uint8)
  image[8:24, 8:24] = [250, 30, 30]
  Image.fromarray(image).save(tmp_path / "first.png")
  tree = json.loads(script.read_text()) | {"image": "first.png"}
  (tmp_path / "with_image.json").write_text(json.dumps(tree))
  runs = {
    "flag": (f"--script={script}", f"--image={tmp_path / 'first.png'}"),
    "script": (f"--script={tmp_path / 'with_image.json'}",),
    "none": (f"--script={script}",),
  }
  made = {}
  for name, arguments in runs.items():
    done = sample(*arguments, f"--out={tmp_path / name}")
    assert done.code == 0, done.stderr
    made[name] = pictures(tmp_path / name)
  np.testing.assert_array_equal(made["flag"], made["script"])
  assert len(made["flag"]) == FRAMES
  assert (made["flag"][0] != made["none"][0]).any()


def test_a_video_goes_on(sample, script, tmp_path, checkpoint):
  rng = np.random.default_rng(0)
  shade = np.clip(128 + 40 * rng.standard_normal((1, 32, 32, 3)), 0, 255)
  before = np.repeat(shade.astype(np.uint8), 16, 0)
  write_video(tmp_path / "before.mp4", [before], 24)
  done = sample(
    f"--script={script}", f"--extend={tmp_path / 'before.mp4'}", f"--out={tmp_path / 'frames'}"
  )
  assert done.code == 0, done.stderr
  made = pictures(tmp_path / "frames")
  assert len(made) == 13 + BLOCKS * 8  # 16 frames hold two whole blocks, of 5 and 8
  assert f"{BLOCKS + 2}/{BLOCKS + 2}" in done.stderr
  pipeline = Pipeline.from_checkpoint(checkpoint)
  prefix = pipeline.encode_video(read_video(tmp_path / "before.mp4"))
  expected = pipeline.generate(load_script(script), prefix=prefix[None])
  np.testing.assert_array_equal(made, expected)


def test_an_older_video_is_replaced(sample, script, tmp_path):
  out = tmp_path / "video.mp4"
  out.write_text("old")
  assert sample(f"--script={script}", f"--out={out}").code == 0
  assert len(read_video(out)) == FRAMES
  assert sorted(path.name for path in tmp_path.iterdir()) == ["video.mp4", "video.mp4.config.json"]
