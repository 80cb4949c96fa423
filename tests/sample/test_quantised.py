"""Sampling with quantised linear layers and a quantised cache: near the plain one, same rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import build_models
from longlive_jax.config import Experiment, Quant
from longlive_jax.config.load import from_flags, from_json, to_json
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.model.dit import declare_dit, separate_layers
from longlive_jax.quant.kv import QuantisedKVCache
from longlive_jax.quant.policy import quantise_params
from longlive_jax.sample.block import stored_in
from longlive_jax.sample.sampler import Sampler
from tests.sample.tiny import experiment, shaken

FULL = {"linears": "nvfp4", "cache": "nvfp4", "cache_smoothing": "tokens"}
SCRIPT = Script((Shot("a", 4), Shot("b", 3), Shot("c", 1, transition="recache")), seed=1)


def quantised(**settings: str) -> Experiment:
  """The smallest experiment with heads of 16 channels and these quantisations."""
  config = from_json(to_json(experiment(window_latents=6)))
  config.model.width, config.quant = 32, Quant(**settings)
  return from_flags(config)


@functools.cache
def video_of(**settings: str) -> tuple[np.ndarray, Sampler]:
  """Latents of the script, and the sampler that made them."""
  config = quantised(**settings)
  models = build_models(config)
  dit = quantise_params(shaken(models.params["dit"], scale=0.3), config.quant)
  sampler = Sampler(dataclasses.replace(models, params={**models.params, "dit": dit}))
  return np.concatenate([np.asarray(x) for x in sampler.latent_blocks([SCRIPT])], 1), sampler


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
  return video_of()[0]


@pytest.mark.parametrize(
  "settings",
  [
    FULL,
    {"cache": "nvfp4"},
    {"cache": "fp8"},
    {"linears": "fp8", "cache": "fp8"},
  ],
)
def test_a_quantised_video_is_near_the_plain_one(plain: np.ndarray, settings: dict[str, str]):
  video, sampler = video_of(**settings)
  cache = sampler.prepare().engine.start().caches[0]
  if settings["cache"] == "fp8":
    assert cache.k.dtype == cache.v.dtype == jnp.float8_e4m3fn
  else:
    assert isinstance(cache, QuantisedKVCache)
  assert video.shape == plain.shape and np.isfinite(video).all()
  relative = np.linalg.norm(video - plain) / np.linalg.norm(plain)
  assert 1e-5 < relative < 0.3
  if settings == {"cache": "nvfp4"}:  # the first block has seen no cache
    np.testing.assert_allclose(video[:, :2], plain[:, :2], atol=1e-5)


@pytest.mark.parametrize("settings", [FULL, {}])
def test_separate_layers_make_the_same_video(settings: dict[str, str]):
  stacked, sampler = video_of(**settings)
  models = sampler.models
  network = declare_dit(sampler.experiment.model, unrolled=True)
  params = {**models.params, "dit": separate_layers(models.params["dit"])}
  assert jax.tree.map(jnp.shape, params["dit"]["layers"][1]["self_attn"]["norm_q"]) == {
    "scale": (32,)
  }
  other = Sampler(dataclasses.replace(models, dit=network, params=params))
  video = np.concatenate([np.asarray(x) for x in other.latent_blocks([SCRIPT])], 1)
  assert len(other.prepare().engine.start().caches[0]) == sampler.experiment.model.layers
  np.testing.assert_allclose(video, stacked, atol=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"linears": "nvfp5"}, r"quant\.linears='nvfp5' must be one of"),
    ({"weights": "mes"}, r"quant\.weights='mes' must be one of .* \(did you mean 'mse'\?\)"),
    ({"weight_blocks": "8x8"}, r"quant\.weight_blocks='8x8' must be one of"),
    ({"gradient_rounding": "up"}, r"quant\.gradient_rounding='up' must be one of"),
    ({"cache_smoothing": "all"}, r"quant\.cache_smoothing='all' must be one of"),
    ({"layers": ("layers/(",)}, r"quant\.layers has 'layers/\(', which is no regular expression"),
  ],
)
def test_wrong_settings_are_named(settings: dict[str, str], message: str):
  with pytest.raises(ValueError, match=message):
    quantised(**settings)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("attention", ["auto", "fp8"])
def test_keys_in_fp8_are_read_as_attention_takes_them(attention: str, relative: bool):
  """In FP8 for FP8 attention, but for keys that are turned each time they are read."""
  config = from_json(to_json(experiment(relative_rope=relative)))
  config.model.attention, config.quant = attention, Quant(cache="fp8")
  as_they_are = attention == "fp8" and not relative
  assert stored_in(config) == ("float8_e4m3fn", "" if as_they_are else config.model.dtype)


def test_a_cache_needs_heads_of_whole_blocks():
  config = from_json(to_json(experiment()))
  config.quant = Quant(cache="nvfp4")
  with pytest.raises(ValueError, match=r"quant\.cache=nvfp4 needs heads of a multiple of 16"):
    from_flags(config)


def test_the_original_smoothing_needs_rotated_keys():
  config = from_json(to_json(experiment(relative_rope=True)))
  config.model.width, config.quant = 32, Quant(cache="nvfp4", cache_smoothing="original")
  with pytest.raises(ValueError, match=r"sample\.relative_rope=False"):
    from_flags(config)
