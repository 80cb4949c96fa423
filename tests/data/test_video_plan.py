"""Planning: which frames make a sample. The numbers are those of training.md §10.1."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from longlive_jax.data.video_index import Clip, Folder
from longlive_jax.data.video_plan import (
  Rules,
  check_long_enough,
  picks,
  plan_from,
  sample_plan,
  starts,
)

RULES = Rules(
  blocks=7, block_latents=8, fps=24, max_shot_blocks=0, least_blocks=7, cut_prefix="Cut. "
)


def clip(name: str, frames: int, fps: float | Fraction = 24) -> Clip:
  return Clip(f"video/s/{name}.mp4", name, frames, Fraction(fps), 32, 32, 0)


def folder(*clips: Clip) -> Folder:
  return Folder("root", "s", clips)


def frames_of(blocks: int) -> int:
  return 29 + 32 * (blocks - 1)


def plan(*clips: Clip, **rules):
  """The plan of the first start."""
  changed = dataclasses.replace(RULES, **rules)
  return plan_from(folder(*clips), changed, starts(folder(*clips), changed)[0])


@pytest.mark.parametrize(("latents", "frames"), [(32, 125), (96, 381), (192, 765), (384, 1533)])
def test_frames_of_a_sample(latents, frames):
  rules = dataclasses.replace(RULES, blocks=latents // 8, least_blocks=1)
  assert rules.frames == frames == sum(rules.block_frames(i == 0) for i in range(latents // 8))
  made = sample_plan(folder(clip("A", 2000)), rules, np.random.default_rng(0))
  assert made.frames.shape == made.files.shape == (frames,)
  assert len(made.prompts) == len(made.shots) == latents // 8
  assert made.valid_latents == latents


def test_a_file_of_30_frames_a_second():
  made = plan(clip("A", 1000, 30), blocks=3, least_blocks=3)
  assert made.frames[:10].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
  assert made.frames[28] == 35 and made.frames[29] == 36 and made.frames[29 + 32] == 76


@pytest.mark.parametrize("fps", [12, 24, 25, 30, 50, 60, Fraction(24000, 1001)])
@pytest.mark.parametrize("start", [0, 7])
def test_picks_round_halves_to_even(fps, start):
  step = Fraction(fps) / 24
  expected = [round(start + i * step) for i in range(400)]
  assert picks(start, 400, step).tolist() == expected


def test_a_slow_file_repeats_frames():
  made = plan(clip("A", 100, 12), blocks=1, least_blocks=1)
  assert made.frames.tolist()[:8] == [0, 0, 1, 2, 2, 2, 3, 4]  # halves to even


def test_files_follow_each_other_and_a_cut_has_the_prefix():
  made = plan(clip("A", frames_of(3)), clip("B", 200))
  assert made.prompts == ("A", "A", "A", "Cut. B", "B", "B", "B")
  assert made.shots.tolist() == [0, 0, 0, 1, 1, 1, 1]
  assert made.files.tolist() == [0] * 93 + [1] * 128
  assert made.frames.tolist() == [*range(93), *range(128)]


def test_files_that_hold_no_block_are_passed_over():
  made = plan(clip("A", frames_of(3) + 5), clip("B", 31), clip("C", 200))
  assert made.prompts == ("A", "A", "A", "Cut. C", "C", "C", "C")
  made = plan(clip("A", 28), clip("B", frames_of(7)))
  assert made.prompts == ("B",) * 7 and made.shots.tolist() == [0] * 7


def test_the_rest_of_a_long_file_is_another_shot():
  made = plan(clip("A", 1000), max_shot_blocks=3)
  assert made.prompts == ("A", "A", "A", "Cut. A", "A", "A", "Cut. A")
  assert made.shots.tolist() == [0, 0, 0, 1, 1, 1, 2]
  assert made.frames[92] == 92 and made.frames[93] == 93 + 24  # one second is left out
  assert made.frames[93 + 96] == 93 + 24 + 96 + 24


def test_a_long_shot_that_runs_out_goes_on_with_the_next_file():
  first = clip("A", 93 + 24 + 96 + 24 + 31)  # one frame short of a seventh block
  made = plan(first, clip("B", 100), max_shot_blocks=3)
  assert made.prompts == ("A", "A", "A", "Cut. A", "A", "A", "Cut. B")
  assert made.files[-32:].tolist() == [1] * 32 and made.frames[-32:].tolist() == [*range(32)]
  ends_exactly = plan(clip("A", frames_of(3)), clip("B", 500), max_shot_blocks=3)
  assert ends_exactly.prompts == ("A", "A", "A", "Cut. B", "B", "B", "Cut. B")


def test_starts_take_the_jumps_of_long_shots_into_account():
  """A long clip was started where, after its jumps, it ended too early."""
  long = folder(clip("A", frames_of(7) + 10 + 2 * 24))
  rules = dataclasses.replace(RULES, max_shot_blocks=3)
  found = starts(long, rules)
  assert {start.blocks for start in found} == {7}
  assert max(start.frame for start in found) == 10
  for start in found:
    made = plan_from(long, rules, start)
    assert made.valid_latents == 56 and made.frames.max() < long.clips[0].frames


def test_starts_are_spread_over_all_clips():
  both = folder(clip("A", 3000), clip("B", 300), clip("C", 50))
  found = starts(both, RULES)
  per_clip = [sum(start.clip == i for start in found) for i in range(3)]
  assert 45 <= per_clip[0] <= 51 and per_clip[1] > 5 and per_clip[2] == 0
  drawn = {sample_plan(both, RULES, np.random.default_rng(i)).frames[0] for i in range(60)}
  assert len(drawn) > 20


@pytest.mark.parametrize("fps", [12, 23.976, 24, 25, 29.97, 30, 60])
@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_every_start_serves_frames_that_exist(fps, most):
  rng = np.random.default_rng(int(fps * 10) + most)
  rules = dataclasses.replace(RULES, max_shot_blocks=most, blocks=4, least_blocks=4)
  for _ in range(6):
    lengths = rng.integers(20, 400, 4)
    sample = folder(*(clip(str(i), int(n), fps) for i, n in enumerate(lengths)))
    try:
      check_long_enough(sample, rules)
    except ValueError:
      with pytest.raises(ValueError, match="fills"):
        starts(sample, rules)
      continue
    for start in starts(sample, rules):
      made = plan_from(sample, rules, start)
      assert len(made.frames) == len(made.files) == rules.frames
      assert np.all(made.frames < lengths[made.files]) and made.frames.min() >= 0
      moves = np.diff(made.files * 10_000 + made.frames)
      assert np.all(moves >= 0)  # forwards, always


def test_the_same_lots_give_the_same_plan():
  sample = folder(clip("A", 3000))
  first, second = (sample_plan(sample, RULES, np.random.default_rng(5)) for _ in range(2))
  np.testing.assert_array_equal(first.frames, second.frames)


def test_what_is_too_short_is_refused():
  short = folder(clip("A", frames_of(6) + 31))
  for refuse in (check_long_enough, starts):
    with pytest.raises(
      ValueError, match=r"video/s: it fills 6 blocks .* data\.blocks=7 .*data\.pad"
    ):
      refuse(short, RULES)
  with pytest.raises(ValueError, match="fills 0 blocks"):
    starts(folder(clip("A", 3)), RULES)


def test_what_is_too_short_is_padded():
  made = plan(clip("A", frames_of(2)), clip("B", 33), least_blocks=3)
  assert made.prompts == ("A", "A", "Cut. B", "B", "B", "B", "B")
  assert made.shots.tolist() == [0, 0, 1, 1, 1, 1, 1]
  assert made.valid_latents == 24
  assert made.frames.shape == (221,) and made.frames[92] == 31
  assert np.all(made.frames[93:] == 31)
  assert np.all(made.files[61:] == 1)
  with pytest.raises(ValueError, match=r"fills 3 blocks .* data\.min_blocks=4 "):
    plan(clip("A", frames_of(2)), clip("B", 33), least_blocks=4)


def test_rules_follow_the_settings(tmp_path, experiment_of):
  experiment = experiment_of(tmp_path, blocks=5, min_blocks=2, max_shot_blocks=3)
  rules = Rules.of(experiment)
  assert rules == Rules(5, 2, 24, 3, 5, "Cut. ")
  experiment.data.pad = True
  assert Rules.of(experiment).least_blocks == 2
