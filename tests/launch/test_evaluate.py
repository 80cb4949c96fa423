"""`launch.evaluate`: scripts drawn by seed, scored, and compared script by script."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
from longlive_jax.data import shapes
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.eval.shapes_score import score_clip
from tests.launch.tiny import TINY, Outcome

SCRIPTS = ("--scripts=4", "--shots=2", "--blocks=2", "--first_seed=50")


@pytest.fixture
def evaluate(program, checkpoint, tmp_path):
  """`evaluate(NAME, *arguments)` writes the scores to NAME."""

  def run(name: str, *arguments: str) -> Outcome:
    weights, out = f"--config.io.checkpoint={checkpoint}", f"--out={tmp_path / name}"
    return program("evaluate", *TINY, weights, *SCRIPTS, out, *arguments)

  return run


@pytest.fixture
def report(evaluate, tmp_path) -> dict:
  done = evaluate("scores/a.json")
  assert done.code == 0, done.stderr
  found = json.loads((tmp_path / "scores/a.json").read_text())
  for name, value in found["score"].items():
    assert f"{name} {value}" in done.stdout.splitlines()
  return found


def test_the_report_says_what_was_scored(report):
  assert report["flags"] == {
    "scripts": 4,
    "first_seed": 50,
    "shots": 2,
    "blocks": 2,
    "changes": 0.0,
    "source": "model",
  }
  assert report["chance"]["shape"] < 1 and report["permuted"]["shots"] == 8
  assert report["score"]["shots"] == 8
  assert 0 <= report["score"]["score"] <= 1
  assert report["config"]["model"]["width"] == 24
  assert report["frames_per_second"] > 0
  assert len(report["results"]) == 4


def test_scores_are_those_of_the_scripts_videos(report, checkpoint):
  """Script 3 by hand: its captions, its seed, its place in the batch."""
  experiment = load_config(Path(checkpoint) / "config.json")
  frames = shapes.shot_frames([2, 2], experiment.model.block_latents)
  clip = shapes.sample_clip(np.random.default_rng(52), frames, experiment.video)
  script = Script(tuple(Shot(shot.caption(), 2) for shot in clip.shots), seed=52)
  video = np.concatenate(list(Pipeline.from_checkpoint(checkpoint).stream(script, first_index=2)))
  assert json.loads(json.dumps(score_clip(video, clip))) == report["results"][2]


def test_prompts_change_without_a_cut(evaluate, checkpoint, tmp_path):
  """Every border is a change: the sampler is told to keep the shot, the scorer to find no cut."""
  done = evaluate("kept.json", "--changes=1")
  assert done.code == 0, done.stderr
  found = json.loads((tmp_path / "kept.json").read_text())
  assert [len(result["changed"]) for result in found["results"]] == [1] * 4
  assert "cut" not in found["score"] and {"changed", "changed_error"} <= set(found["score"])
  experiment = load_config(Path(checkpoint) / "config.json")
  frames = shapes.shot_frames([2, 2], experiment.model.block_latents)
  clip = shapes.sample_clip(np.random.default_rng(51), frames, experiment.video, 1.0)
  shots = [Shot(shot.caption(), 2, transition="keep") for shot in clip.shots]
  made = importlib.import_module("launch.evaluate").to_script(clip, 51)
  assert made.shots[1:] == tuple(shots[1:]) and made.seed == 51
  done = evaluate("x.json", f"--against={tmp_path / 'kept.json'}")
  assert done.code == 2 and "--changes=1.0; only equal scripts can be paired" in done.stderr


def test_scripts_in_batches_score_the_same(report, evaluate, tmp_path):
  assert evaluate("b.json", "--batch=2").code == 0
  assert json.loads((tmp_path / "b.json").read_text())["results"] == report["results"]


def test_a_difference_is_paired(report, evaluate, tmp_path):
  other = tmp_path / "scores/a.json"
  changed = json.loads(other.read_text())
  for result in changed["results"]:
    result["score"] = [value - 0.25 for value in result["score"]]
    del result["changed"]  # as in files of before there were changes
  del changed["flags"]["changes"]
  (tmp_path / "worse.json").write_text(json.dumps(changed))
  done = evaluate("c.json", f"--against={tmp_path / 'worse.json'}")
  assert done.code == 0, done.stderr
  found = json.loads((tmp_path / "c.json").read_text())
  assert found["difference"]["score"] == pytest.approx(0.25)
  assert found["difference"]["score_error"] == pytest.approx(0.0, abs=1e-9)
  assert found["difference"]["colour"] == 0.0


@pytest.mark.parametrize("changes", [0, 1])
def test_controls_score_real_clips_with_and_without_the_vae(evaluate, tmp_path, changes):
  scores = {}
  for source in ("real", "vae"):
    done = evaluate(f"{source}.json", f"--source={source}", f"--changes={changes}")
    assert done.code == 0, done.stderr
    scores[source] = json.loads((tmp_path / f"{source}.json").read_text())["score"]["score"]
  assert scores["real"] > 0.9 > scores["vae"], "untrained, the VAE loses everything"


def test_low_precision_is_compared_with_the_same_model_without(evaluate, tmp_path, report):
  low = ("--config.quant.linears=nvfp4", "--unquantised")
  done = evaluate("low.json", *low)
  assert done.code == 0, done.stderr
  found = json.loads((tmp_path / "low.json").read_text())
  plain = found["unquantised"]
  assert plain["score"] == report["score"]
  expected = found["score"]["score"] - report["score"]["score"]
  assert plain["difference"]["score"] == pytest.approx(expected)
  assert 0 < plain["psnr"] < 100 and plain["psnr_error"] > 0 and plain["frames_per_second"] > 0


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--unquantised",), "set quant.linears or quant.cache"),
    (("--unquantised", "--config.quant.linears=nvfp4", "--source=vae"), "needs --source=model"),
  ],
)
def test_nothing_to_compare_with(evaluate, tmp_path, arguments, said):
  done = evaluate("x.json", *arguments)
  assert done.code == 2 and said in done.stderr and done.stderr.count("\n") == 1
  assert not (tmp_path / "x.json").exists()
