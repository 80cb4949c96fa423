"""Whole runs of stage "ar" at the smallest sizes: they go on to the bit, and on any mesh."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from longlive_jax.build import build_models
from longlive_jax.config.load import load_config
from longlive_jax.io.metrics import read_metrics
from longlive_jax.io.train_checkpoint import TrainCheckpointer
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.train.stage_ar import train_ar
from longlive_jax.types import PyTree
from tests.launch.tiny import OVERRIDES

STEPS = 6
SETTINGS = {
  **OVERRIDES,
  "io.checkpoint": "",
  "model.dtype": "float32",
  "data.blocks": 2,
  "data.clip_blocks": 3,
  "data.max_shots": 3,
  "data.far_share": 0.0,
  "train.batch": 4,
  # Adam turns the rounding of a gradient that vanishes into a whole step of lr: at 1.5e-3 the
  # curves of two meshes part by 1.1e-5 in these steps
  "train.lr": 3e-4,
  "train.steps": STEPS,
  "train.final_lr_fraction": 1.0,
  "train.ema_start_step": 2,
  "train.first_latent_share": 0.3,
  "train.prompt_dropout_share": 0.2,
  "train.remat": "attention",
  "train.recycling.enabled": True,
  "train.recycling.clean_share": 0.1,
  "train.recycling.noise_share": 0.5,
  "parallel.fsdp": 2,
  "parallel.seq": 2,
  "io.checkpoint_every_steps": 100,
}


def train(root: Path, folder: Path, devices: int = 8, **settings: Any) -> PyTree:
  """Runs the stage on so many devices; `settings` with two underscores for dots."""
  changed = {name.replace("__", "."): value for name, value in settings.items()}
  experiment = load_config(root / "configs/tiny.py:ar", {**SETTINGS, **changed})
  mesh = mesh_of(experiment, jax.devices()[:devices])
  return jax.device_get(train_ar(experiment, build_models(experiment, mesh), folder, mesh))


def losses(folder: Path) -> list[float | None]:
  return [line["loss"] for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> tuple[Path, PyTree]:
  """A run on eight devices that nothing disturbs, and the weights it ends with."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, train(root, folder)


@pytest.fixture(scope="module")
def half(root, tmp_path_factory) -> Path:
  """The first half of the same run."""
  folder = tmp_path_factory.mktemp("half")
  train(root, folder, train__steps=STEPS // 2)
  return folder


def copied(half: Path, folder: Path) -> Path:
  """A run of its own that goes on from the half."""
  import shutil

  shutil.copytree(half, folder, dirs_exist_ok=True)
  return folder


def test_errors_are_recycled(whole):
  lines = read_metrics(whole[0])
  assert lines[0]["recycling/latents_error"] == 0 and lines[0]["recycling/kept"] == 0
  assert sum(line["recycling/latents_error"] for line in lines) >= 2
  assert sum(line["recycling/context_error"] for line in lines) >= 2
  assert lines[-1]["recycling/kept"] >= 16 and lines[-1]["recycling/rms"] > 0


def test_a_run_goes_on_to_the_bit(root, whole, half, tmp_path):
  """Parameters, average, keys, the banks, and errors that were on their way into them."""
  params = train(root, copied(half, tmp_path))
  assert losses(tmp_path) == losses(whole[0])
  jax.tree.map(np.testing.assert_array_equal, params, whole[1])
  saved = []
  for folder in (tmp_path, whole[0]):
    with TrainCheckpointer(folder / "checkpoints", 1, 1) as checkpointer:
      saved.append(checkpointer.latest_arrays())
      assert checkpointer.latest_extra()["samples"] == STEPS * 4
  assert saved[0].keys() == saved[1].keys() and "latents/errors" in saved[0]
  jax.tree.map(np.testing.assert_array_equal, *saved)


@pytest.mark.parametrize(
  ("devices", "settings"),
  [
    (4, {}),
    (1, {"parallel__fsdp": 1, "parallel__seq": 1}),
    (8, {"parallel__fsdp": 1, "parallel__layout": "plain", "train__accumulate": 2}),
  ],
)
def test_a_run_goes_on_over_another_mesh(root, whole, half, tmp_path, devices, settings):
  train(root, copied(half, tmp_path), devices, **settings)
  np.testing.assert_allclose(losses(tmp_path), losses(whole[0]), rtol=1e-5)


def test_videos_made_on_the_way_change_nothing(root, whole, tmp_path):
  """In the original, a rollout changes which text the next training steps see."""
  params = train(root, tmp_path, io__evaluate_every_steps=3)
  assert len(list((tmp_path / "videos").rglob("*.mp4"))) == 4
  assert losses(tmp_path) == losses(whole[0])
  jax.tree.map(np.testing.assert_array_equal, params, whole[1])


def test_a_batch_in_parts_is_the_batch(root, tmp_path):
  """With weights of the loss that differ between the parts, and noise on the context."""
  found = []
  for parts in (1, 2):
    folder = tmp_path / str(parts)
    changes = {"train__accumulate": parts, "parallel__fsdp": 1, "train__context_noise": 200.0}
    params = train(root, folder, train__steps=2, train__recycling__enabled=False, **changes)
    found.append((losses(folder), params))
  np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
  for ours, theirs in zip(*(jax.tree.leaves(params) for _, params in found), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_bank_of_another_run_is_not_taken(root, half, tmp_path):
  """What a bank holds is of one model: its settings are part of the run."""
  with pytest.raises(ValueError, match=r"train.recycling.buckets=50, not 10"):
    train(root, copied(half, tmp_path), train__recycling__buckets=10)
