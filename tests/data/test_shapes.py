"""The shapes world: deterministic, of any length, and the same however it is drawn."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from longlive_jax.config import Video
from longlive_jax.data import shapes, shapes_render, shapes_spec

VIDEO = Video(height=64, width=96)
LENGTHS = shapes.shot_frames((1, 1), 8)


def clip(
  seed: int, lengths=LENGTHS, video: Video = VIDEO, change_share: float = 0.0
) -> shapes.ClipSpec:
  return shapes.sample_clip(np.random.default_rng(seed), lengths, video, change_share)


def thing(direction: str = "right", shape: str = "circle", **changes) -> shapes.ObjectSpec:
  values = {"speed": 1 / 64, "size": 0.3, "start": (0.5, 0.25)} | changes
  return shapes.ObjectSpec("red", shape, direction, **values)


def single(item: shapes.ObjectSpec, frames: int = 8) -> shapes.ClipSpec:
  return shapes.ClipSpec((shapes.ShotSpec((item,), "night", frames),))


def test_shots_start_at_block_borders():
  assert shapes.shot_frames((1, 1), 8) == (29, 32)
  assert shapes.shot_frames((4,), 8) == (125,)
  assert sum(shapes.shot_frames((5, 4, 3), 8)) == 29 + 32 * 11
  assert clip(0).first_frames == (0, 29)


def test_same_seed_same_clip():
  assert clip(3) == clip(3)
  assert clip(3) != clip(4)
  np.testing.assert_array_equal(shapes.render(clip(3), VIDEO), shapes.render(clip(3), VIDEO))


def test_a_frame_does_not_depend_on_the_length():
  short, long = clip(5, (29,)), clip(5, (400,))
  picture = shapes.render(short, VIDEO)
  assert picture.shape == (29, 64, 96, 3) and picture.dtype == np.uint8
  np.testing.assert_array_equal(picture, shapes.render(long, VIDEO, 0, 29))
  part = shapes.render(long, VIDEO, 17, 29)
  np.testing.assert_array_equal(picture[17:], part)
  assert shapes.render(long, VIDEO, 390).shape[0] == 10
  assert shapes.render(long, VIDEO, 5, 5).shape == (0, 64, 96, 3)


def captions() -> list[str]:
  looks = list(itertools.product(shapes_render.COLOURS, shapes_render.SHAPES))
  out = []
  for background in ("checker", "fog"):
    for pair in (("left", "right"), ("up", "down")):
      items = [shapes.ObjectSpec(c, s, d, 0.01, 0.3, (0.5, 0.5)) for (c, s) in looks for d in pair]
      shots = [(a,) for a in items] + list(itertools.product(items, items))
      out += [shapes.ShotSpec(shot, background, 1).caption() for shot in shots]
  return out


def test_captions_are_short_and_name_one_shot_each():
  every = captions()
  assert len(set(every)) == len(every)
  assert max(len(text.encode()) for text in every) <= shapes_spec.MAX_CAPTION_BYTES
  assert "one red circle moving left, over fog" in every
  assert "north red circle moving left, south blue square heading right, over fog" in every
  assert "west red circle moving up, east blue square heading down, over fog" in every


def test_consecutive_shots_differ_in_background_and_colours():
  for before, after in itertools.pairwise(clip(1, (8,) * 200).shots):
    assert before.background != after.background
    assert not {o.colour for o in before.objects} & {o.colour for o in after.objects}


def test_clips_that_are_only_cut_stay_what_they_are():
  """Seeds stand for scripts in files of scores, and for the clips of a training run."""
  shots = clip(17, (29, 32, 32, 32)).shots
  assert [shot.caption() for shot in shots] == [
    "north red circle moving left, south green square heading left, over slate",
    "one purple circle moving left, over night",
    "west blue square moving up, east yellow square heading up, over fog",
    "one green square moving up, over checker",
  ]
  last = shots[-1].objects[0]
  assert last.start == pytest.approx((0.343049972540729, 0.539023810014116))
  assert not any(shot.follows for shot in shots)


def test_what_changes_without_a_cut():
  shots = clip(1, (8,) * 1200, change_share=0.7).shots
  changes = [(a, b) for a, b in itertools.pairwise(shots) if b.follows]
  cuts = [(a, b) for a, b in itertools.pairwise(shots) if not b.follows]
  assert not shots[0].follows and len(changes) / len(shots) == pytest.approx(0.7, abs=0.05)
  for before, after in cuts:
    assert before.background != after.background
    assert not {o.colour for o in before.objects} & {o.colour for o in after.objects}
  going_on = []
  for before, after in changes:
    assert before.caption() != after.caption()
    assert len({o.colour for o in after.objects}) == len(after.objects)
    if [o.size for o in before.objects] == [o.size for o in after.objects]:
      going_on.append((before, after))
  assert len(going_on) / len(changes) == pytest.approx(0.8, abs=0.05)
  stays = [before.background == after.background for before, after in going_on]
  assert np.mean(stays) == pytest.approx(0.5 + 0.5 / 6, abs=0.07)
  turns = {1: [], 2: []}
  for before, after in going_on:
    assert [o.speed for o in before.objects] == [o.speed for o in after.objects]
    turns[len(after.objects)].append(before.objects[0].horizontal != after.objects[0].horizontal)
  assert np.mean(turns[1]) == pytest.approx(0.5, abs=0.1)
  assert not any(turns[2]), "objects would leave their lanes"


def middle(coloured: np.ndarray) -> np.ndarray:
  """Centre (y, x) in pixels of what is set in [H, W], one run on a torus along each axis."""
  centre = []
  for axis in (1, 0):
    line = coloured.any(axis)
    first = int(np.flatnonzero(line & ~np.roll(line, 1))[0])
    centre.append((first + line.sum() / 2) % line.size)
  return np.asarray(centre)


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_objects_go_on_from_where_they_are(size):
  """From the last frame before a change to the first after it they move as ever: one step."""
  video, seen = Video(height=size[0], width=size[1]), {1: 0, 2: 0}
  for seed in range(8):
    spec = clip(seed, (41,) * 4, video, change_share=1.0)
    for first, (before, after) in zip(
      spec.first_frames[1:], itertools.pairwise(spec.shots), strict=True
    ):
      if [o.size for o in before.objects] != [o.size for o in after.objects]:
        continue
      frames = shapes.render(spec, video, first - 1, first + 1)
      coloured = np.ptp(frames, axis=-1) > 64
      lanes = [coloured]
      if len(after.objects) == 2:
        lanes = np.split(coloured, 2, axis=1 if after.objects[0].horizontal else 2)
      for lane, thing in zip(lanes, before.objects, strict=True):
        step = middle(lane[1]) - middle(lane[0])
        step = (step + np.asarray(size) / 2) % size - np.asarray(size) / 2
        moved = np.asarray(shapes_render.DIRECTIONS[thing.direction]) * thing.speed * min(size)
        np.testing.assert_allclose(step, moved, atol=1.0)
        seen[len(after.objects)] += 1
  assert min(seen.values()) >= 4


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_two_objects_keep_to_their_lanes(size):
  video = Video(height=size[0], width=size[1])
  shots = [s for s in clip(2, (8,) * 200, video).shots if len(s.objects) == 2]
  assert len(shots) > 50
  for shot in shots:
    first, second = shot.objects
    assert first.horizontal == second.horizontal and first.colour != second.colour
    axis = 0 if first.horizontal else 1
    for lane, item in enumerate(shot.objects):
      half = item.size / 2 * min(size) / size[axis]
      assert lane / 2 < item.start[axis] - half
      assert item.start[axis] + half < (lane + 1) / 2


def test_packed_clips_give_the_same_picture():
  specs = [clip(7), clip(8), clip(9, (61,))]
  indices = np.asarray([0, 28, 29, 60, 3])
  packed = shapes.pack_many(specs, 4)
  batch = shapes.render_batch(packed, indices, height=64, width=96)
  assert batch.shape == (3, 5, 64, 96, 3) and batch.dtype == np.float32
  draw = jax.vmap(lambda one: shapes.render_packed(one, indices, 64, 96))
  np.testing.assert_allclose(draw(packed), batch, atol=1e-4)
  for spec, pixels in zip(specs, np.asarray(batch), strict=True):
    assert pixels.min() >= -1.0 and pixels.max() <= 1.0
    whole = shapes.render(spec, VIDEO)[indices]
    assert np.abs((pixels + 1) * 127.5 - whole).max() <= 1.0


@pytest.mark.parametrize(
  ("direction", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
@pytest.mark.parametrize("shape", shapes_render.SHAPES)
def test_the_world_is_a_torus(direction, axis, sign, shape):
  size = (64, 96)[axis]
  picture = shapes.render(single(thing(direction, shape), size + 1), VIDEO)
  red = picture[..., 0].astype(np.int64) - picture[..., 2]  # the night has a gradient, red has not
  np.testing.assert_allclose(red[size], red[0], atol=2)  # once around, one pixel a frame
  np.testing.assert_allclose(red[40], np.roll(red[0], 40 * sign, axis), atol=8)
  assert np.ptp((red > 100).sum(axis=(1, 2))) <= 2


def test_edges_are_smooth():
  picture = shapes.render(single(thing(start=(0.5, 0.503))), VIDEO)[0]
  values = np.unique(picture[32, :, 0])
  assert values.size >= 3
  assert values.max() == shapes_render.COLOURS["red"][0]


def test_backgrounds_have_little_colour_and_differ():
  plates = np.asarray(shapes_render.backgrounds(96, 160))
  assert np.ptp(plates, axis=-1).max() < 40
  for a, b in itertools.combinations(plates, 2):
    assert np.abs(a - b).mean() > 25
  colours = np.asarray(list(shapes_render.COLOURS.values()))
  assert np.ptp(colours, axis=-1).min() > 140


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match=r"video\.height=90"):
    clip(0, video=Video(height=90, width=160))
  with pytest.raises(ValueError, match="max_shots=1"):
    shapes.pack(clip(0), 1)
  with pytest.raises(ValueError, match="shot_blocks"):
    shapes.shot_frames((1, 0), 8)
  with pytest.raises(ValueError, match="number of shots"):
    clip(0, ())


def test_clips_are_written_as_one_file_a_shot(tmp_path):
  shapes.write_clips(tmp_path, 1, 0, (1, 1), VIDEO)
  assert sorted(p.name for p in (tmp_path / "video" / "00000").iterdir()) == ["0.mp4", "1.mp4"]
  text = json.loads((tmp_path / "caption" / "00000" / "1.json").read_text())
  assert text == {"caption": clip((0, 0)).shots[1].caption()}


def test_clips_of_another_set_are_not_mixed_with_those_written(tmp_path):
  for name in ("00001", "00002", "mine"):
    (tmp_path / "video" / name).mkdir(parents=True)
  (tmp_path / "caption" / "00003").mkdir(parents=True)
  (tmp_path / "video" / ".hidden").touch()
  with pytest.raises(ValueError, match=r"holds 3 other clips \(00002 to mine\) than the 2 to"):
    shapes.write_clips(tmp_path, 2, 0, (1,), VIDEO)
  assert not (tmp_path / "video" / "00000").exists()
  with pytest.raises(OSError, match="the folder cannot be made"):
    shapes.write_clips(pathlib.Path("/proc/nowhere"), 2, 0, (1,), VIDEO)


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    (["--out=FILE"], "FILE: it is a file; give the name of a folder"),
    (["--out=new", "--height=90"], "video.height=90 must be"),
    (["--out=new", "--shot_blocks=2,a"], "--shot_blocks=2,a must be numbers such as 2,2"),
  ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, line):
  (tmp_path / "FILE").touch()
  done = command(tmp_path, *arguments)
  assert done.returncode == 2 and done.stderr.startswith(f"error: {line}")
  assert done.stderr.count("\n") == 1 and not done.stdout
  assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_the_command_tells_what_it_wrote_and_nothing_else(tmp_path):
  done = command(tmp_path, "--out=new", "--clips=1", "--shot_blocks=1", "--height=32", "--width=32")
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.count("\n") == 1 and "wrote 1 clips to new" in done.stdout


def command(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  line = [sys.executable, "-m", "longlive_jax.data.shapes", *arguments]
  environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
