"""Clips and batches of stage "ar": what is dropped, given and turned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import build_models
from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.model.flow import training_table
from longlive_jax.parallel.mesh import make_mesh, replicate
from longlive_jax.sample.sampler import Models
from longlive_jax.sample.schedule import SampleState, Schedule
from longlive_jax.train import clips
from longlive_jax.train.feed import draw_shapes
from longlive_jax.train.step import Clips, draw_batch, keys_of
from longlive_jax.train.teacher_forcing import Batch
from tests.launch.tiny import OVERRIDES

SHARES = {
  "train.prompt_dropout_share": 0.3,
  "train.first_latent_share": 0.4,
  "train.batch": 400,
  "sample.relative_rope": False,
}


TABLE = training_table(3.0)


def draw(experiment: Experiment, models: Models, bank: clips.Bank) -> Clips:
  """What the step after three updates is given."""
  mesh = make_mesh(experiment.train.batch)
  text = replicate((bank, models.params["text"]), mesh)
  return jax.jit(draw_shapes(experiment, models, mesh))(np.int32(3), *text)


@pytest.fixture(scope="module")
def made(root) -> tuple[Experiment, Models, clips.Bank, Batch, tuple[jax.Array, jax.Array]]:
  settings = {**OVERRIDES, **SHARES, "io.checkpoint": "", "data.far_share": 0.5}
  experiment = load_config(root / "configs/tiny.py", settings)
  models = build_models(experiment)

  def encode(_: None, video: jax.Array) -> jax.Array:  # stands for the VAE
    small = video[:, ::4].reshape(*video[:, ::4].shape[:2], 2, 16, 2, 16, 3).mean((3, 5))
    return jnp.concatenate([small, small[..., :1]], -1)

  bank = clips.make_bank(experiment, encode, None, models.tokenizer, group=4)
  drawn = draw(experiment, models, bank)
  batch = draw_batch(experiment, TABLE, keys_of(0, 3), drawn)
  return experiment, models, bank, batch, (drawn.cos, drawn.sin)


def test_a_share_of_the_samples_sees_the_negative_prompt_in_all_blocks(made):
  experiment, models, _, batch, _ = made
  empty = models.text.bind(models.params["text"])(*models.tokenizer([""]))[0]
  prompts = batch.prompts.reshape(400, experiment.data.blocks, *empty.shape)
  blank = np.abs(np.asarray(prompts - empty)).max((2, 3)) < 1e-5
  assert (blank.all(1) == blank.any(1)).all()
  assert 0.22 < blank.all(1).mean() < 0.38


def test_a_share_of_the_samples_is_given_its_first_latent(made):
  batch = made[3]
  assert 0.32 < float(batch.given.mean()) < 0.48
  np.testing.assert_array_equal(batch.first, batch.clean[:, :1])


def test_rotations_and_latents_are_of_the_same_blocks(made):
  experiment, _, bank, batch, (cos, _) = made
  f = experiment.model.block_latents
  stored = {
    np.asarray(x, np.float32).tobytes(): (i, j)
    for i, row in enumerate(bank.latents)
    for j, x in enumerate(row)
  }
  for sample in range(0, 400, 23):
    for block in range(experiment.data.blocks):
      part = slice(block * f, (block + 1) * f)
      place = stored[np.asarray(batch.clean[sample, part]).tobytes()]
      np.testing.assert_array_equal(cos[sample, part], bank.cos[place])


def test_relative_positions_are_those_of_the_sampler_at_any_block(made, root):
  """What a late block sees stands side by side, as in the sampler's tables of its pass."""
  _, models, bank, *_ = made
  settings = {**OVERRIDES, "io.checkpoint": "", "sample.relative_rope": True, "train.batch": 4}
  relative = load_config(root / "configs/tiny.py", {**settings, "data.far_share": 1.0})
  drawn = draw(relative, models, bank)
  cos, sin = drawn.cos, drawn.sin
  schedule, states = Schedule.of(relative), (SampleState(),)
  for block in range(9):
    states, tables = schedule.enter(states, block, [block == 5])
    last = slice(-relative.model.block_latents, None)
    if tables.level == relative.data.blocks:
      for sample in range(4):
        np.testing.assert_allclose(cos[sample, last], tables.cos[0], atol=1e-6)
        np.testing.assert_allclose(sin[sample, last], tables.sin[0], atol=1e-6)
        order = np.argsort(states[0].slots.order())
        window = np.asarray(tables.window_cos)[0].reshape(tables.level, -1, cos.shape[-1])
        np.testing.assert_allclose(cos[sample], np.concatenate(window[order]), atol=1e-6)
    states, _ = schedule.settle(states, block, [block == 5])
  assert tables.level == relative.data.blocks
