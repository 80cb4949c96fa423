"""Parameters that wait in host memory: same numbers, and back on the devices when used."""

import jax
import numpy as np
import pytest

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
from longlive_jax.parallel.mesh import make_mesh, replicate
from longlive_jax.parallel.parked import DEVICE, HOST, at_hand, parked
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


def test_prompts_are_the_same_with_a_parked_encoder(root):
  made = []
  for park in (False, True):
    overrides = {**OVERRIDES, "io.checkpoint": "", "model.text.parked": park}
    pipeline = Pipeline.from_config(load_config(root / "configs/tiny.py", overrides))
    assert kinds(pipeline.models.params["text"]) == {HOST if park else DEVICE}
    assert kinds(pipeline.models.params["dit"]) == {DEVICE}
    made.append(pipeline.embed(PROMPT))
    assert kinds(pipeline.models.params["text"]) == {HOST if park else DEVICE}
  np.testing.assert_array_equal(*made)
