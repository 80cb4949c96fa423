"""A video is the same wherever its weights are: on one device or another, or on all of them."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from longlive_jax.data.prompts import Script, Shot
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.parallel.rules import RULES, shardings_of
from longlive_jax.sample.sampler import Models, Sampler
from tests.sample.compiles import counting
from tests.sample.tiny import experiment, models

SCRIPT = Script((Shot("one", blocks=2), Shot("two", blocks=2), Shot("three", 1, None, "recache")))


@pytest.fixture(scope="module")
def parts() -> Models:
  return models(experiment(window_latents=4, pin_shots=False))


@pytest.fixture(scope="module")
def expected(parts: Models) -> tuple[np.ndarray, np.ndarray]:
  return run(Sampler(parts))


def run(sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
  """Latents and frames."""
  latents = [np.asarray(block) for block in sampler.latent_blocks([SCRIPT])]
  return np.concatenate(latents, 1), sampler.generate(SCRIPT)


def all_devices() -> Sharding:
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec())


PLACES = {"another device": lambda: SingleDeviceSharding(jax.devices()[3]), "all": all_devices}


@pytest.fixture(scope="module", params=PLACES)
def placed(parts: Models, request: pytest.FixtureRequest) -> tuple[Sampler, Sharding]:
  sharding = PLACES[request.param]()
  there = Sampler(dataclasses.replace(parts, params=jax.device_put(parts.params, sharding)))
  there.prepare()
  return there, sharding


def test_weights_elsewhere_give_the_same_video(
  placed: tuple[Sampler, Sharding], expected: tuple[np.ndarray, np.ndarray]
):
  with counting() as counts:
    latents, frames = run(placed[0])
    again = next(placed[0].latent_blocks([SCRIPT], prefix=latents))
  assert not counts
  np.testing.assert_array_equal(latents, expected[0])
  np.testing.assert_array_equal(frames, expected[1])
  np.testing.assert_array_equal(again, latents[:, :2])


def test_the_cache_and_the_latents_are_where_the_weights_are(placed: tuple[Sampler, Sharding]):
  sampler, sharding = placed
  assert sampler.prepare().engine.start().caches[0].k.devices() == sharding.device_set
  assert next(sampler.latent_blocks([SCRIPT])).devices() == sharding.device_set


def test_weights_that_are_split_over_a_mesh_give_the_same_video(
  parts: Models, expected: tuple[np.ndarray, np.ndarray]
):
  """Every device works on all of the video and holds a part of the weights."""
  mesh = make_mesh(1, fsdp=1, seq=2, devices=jax.devices()[:2])
  split = {n: jax.device_put(p, shardings_of(p, RULES[n], mesh)) for n, p in parts.params.items()}
  kernel = split["dit"]["layers"]["ffn"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.nbytes * 2 == kernel.nbytes
  there = Sampler(dataclasses.replace(parts, params=split))
  there.prepare()
  with counting() as counts:
    latents, frames = run(there)
  assert not counts
  np.testing.assert_allclose(latents, expected[0], atol=1e-4)
  assert np.abs(frames.astype(int) - expected[1]).max() <= 1
