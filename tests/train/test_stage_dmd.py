"""Runs of stage "dmd" at the smallest sizes: who is trained, and that they go on to the bit."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from longlive_jax.build import build_models
from longlive_jax.config.load import load_config
from longlive_jax.io.leaves import flat
from longlive_jax.io.metrics import read_metrics
from longlive_jax.model.lora import merge
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.train.stage_dmd import train_dmd
from longlive_jax.types import PyTree
from tests.launch.tiny import OVERRIDES

SETTINGS = {
  **OVERRIDES,
  "io.checkpoint": "",
  "model.dtype": "float32",
  "sample.steps": 2,
  "data.clips": 6,
  "data.blocks": 2,
  "data.clip_blocks": 3,
  "data.max_shots": 3,
  "train.batch": 4,
  "train.lr": 1e-3,
  "train.warmup_steps": 1,
  "train.steps": 4,
  "train.final_lr_fraction": 1.0,
  "train.remat": "full",
  "distill.rank": 2,
  "distill.alpha": 2.0,
  "distill.student_every": 2,
  "distill.critic_lr": 1e-3,
  "distill.attached_cache": True,
  "distill.clean_history": False,
  "distill.guidance": 3.0,
  "io.checkpoint_every_steps": 100,
  "io.log_every_steps": 1,
}


def distil(
  root: Path, folder: Path, devices: int = 1, shake: float = 0.05, **settings: Any
) -> tuple[PyTree, PyTree, PyTree]:
  """(base, merged student, adapters) of a run; `settings` with two underscores for dots."""
  changed = {name.replace("__", "."): value for name, value in settings.items()}
  experiment = load_config(root / "configs/tiny.py:dmd", {**SETTINGS, **changed})
  mesh = mesh_of(experiment, jax.devices()[:devices])
  models = build_models(experiment, mesh, narrow=True, plain=True)
  models.params["dit"] = jax.tree.map(  # fresh heads are 0, and so would be all gradients
    lambda a: a + shake * jax.random.normal(jax.random.key(a.size), a.shape), models.params["dit"]
  )
  base = jax.device_get(models.params["dit"])
  merged, adapters = train_dmd(experiment, models, folder, mesh)
  assert set(models.params) == {"text", "vae"}  # which the result is saved with
  return base, jax.device_get(merged), adapters


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  return folder, distil(root, folder)


def test_the_student_moves_when_it_is_its_turn_and_the_critic_always(whole):
  lines = read_metrics(whole[0])
  sizes = [line["student_grad_norm"] for line in lines]
  assert sizes[0] == sizes[1] != sizes[2] == sizes[3] and min(sizes) > 0
  assert len({line["grad_norm"] for line in lines}) == 4
  assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)


def test_the_result_is_the_base_with_the_averaged_adapters(whole):
  base, merged, adapters = whole[1]
  expected = merge(base, adapters, 2.0)
  for name, leaf in flat(jax.device_get(expected)).items():
    np.testing.assert_array_equal(flat(merged)[name], leaf, err_msg=name)
  moved = {n for n, a in flat(merged).items() if not np.array_equal(a, flat(base)[n])}
  assert moved and all(name.startswith("layers/") and name.endswith("/kernel") for name in moved)


def test_a_run_goes_on_to_the_bit(root, whole, tmp_path):
  distil(root, tmp_path, train__steps=2)
  *_, adapters = distil(root, tmp_path)
  for ours, theirs in zip(jax.tree.leaves(adapters), jax.tree.leaves(whole[1][2]), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  ours, theirs = ([line["loss"] for line in read_metrics(f)] for f in (tmp_path, whole[0]))
  assert ours == theirs


def test_a_batch_may_be_split_over_devices(root, whole, tmp_path):
  distil(root, tmp_path, devices=4, train__steps=2)
  for ours, theirs in zip(read_metrics(tmp_path), read_metrics(whole[0])[:2], strict=True):
    for name in ("loss", "student_loss", "grad_norm"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    # the direction is the difference of two networks that start as one: 1.1e-5 was seen
    name = "student_grad_norm"
    assert ours[name] == pytest.approx(theirs[name], rel=5e-5)


# five blocks in four slots, without a sink; half of the samples are given their first latent
LONG = {
  "model__heads": 4,
  "model__layers": 1,
  "model__block_latents": 4,
  "data__blocks": 5,
  "data__clip_blocks": 5,
  "distill__trained_blocks": 1,
  "distill__clean_history": True,
  "sample__window_latents": 16,
  "sample__sink_latents": 0,
  "train__batch": 2,
  "train__first_latent_share": 0.5,
  "train__steps": 1,
}


@pytest.fixture(scope="module")
def long(root, tmp_path_factory):
  folder = tmp_path_factory.mktemp("long")
  distil(root, folder, shake=0.2, **LONG)
  return read_metrics(folder)


def test_clips_longer_than_the_window_are_trained_on(long):
  """Teacher and critic see what the window shows: a pinned block and the newest ones."""
  assert long[0]["student_grad_norm"] > 1e-3 and np.isfinite(long[0]["loss"])


@pytest.mark.parametrize("seq", [2, 4])
def test_a_clip_may_be_shared_by_devices(root, long, tmp_path, seq):
  """Two samples a group of devices."""
  distil(root, tmp_path, devices=seq, shake=0.2, parallel__seq=seq, **LONG)
  (ours,) = read_metrics(tmp_path)
  for name in ("loss", "grad_norm", "student_loss", "student_direction", "student_grad_norm"):
    assert ours[name] == pytest.approx(long[0][name], rel=1e-5), name


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"data.pad": True}, "data.pad=True is for train.stage=ar"),
    ({"distill.quantised": ("pupil",)}, "distill.quantised='pupil'"),
    ({"quant.linears": "fp8"}, "quant.linears=fp8 has no gradients"),
    ({"sample.guidance": 2.0}, "sample.guidance=2.0 is of a student"),
    ({"distill.trained_blocks": 3}, "distill.trained_blocks=3 must be at most data.blocks=2"),
    ({"data.blocks": 4, "data.clip_blocks": 4}, "trained_blocks=0 .* at least 1 and at most 1 can"),
    ({"distill.rank": 0}, "distill.rank=0 must be at least 1"),
    ({"distill.rank": 25}, "distill.rank=25 must be at most model.width=24"),
    ({"distill.layers": ("(",)}, "no regular expression"),
    (
      {"distill.layers": ("layers/ffn/.*", "nothing")},
      "distill.layers has 'nothing', which matches no layer; the layers are head/proj",
    ),
    ({"parallel.fsdp": 2}, "parallel.fsdp=2 is for train.stage=ar"),
    ({"parallel.seq": 2, "data.blocks": 3}, "parallel.seq=2 must divide.*the 3 blocks that are"),
    ({"parallel.seq": 2, "parallel.layout": "plain"}, "takes parallel.layout=balanced"),
    ({"quant.cache": "nvfp4", "model.width": 32}, "quant.cache=none"),
  ],
)
def test_settings_that_do_not_fit_are_refused(root, settings, message):
  with pytest.raises(ValueError, match=message):
    mesh_of(load_config(root / "configs/tiny.py:dmd", {**SETTINGS, **settings}))
