"""A rollout has no longest length: nothing grows, nothing compiles, positions stay exact."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.sample.rollout import Engine
from longlive_jax.types import PyTree
from tests.sample.tiny import BLOCK, engine, experiment

LATENTS = 1040  # the original's table of positions ends at 1024
ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
PROMPT = RNG.standard_normal((1, 24, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def made() -> tuple[Engine, PyTree]:
  config = experiment(window_latents=4, sink_latents=0, pin_shots=False, shot_offset_latents=0.0)
  return engine(config)


def roll(made: tuple[Engine, PyTree], first: int, noise: np.ndarray) -> np.ndarray:
  """Latents of a rollout whose first block has index `first`."""
  rollout, params = made
  texts = (rollout.text_kv(params, PROMPT),)
  known, mask = np.zeros(rollout.block_shape, np.float32), np.zeros((1, BLOCK), bool)
  state, outs = dataclasses.replace(rollout.start(), block=first), []
  for value in noise:
    latents, state = rollout.next_block(params, state, value, texts, [False], known, mask)
    outs.append(np.asarray(latents))
  return np.concatenate(outs, 1)


@pytest.mark.parametrize("first", [LATENTS // BLOCK, 10**6])
def test_only_distances_matter_however_far_the_video_has_come(
  made: tuple[Engine, PyTree], first: int
):
  noise = RNG.standard_normal((6, 1, BLOCK, 2, 4, 4)).astype(np.float32)
  np.testing.assert_allclose(roll(made, first, noise), roll(made, 0, noise), atol=1e-5, rtol=1e-5)


def test_a_rollout_goes_on_beyond_the_original_limit(made: tuple[Engine, PyTree]):
  noise = RNG.standard_normal((LATENTS // BLOCK, 1, BLOCK, 2, 4, 4)).astype(np.float32)
  latents = roll(made, 0, noise)
  assert latents.shape[1] == LATENTS and np.isfinite(latents).all()
  early, late = latents[0, :128], latents[0, -128:]
  assert 0.8 < np.std(late) / np.std(early) < 1.25


def test_memory_and_compilations_do_not_depend_on_the_length():
  lengths = [f"--latents={n}" for n in (64, LATENTS)]
  command = [sys.executable, "-m", "tests.sample.long_rollout", "--smallest", *lengths]
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  short, long = (json.loads(line) for line in done.stdout.splitlines())
  assert (short["frames"], long["frames"]) == (4 * 64 - 3, 4 * LATENTS - 3)
  for run in (short, long):
    assert run["compilations"] == run["traces"] == 0
  assert long["peak"] < 1.05 * short["peak"]
  assert long["late"] < 1.05 * long["early"]
  assert long["arrays"] < 1.05 * short["arrays"]
