"""The two stages one after the other, as programs; their result serves everything else."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
from longlive_jax.data.prompts import Script
from longlive_jax.io.checkpoint import read_metadata
from longlive_jax.io.leaves import flat
from longlive_jax.io.metrics import read_metrics
from tests.launch.tiny import SIZES, TINY, Outcome, Program

VAE = ("--config=configs/tiny.py:vae", *SIZES)
STEPS = {"vae": 3, "ar": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tmp_path_factory.mktemp("trained")


def train(program: Program, folder: Path, stage: str, *arguments: str) -> Outcome:
  """Trains a stage for a few steps; "ar" goes on from the result of "vae"."""
  base = VAE if stage == "vae" else (*TINY, f"--config.io.checkpoint={folder}/vae/params")
  steps = (f"--config.train.steps={STEPS[stage]}", "--config.io.checkpoint_every_steps=12")
  return program("train", *base, *steps, f"--workdir={folder / stage}", *arguments)


@pytest.fixture
def trained(program: Program, folder: Path) -> Path:
  """The weights of both stages."""
  for stage in ("vae", "ar"):
    if not (folder / stage).is_dir():
      done = train(program, folder, stage)
      assert done.code == 0, done.stderr
      assert f"{folder / stage / 'params'}: weights after {STEPS[stage]} steps" in done.stdout
      vae = f"weights of '{folder}/vae/params': dit, vae, text"
      assert (vae if stage == "ar" else "fresh weights") in done.stdout
      assert done.stderr == ""
  return folder / "ar" / "params"


def test_a_stage_leaves_weights_metrics_and_a_checkpoint_of_its_last_step(trained, folder):
  for stage, loss in (("vae", "psnr"), ("ar", "loss")):
    lines = read_metrics(folder / stage)
    assert [line["step"] for line in lines] == list(range(1, STEPS[stage] + 1))
    assert all(np.isfinite(line[loss]) for line in lines)
    saved = {int(path.name) for path in (folder / stage / "checkpoints").iterdir()}
    assert saved == ({3} if stage == "vae" else {36, 48, 60})
    assert read_metadata(folder / stage / "params") == {"stage": stage, "steps": STEPS[stage]}
    config = load_config(folder / stage / "config.json")
    weights = {"io.checkpoint": str(folder / stage / "params")}
    assert load_config(folder / stage / "params" / "config.json") == load_config(
      folder / stage / "config.json", weights
    )
    assert (config.train.stage, config.train.steps, config.model.width) == (stage, STEPS[stage], 24)


def weights(folder: Path) -> dict[str, jax.Array]:
  return flat(Pipeline.from_checkpoint(folder).models.params)


def test_a_stage_changes_its_own_network_only(trained, folder):
  before, after = weights(folder / "vae" / "params"), weights(trained)
  changed = {n for n in before if not np.array_equal(before[n], after[n])}
  assert changed and {name.partition("/")[0] for name in changed} == {"dit"}
  assert all(np.isfinite(value).all() for value in after.values())
  assert np.asarray(after["vae/latent_std"]).min() > 0


def test_the_result_makes_videos(trained, program, tmp_path):
  script, out = tmp_path / "script.json", tmp_path / "frames"
  script.write_text(json.dumps({"seed": 3, "shots": [{"prompt": "a", "blocks": 2}]}))
  weights = f"--config.io.checkpoint={trained}"
  done = program("sample", *TINY, weights, f"--script={script}", f"--out={out}")
  assert done.code == 0, done.stderr
  frames = Pipeline.from_checkpoint(trained).generate(Script.of("a", blocks=2, seed=3))
  assert frames.shape == (13, 32, 32, 3)
  for number, frame in enumerate(frames):
    np.testing.assert_array_equal(np.asarray(Image.open(out / f"{number:05d}.png")), frame)


def test_the_configuration_of_the_result_is_all_that_is_needed(trained, program, tmp_path):
  config, out = f"--config={trained}/config.json", f"--out={tmp_path / 'score.json'}"
  done = program("evaluate", config, out, "--scripts=2", "--shots=1", "--blocks=1")
  assert done.code == 0, done.stderr
  report = json.loads((tmp_path / "score.json").read_text())
  assert report["config"]["io"]["checkpoint"] == str(trained)
  assert report["config"]["model"]["width"] == 24


def test_a_finished_run_says_so(trained, program, folder):
  result = folder / "ar" / "params"
  before = {path: path.stat().st_mtime_ns for path in result.rglob("*")}
  done = train(program, folder, "ar")
  assert (done.code, done.stderr) == (0, "")
  assert "nothing to do: 60 steps are done, train.steps=60" in done.stdout
  assert {path: path.stat().st_mtime_ns for path in result.rglob("*")} == before


def test_a_result_that_is_missing_is_made_from_the_last_checkpoint(trained, program, folder):
  before = weights(trained)
  trained.rename(folder / "aside")
  done = train(program, folder, "ar")
  assert done.code == 0, done.stderr
  assert "nothing to do" in done.stdout
  jax.tree.map(np.testing.assert_array_equal, weights(trained), before)


@pytest.mark.parametrize("removed", ["all", "dit"])
def test_weights_that_are_missing_in_a_result_are_written_again(
  trained, program, folder, removed, tmp_path
):
  run, whole = folder / "ar", weights(trained)
  try:
    trained.rename(tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", trained)
    for name in ("dit", "text", "vae") if removed == "all" else (removed,):
      shutil.rmtree(trained / name)
    done = train(program, folder, "ar")
    assert done.code == 0 and f"{trained}: weights after 60 steps" in done.stdout, done.stderr
    jax.tree.map(np.testing.assert_array_equal, weights(trained), whole)
  finally:
    shutil.rmtree(trained)
    (tmp_path / "aside").rename(run / "params")


@pytest.mark.parametrize(
  ("removed", "lacks"), [("config.json", "config.json"), ("dit/000", "dit"), ("text/*/*", "text")]
)
def test_a_result_that_is_not_replaced_says_what_it_lacks(
  trained, program, folder, removed, lacks, tmp_path
):
  shutil.copytree(folder / "ar", tmp_path / "ar")
  for path in (tmp_path / "ar" / "params").glob(removed):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  weights_of_vae = f"--config.io.checkpoint={folder}/vae/params"
  done = train(program, tmp_path, "ar", weights_of_vae)
  if removed == "text/*/*":  # its folders are there, so it is a checkpoint, and is replaced
    assert done.code == 0, done.stderr
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "ar/params"), weights(trained))
  else:
    assert done.code == 2 and done.stderr.count("\n") == 1
    assert f"params' is not whole: it lacks {lacks}; remove what is left" in done.stderr


def test_a_distilled_result_is_whole_with_its_adapters_only(trained, tmp_path):
  is_result = sys.modules["launch.train"].is_result
  shutil.copytree(trained, tmp_path / "params")
  assert is_result(tmp_path, "ar", 60) and not is_result(tmp_path, "ar", 59)
  assert not is_result(tmp_path, "dmd", 60)
  shutil.copytree(trained, tmp_path / "adapters")
  assert not is_result(tmp_path, "dmd", 60)
  (tmp_path / "adapters" / "dit").rename(tmp_path / "adapters" / "lora")
  assert is_result(tmp_path, "dmd", 60)
  shutil.rmtree(tmp_path / "adapters" / "lora" / "000")
  assert not is_result(tmp_path, "dmd", 60)


def test_another_configuration_in_the_same_workdir(trained, program, folder):
  done = train(program, folder, "ar", "--config.model.width=48")
  assert done.code == 2
  assert "model.width=24, not 48" in done.stderr and done.stderr.count("\n") == 1
  assert load_config(folder / "ar" / "config.json").model.width == 24


def test_a_killed_training_ends_as_if_nothing_had_been(trained, program, folder, tmp_path):
  config = (f"--config={folder / 'ar' / 'config.json'}", f"--workdir={tmp_path}")
  command = [sys.executable, "-m", "launch.train", *config]
  child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  lines = tmp_path / "metrics.jsonl"
  while child.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 30):
    time.sleep(0.002)
  child.kill()
  assert child.communicate()[1] == ""
  assert child.returncode == -signal.SIGKILL
  assert not (tmp_path / "params").exists()
  assert program("train", *config).code == 0
  loss = [[(x["step"], x["loss"]) for x in read_metrics(f)] for f in (tmp_path, folder / "ar")]
  assert loss[0] == loss[1]
  jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "params"), weights(trained))
