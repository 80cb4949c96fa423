"""Parameters that wait in host memory: same numbers, and back on the devices when used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import Pipeline, build_models
from longlive_jax.config.load import load_config
from longlive_jax.model.text import declare_text
from longlive_jax.parallel.mesh import make_mesh, replicate
from longlive_jax.parallel.parked import DEVICE, HOST, at_hand, in_pieces, parked
from longlive_jax.sample.sampler import Sampler
from tests.launch.tiny import OVERRIDES

PROMPT = "one red circle moving right, over snow"


def kinds(tree) -> set[str]:
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def tree():
  mesh = make_mesh(8)
  drawn = {"a": np.arange(24.0, dtype=np.float32).reshape(8, 3), "b": np.ones(5, np.float32)}
  return mesh, replicate(drawn, mesh)


def test_parked_and_back(tree):
  _, here = tree
  there = parked(here)
  assert kinds(here) == {DEVICE}
  assert kinds(there) == {HOST}
  back = at_hand(there)
  assert kinds(back) == {DEVICE}
  jax.tree.map(np.testing.assert_array_equal, back, here)
  same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), back, here)
  assert all(jax.tree.leaves(same))


def test_what_is_on_the_devices_is_not_copied(tree):
  _, here = tree
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (here, at_hand(here))), strict=True))


def test_placing_parked_parameters_brings_them_back(tree):
  """As training does for each batch of prompts."""
  mesh, here = tree
  assert kinds(replicate(parked(here), mesh)) == {DEVICE}


def test_a_stack_of_layers_is_parked_in_pieces():
  stack = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.arange(6)}
  norm = jnp.ones(2)
  made = in_pieces({"embedding": jnp.eye(3), "layers": stack, "norm": norm}, layers=4)
  assert [len(piece["b"]) for piece in made["layers"]] == [2, 2, 2]  # 2 divides 4 and 6
  assert kinds(made["layers"]) == {HOST}
  assert isinstance(made["embedding"], np.ndarray)
  assert made["norm"] is norm
  joined = jax.tree.map(lambda *parts: np.concatenate(parts), *made["layers"])
  jax.tree.map(np.testing.assert_array_equal, joined, stack)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_are_the_same_with_a_parked_encoder(root, dtype):
  made = []
  for park in (False, True):
    changes = {"model.text.parked": park, "model.text.dtype": dtype, "model.text.layers": 4}
    changes |= {"io.checkpoint": ""}
    config = load_config(root / "configs/tiny.py", OVERRIDES | changes)
    pipeline = Pipeline.from_config(config)
    layers = pipeline.models.params["text"]["layers"]
    assert kinds(layers) == {HOST if park else DEVICE}
    assert isinstance(layers, list) == park
    assert kinds(pipeline.models.params["dit"]) == {DEVICE}
    made.append(pipeline.embed(PROMPT))
    assert kinds(layers) == {HOST if park else DEVICE}
  np.testing.assert_array_equal(*made)


def test_a_sampler_takes_parked_parameters_that_are_whole(root):
  """As those of a training run that is evaluated."""
  pipeline = Pipeline.from_config(
    load_config(root / "configs/tiny.py", OVERRIDES | {"io.checkpoint": ""})
  )
  models, there = pipeline.models, parked(pipeline.models.params["text"])
  sampler = Sampler(dataclasses.replace(models, params={**models.params, "text": there}))
  np.testing.assert_array_equal(sampler.embed(PROMPT), pipeline.embed(PROMPT))


def test_training_parks_the_encoder_whole(root):
  changes = {"io.checkpoint": "", "model.text.parked": True}
  experiment = load_config(root / "configs/tiny.py", OVERRIDES | changes)
  text = build_models(experiment, narrow=True).params["text"]
  assert kinds(text) == {HOST}
  declared = declare_text(experiment.model.text).abstract
  assert jax.tree.structure(text) == jax.tree.structure(declared)
