"""Adapters beside weights: which are taken for sampling, and what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import Pipeline, declare_networks, fresh_params
from longlive_jax.config.load import load_config, to_json
from longlive_jax.io.checkpoint import save_params
from longlive_jax.io.leaves import flat
from longlive_jax.model.lora import adapter_shapes, merge
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.types import PyTree
from longlive_jax.weights import find_adapters, with_adapters
from tests.launch.tiny import OVERRIDES

LORA = {"name": "student", "rank": 2, "alpha": 4.0}


def settings(root: Path, **changed: object):
  given = {name.replace("__", "."): value for name, value in changed.items()}
  return load_config(root / "configs/tiny.py", {**OVERRIDES, "io.checkpoint": "", **given})


def made(folder: Path, root: Path, params: dict[str, PyTree], about: dict, **changed: object):
  """A checkpoint in a folder; its name."""
  save_params(folder, params, json.loads(to_json(settings(root, **changed))), about)
  return str(folder)


@pytest.fixture(scope="module")
def stored(root, tmp_path_factory):
  """(base without adapters, its folder, adapters, their folder)."""
  experiment = settings(root)
  networks = declare_networks(experiment)
  params, place = fresh_params(experiment, networks), tmp_path_factory.mktemp("stored")
  shapes = adapter_shapes(networks["dit"].abstract, LORA["rank"])
  adapters = jax.tree.map(lambda a: 0.1 * jnp.ones(a.shape), shapes)
  beside = made(place / "lora", root, {"lora": adapters}, {"lora": LORA})
  base = made(place / "base", root, params, {"adapters_for_sampling": beside})
  return params["dit"], base, adapters, beside


def test_weights_are_sampled_with_the_adapters_that_they_name(root, stored):
  dit, base, adapters, beside = stored
  expected = flat(merge(dit, adapters, LORA["alpha"]))
  for chosen in ("auto", beside):
    experiment = settings(root, io__checkpoint=base, io__adapters=chosen)
    found = Pipeline.from_config(experiment).models.params["dit"]
    for name, leaf in flat(found).items():
      np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
  alone = Pipeline.from_config(settings(root, io__checkpoint=base, io__adapters=""))
  for name, leaf in flat(alone.models.params["dit"]).items():
    np.testing.assert_array_equal(leaf, flat(dit)[name], err_msg=name)


def test_on_a_mesh_too(root, stored):
  dit, base, adapters, _ = stored
  experiment, mesh = settings(root, io__checkpoint=base), make_mesh(1, seq=2)
  found = Pipeline.from_config(experiment, mesh=mesh).models.params["dit"]
  for ours, theirs in zip(
    jax.tree.leaves(found), jax.tree.leaves(merge(dit, adapters, LORA["alpha"])), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_what_cannot_be_merged(root, stored, tmp_path):
  dit, base, adapters, beside = stored
  network = declare_networks(settings(root))["dit"]

  def refused(line: str, **changed: object) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=line) as caught:
      with_adapters(find_adapters(settings(root, **changed)), network, dit)
    assert "\n" not in str(caught.value)

  refused("io.adapters='.*' needs io.checkpoint", io__adapters=beside)
  refused("io.adapters='nothing' is neither", io__checkpoint=base, io__adapters="nothing")
  refused("does not describe adapters", io__checkpoint=base, io__adapters=base)
  merged = made(tmp_path / "merged", root, {"dit": dit}, {"adapters": [LORA]})
  refused("has adapters merged in", io__checkpoint=merged, io__adapters=beside)
  other = made(tmp_path / "other", root, {"lora": adapters}, {"lora": {**LORA, "rank": 3}})
  refused(r"io.adapters='.*other': .* has shape \(24, 2\)", io__checkpoint=base, io__adapters=other)
  assert find_adapters(settings(root, io__checkpoint=merged)) is None
