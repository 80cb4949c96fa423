"""What clips of distillation are made of: prompts, cuts, first frames, from every source."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from longlive_jax.build import build_models
from longlive_jax.config.load import load_config
from longlive_jax.config.schema import Video
from longlive_jax.data.shapes import render, write_clips
from longlive_jax.io.metrics import read_metrics
from longlive_jax.model.lora import merge
from longlive_jax.model.vae import from_uint8
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.train.clips import make_clips
from longlive_jax.train.distill_feed import open_feed
from tests.train.test_stage_dmd import SETTINGS, distil


def feed_of(root, **settings):
  """(feed, experiment, models) of the smallest model, with first latents."""
  changed = {name.replace("__", "."): value for name, value in settings.items()}
  given = {**SETTINGS, "train.first_latent_share": 1.0, **changed}
  experiment = load_config(root / "configs/tiny.py:dmd", given)
  mesh = mesh_of(experiment, jax.devices()[:1])
  models = build_models(experiment, mesh, narrow=True, plain=True)
  feed = open_feed(experiment, models, mesh)
  feed.start(0)
  return feed, experiment, models


def test_first_latents_of_the_shapes_world_are_of_its_first_frames(root):
  feed, experiment, models = feed_of(root)
  specs, _ = make_clips(experiment, experiment.data.clips, experiment.data.seed)
  frames = np.stack([render(spec, experiment.video, 0, 1) for spec in specs])
  expected = models.vae.bind(models.params["vae"]).encode(from_uint8(frames))
  np.testing.assert_allclose(feed.first, expected, atol=0.02)  # bfloat16
  drawn, again = feed(3), feed(3)
  assert drawn.first.shape == (4, 1, 2, 2, 4) and drawn.tokens.shape[:2] == (4, 2)
  for ours, theirs in zip(drawn, again, strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
  """Two scripts with images; the second is shorter than a clip."""
  folder = tmp_path_factory.mktemp("scripts")
  for name, shots in {
    "a": [{"prompt": "one", "blocks": 1}, {"prompt": "two", "blocks": 1}],
    "b": [{"prompt": "three", "blocks": 1}],
  }.items():
    Image.new("RGB", (40, 32), (200, 10, 10)).save(folder / f"{name}.png")
    (folder / f"{name}.json").write_text(json.dumps({"image": f"{name}.png", "shots": shots}))
  return folder


def test_scripts_say_prompts_and_cuts(root, scripts):
  place = {"data__source": "scripts", "data__path": str(scripts)}
  feed, experiment, models = feed_of(root, **place, data__blocks=3)
  np.testing.assert_array_equal(feed.cuts, [[False, True, False], [False] * 3])
  prefix = experiment.sample.cut_prefix
  ids, _ = models.tokenizer(["one", prefix + "two", "two", *["three"] * 3])
  np.testing.assert_array_equal(feed.tokens.reshape(6, -1), ids)
  drawn = feed(0)
  assert drawn.first.shape == (4, 32, 32, 3) and drawn.first.dtype == np.uint8


def test_scripts_that_cannot_be_used(root, tmp_path):
  place = {"data__source": "scripts", "data__path": str(tmp_path)}
  with pytest.raises(ValueError, match=r"data.path='.*' is a folder without a .json or .txt"):
    feed_of(root, **place)
  (tmp_path / "a.txt").write_text("one\n")
  with pytest.raises(ValueError, match="script 'a' of data.path has no image"):
    feed_of(root, **place)
  assert feed_of(root, **place, train__first_latent_share=0.0)[0](0).first is None
  shots = [{"prompt": "x", "blocks": 1}, {"prompt": "y", "transition": "recache"}]
  (tmp_path / "a.json").write_text(json.dumps({"shots": shots}))
  with pytest.raises(ValueError, match="script 'a' of data.path re-caches"):
    feed_of(root, **place)
  with pytest.raises(ValueError, match="data.source=scripts is for train.stage=dmd"):
    load_config(root / "configs/tiny.py:ar", {"data.source": "scripts", "data.path": "x"})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("videos")
  write_clips(folder, 3, 0, [1, 1], Video(height=32, width=32))
  return folder


def test_video_files_give_captions_and_first_frames(root, videos):
  place = {"data__source": "videos", "data__path": str(videos), "train__batch": 3}
  feed, *_ = feed_of(root, **place)
  drawn = feed(0)
  assert drawn.first.shape == (3, 32, 32, 3) and drawn.first.dtype == np.uint8
  other = (drawn.tokens[:, 0] != drawn.tokens[:, 1]).any(-1)
  assert drawn.cuts == [[False] * 3, other.tolist()] and 0 < other.sum() < 3
  following = feed(1)
  feed.start(3)
  np.testing.assert_array_equal(feed(1).tokens, following.tokens)
  feed.close()


ON_FILES = {
  "data__source": "videos",
  "model__width": 32,
  "model__layers": 1,
  "train__first_latent_share": 1.0,
  "train__batch": 2,
  "distill__attached_cache": False,
  "distill__student_every": 1,
}


def test_a_run_on_files_goes_on_where_it_stopped(root, videos, tmp_path):
  settings = {**ON_FILES, "data__path": str(videos)}
  distil(root, tmp_path / "b", **settings, train__steps=1)
  *_, ours = distil(root, tmp_path / "b", **settings, train__steps=2)
  *_, whole = distil(root, tmp_path / "c", **settings, train__steps=2)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)


def test_student_and_teacher_in_nvfp4(root, videos, tmp_path):
  """And the critic not, as in the original's recipe; the result has the wide weights."""
  settings = {**ON_FILES, "data__path": str(videos), "quant__linears": "nvfp4"}
  base, merged, adapters = distil(
    root, tmp_path, **settings, distill__quantised=("student", "teacher"), train__steps=1
  )
  (line,) = read_metrics(tmp_path)
  assert np.isfinite(line["loss"]) and line["student_grad_norm"] > 0
  expected = merge(base, adapters, 2.0)
  for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(ours, theirs)
