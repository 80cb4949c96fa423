"""A batch split over eight devices: the same update as on one, with sums of gradients alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import build_models
from longlive_jax.config.load import load_config
from longlive_jax.eval.plan_trace import abstract_mesh
from longlive_jax.parallel.mesh import make_mesh, mesh_of, replicate, sampling_mesh, split_batch
from longlive_jax.train import clips
from longlive_jax.train.feed import draw_shapes
from longlive_jax.train.state import init_state, make_optimizer
from longlive_jax.train.step import make_step
from tests.launch.tiny import OVERRIDES

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


@pytest.mark.parametrize(
  ("batch", "seq", "devices"), [(8, 1, 8), (12, 1, 6), (3, 1, 3), (40, 1, 8), (3, 2, 6), (5, 4, 4)]
)
def test_as_many_devices_as_divide_the_batch(batch, seq, devices):
  assert make_mesh(batch, seq=seq).size == devices


def test_what_shares_a_block_in_sampling_may_not_share_a_clip_in_training(root):
  settings = {**OVERRIDES, "io.checkpoint": "", "parallel.seq": 2, "data.blocks": 3}
  experiment = load_config(root / "configs/tiny.py", settings)
  assert sampling_mesh(experiment).size == 2
  wrong = r"parallel\.seq=2 must divide model\.heads=2 and data\.blocks=3; use one of 1 \("
  for make in (mesh_of, lambda experiment: abstract_mesh(experiment, 2)):
    with pytest.raises(ValueError, match=wrong):
      make(experiment)


def test_a_batch_is_split_and_the_rest_is_on_every_device():
  mesh = make_mesh(16)
  kept = replicate(jnp.arange(3.0), mesh)
  split = jax.jit(lambda x: split_batch(x, mesh))(jnp.zeros((16, 5)))
  assert {shard.data.shape for shard in kept.addressable_shards} == {(3,)}
  assert {shard.data.shape for shard in split.addressable_shards} == {(2, 5)}


@pytest.fixture(scope="module")
def made(root):
  """Training states and compiled text of one step on one device and on eight."""
  settings = {**OVERRIDES, "io.checkpoint": "", "train.batch": 8, "train.warmup_steps": 0}
  shares = {"train.first_latent_share": 0.5, "train.prompt_dropout_share": 0.3}
  experiment = load_config(root / "configs/tiny.py", {**settings, **shares})
  models = build_models(experiment)
  optimizer = make_optimizer(experiment.train)

  def encode(_: None, video: jax.Array) -> jax.Array:  # stands for the VAE
    small = video[:, ::4].reshape(*video[:, ::4].shape[:2], 2, 16, 2, 16, 3).mean((3, 5))
    return jnp.concatenate([small, small[..., :1]], -1)

  bank = clips.make_bank(experiment, encode, None, models.tokenizer, group=4)
  found = {}
  for count in (1, 8):
    mesh = make_mesh(8, devices=jax.devices()[:count])
    params = jax.tree.map(jnp.array, models.params["dit"])
    state, clip_bank, text = replicate(
      (init_state(params, optimizer), bank, models.params["text"]), mesh
    )
    drawn = jax.jit(draw_shapes(experiment, models, mesh))(np.int32(0), clip_bank, text)
    compiled = make_step(experiment, models, optimizer, mesh).lower(state, drawn, None).compile()
    state, metrics, _ = compiled(state, drawn, None)
    found[count] = jax.device_get((metrics["loss"], state.params)), compiled.as_text()
  return found


def test_the_update_is_that_of_one_device(made):
  (loss, params), (loss_split, params_split) = made[1][0], made[8][0]
  np.testing.assert_allclose(loss_split, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_split), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)


def test_gradients_are_summed_and_nothing_else_moves(made):
  assert set(re.findall(COLLECTIVES, made[8][1])) == {"all-reduce"}
  assert not re.findall(COLLECTIVES, made[1][1])
