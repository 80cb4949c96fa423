"""The scorer reads back what the renderer drew, also after blur and noise, and nothing else."""

import dataclasses
import time

import numpy as np
import pytest
from scipy import ndimage

from longlive_jax.config import Video
from longlive_jax.data import shapes
from longlive_jax.eval import shapes_read
from longlive_jax.eval import shapes_score as scorer

VIDEO = Video(height=96, width=160)
CLIPS = 64


def degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Blur of 1 pixel, chroma at half resolution, noise."""
  blurred = ndimage.gaussian_filter(frames.astype(np.float32), (0, 1, 1, 0))
  luma = blurred @ np.asarray([0.299, 0.587, 0.114], np.float32)
  chroma = blurred - luma[..., None]
  count, height, width, _ = chroma.shape
  small = chroma.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))
  noise = 4 * rng.standard_normal(blurred.shape, np.float32)
  out = luma[..., None] + small.repeat(2, 1).repeat(2, 2) + noise
  return np.clip(np.round(out), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def world():
  """Scripts, their readings, and their readings after degradation."""
  specs, clean, worse = [], [], []
  for i in range(CLIPS):
    rng = np.random.default_rng((11, i))
    spec = shapes.sample_clip(rng, shapes.shot_frames((1, 1), 8), VIDEO)
    frames = shapes.render(spec, VIDEO)
    specs.append(spec)
    clean.append(scorer.read_clip(frames, spec))
    worse.append(scorer.read_clip(degrade(frames, rng), spec))
  return specs, clean, worse


def results(readings, specs):
  return [scorer.compare_clip(r, s) for r, s in zip(readings, specs, strict=True)]


def moving(direction: str = "right", colour: str = "red", y: float = 0.5) -> shapes.ObjectSpec:
  return shapes.ObjectSpec(colour, "circle", direction, 1 / 96, 0.3, (y, 0.5))


def shot(*objects: shapes.ObjectSpec, frames: int = 24) -> shapes.ClipSpec:
  return shapes.ClipSpec((shapes.ShotSpec(objects, "sand", frames),))


def test_reads_what_was_drawn(world):
  specs, clean, _ = world
  found = scorer.score(results(clean, specs))
  assert found["shots"] == 2 * CLIPS
  for name in ("colour", "shape", "direction", "cut", "background", "objects", "score"):
    assert found[name] >= 0.995, name


def test_reads_what_was_drawn_after_blur_and_noise(world):
  specs, _, worse = world
  found = scorer.score(results(worse, specs))
  for name in ("colour", "shape", "direction", "cut", "background", "objects", "score"):
    assert found[name] >= 0.99, name


def test_permuted_captions_score_at_chance(world):
  specs, clean, _ = world
  found, chance = scorer.score(scorer.permuted(clean, specs)), scorer.chance()
  for name in ("colour", "shape", "direction", "score"):
    assert found[name] <= chance[name] + 0.05, name
  with pytest.raises(ValueError, match="at least 2"):
    scorer.permuted(clean[:1], specs[:1])


def as_reading(spec: shapes.ShotSpec) -> scorer.ShotReading:
  objects = [
    shapes_read.ObjectReading(o.colour, o.shape, o.direction, *o.start, o.size, 0.0, 1.0)
    for o in spec.objects
  ]
  return scorer.ShotReading(tuple(objects), spec.background)


def test_chance_agrees_with_the_sampler():
  shots = shapes.sample_clip(np.random.default_rng(0), (8,) * 6000, VIDEO).shots
  pairs = zip(shots[:3000], shots[3000:], strict=True)
  found = [scorer.compare_shot(as_reading(a), b) for a, b in pairs]
  for name, expected in scorer.chance().items():
    assert np.mean([f[name] for f in found]) == pytest.approx(expected, abs=0.03), name


@pytest.mark.parametrize("size", [(64, 64), (128, 96)])
def test_other_sizes(size):
  video = Video(height=size[0], width=size[1])
  lengths = (24,) * 4
  spec = shapes.sample_clip(np.random.default_rng(1), lengths, video)
  assert scorer.score([scorer.score_clip(shapes.render(spec, video), spec)])["score"] == 1.0


def test_an_object_on_the_border_is_one_object():
  spec = shot(dataclasses.replace(moving(), start=(0.5, 0.0), speed=0.5 / 96))
  found = scorer.read_shot(shapes.render(spec, VIDEO))
  assert [(o.colour, o.shape, o.direction) for o in found] == [("red", "circle", "right")]


def test_objects_are_ordered_like_the_caption():
  spec = shot(moving("left", "blue", 0.25), moving("right", "red", 0.75))
  found = scorer.read_shot(shapes.render(spec, VIDEO))
  assert [o.colour for o in found] == ["blue", "red"]
  assert [o.direction for o in found] == ["left", "right"]


def test_missing_and_extra_objects_count_as_wrong():
  two = shot(moving("left", "blue", 0.25), moving("right", "red", 0.75))
  upper, lower = (shot(item) for item in two.shots[0].objects)
  for one in (upper, lower):
    missing = scorer.score_clip(shapes.render(one, VIDEO), two)
    extra = scorer.compare_clip(scorer.read_clip(shapes.render(two, VIDEO), two), one)
    assert missing["score"] == [0.5] and missing["objects"] == [0.0]
    assert max(extra["score"]) <= 0.5 and extra["objects"] == [0.0]
  nothing = np.full((24, 96, 160, 3), 128, np.uint8)
  assert scorer.score_clip(nothing, two)["score"] == [0.0]
  assert scorer.read_shot(nothing) == [] and scorer.read_shot(nothing[:1]) == []


def test_an_object_that_rests_has_no_direction():
  spec = shot(dataclasses.replace(moving(), speed=0.0))
  assert scorer.read_shot(shapes.render(spec, VIDEO))[0].direction == "still"
  assert scorer.score_clip(shapes.render(spec, VIDEO), spec)["direction"] == [0.0]


def test_noise_is_no_object():
  noise = np.random.default_rng(0).integers(0, 256, (8, 96, 160, 3), np.uint8)
  spec = shot(moving(), frames=8)
  assert scorer.score_clip(noise, spec)["score"][0] < 0.5


def test_a_cut_is_found_where_it_is_or_not_at_all():
  spec = shapes.sample_clip(np.random.default_rng(4), (29, 32), VIDEO)
  frames = shapes.render(spec, VIDEO)
  assert scorer.find_cut(frames, 29) == 29
  assert scorer.find_cut(frames, 33, 8) == 29
  assert scorer.find_cut(frames[:29], 20) is None
  late = np.concatenate([frames[:28], frames[28:29].repeat(6, 0), frames[29:-5]])
  assert scorer.score_clip(late, spec)["cut"] == [0.0]


def test_a_change_without_a_cut_is_scored_as_a_shot_and_not_as_a_cut():
  """It also is read where an object rests on a border, having turned there."""
  specs = [
    shapes.sample_clip(np.random.default_rng((3, i)), (29, 24, 24, 24), VIDEO, change_share=0.7)
    for i in range(24)
  ]
  marked = [scorer.score_clip(shapes.render(spec, VIDEO), spec) for spec in specs]
  found, shots = scorer.score(marked), [shot for spec in specs for shot in spec.shots]
  changes = sum(shot.follows for shot in shots)
  assert found["shots"] == len(shots) and 0 < changes < 72
  assert sum(len(result["changed"]) for result in marked) == changes
  assert sum(len(result["cut"]) for result in marked) == 72 - changes
  for name in ("score", "cut", "changed"):
    assert found[name] >= 0.995, name
  assert {"changed_error", "cut_error"} <= set(found)


def test_only_the_shots_that_follow_count_as_changed():
  first = shot(moving("left"), frames=29).shots[0]
  second = dataclasses.replace(shot(moving("right", "blue")).shots[0], follows=True)
  frames = shapes.render(shapes.ClipSpec((first, second)), VIDEO)
  unmoved = shapes.ClipSpec((first, dataclasses.replace(first, frames=24, follows=True)))
  found = scorer.score([scorer.score_clip(frames, unmoved)])
  assert found["changed"] == pytest.approx(1 / 3), "the shape alone"
  assert found["score"] == pytest.approx(2 / 3) and "cut" not in found
  cut = shapes.ClipSpec((first, dataclasses.replace(second, follows=False)))
  assert "changed" not in scorer.score([scorer.score_clip(frames, cut)])


@pytest.mark.parametrize("start", [(0.3, 0.0), (0.3, 0.97), (0.0, 0.0)])
@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_an_object_that_moves_along_a_border_is_one_object(start, shape):
  spec = shot(dataclasses.replace(moving("down"), start=start, shape=shape))
  frames = degrade(shapes.render(spec, VIDEO), np.random.default_rng(0))
  found = scorer.read_shot(frames)
  assert [(o.colour, o.shape, o.direction) for o in found] == [("red", shape, "down")]


def test_pairs_are_differences_of_the_same_scripts(world):
  specs, clean, worse = world
  a, b = results(clean, specs), scorer.permuted(worse, specs)
  found = scorer.paired(a, b)
  expected = scorer.score(a)["score"] - scorer.score(b)["score"]
  assert found["score"] == pytest.approx(expected)
  assert 0 < found["score_error"] < 0.05
  assert scorer.paired(a, a)["score"] == 0.0
  with pytest.raises(ValueError, match="other scripts"):
    scorer.paired(a, a[1:])


def test_the_video_must_have_the_length_of_its_script():
  spec = shot(moving())
  with pytest.raises(ValueError, match="23 frames; its script has 24"):
    scorer.read_clip(shapes.render(spec, VIDEO)[:-1], spec)
  with pytest.raises(ValueError, match="uint8"):
    scorer.read_shot(np.zeros((4, 96, 160, 3), np.float32))


def test_a_long_clip_is_read_quickly():
  spec = shapes.sample_clip(np.random.default_rng(0), shapes.shot_frames((4,) * 4, 8), VIDEO)
  frames = shapes.render(spec, VIDEO)
  start = time.process_time()
  assert scorer.score([scorer.score_clip(frames, spec)])["score"] == 1.0
  assert time.process_time() - start < 4.0  # about 0.5 on an idle core
