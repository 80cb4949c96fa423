"""Configuration files of a Diffusers pipeline folder: there and back, and what is refused."""

import json

import numpy as np
import pytest

from longlive_jax.config import Model, Text, Vae
from longlive_jax.convert import diffusers_config as files
from longlive_jax.model.vae import WAN_MEAN, WAN_STD

SMALL_TEXT = Text(vocabulary=90, width=32, attention_width=48, ffn_width=80, heads=6, layers=3)
SMALL_VAE = Vae(
  encoder_width=16,
  decoder_width=24,
  residual_blocks=1,
  temporal_downsample=(True, False, True),
)
SMALL = Model(width=96, ffn_width=160, heads=3, layers=2, eps=1e-5, text=SMALL_TEXT, vae=SMALL_VAE)
DIT, VAE, TEXT = files.model_from_json, files.vae_from_json, files.text_from_json


def read_back(data: dict) -> dict:
  return json.loads(json.dumps(data))


@pytest.mark.parametrize("model", [Model(), SMALL])
def test_files_give_the_configuration_they_were_made_from(model):
  assert DIT(read_back(files.dit_json(model)), model) == model
  assert VAE(read_back(files.vae_json(model.vae)), model.vae) == model.vae
  assert TEXT(read_back(files.text_json(model.text)), model.text) == model.text


def test_sizes_come_from_the_file_and_all_else_from_the_base():
  base = Model(block_latents=3, dtype="float32", text=Text(length=77), vae=Vae(decoder_width=64))
  model = DIT(files.dit_json(SMALL), base)
  assert (model.width, model.layers, model.eps, model.text.width) == (96, 2, 1e-5, 32)
  assert (model.block_latents, model.text.length, model.vae.decoder_width) == (3, 77, 64)
  assert base.width == 3072 and TEXT(files.text_json(SMALL_TEXT)).attention_width == 48


def test_latent_statistics_are_those_of_the_file():
  mean, std = files.latent_statistics(read_back(files.vae_json(Vae())))
  np.testing.assert_array_equal(mean, np.float32(WAN_MEAN))
  np.testing.assert_array_equal(std, np.float32(WAN_STD))
  own = files.vae_json(Vae(latent_channels=2), np.float32([0.5, 1.5]), [1, 2])
  assert files.latent_statistics(read_back(own))[0].tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
  ("read", "changes", "message"),
  [
    (DIT, {"_class_name": "WanModel"}, "_class_name='WanModel' must be 'WanTransformer3DModel'"),
    (DIT, {"patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\] must be \[1, p, p\]"),
    (DIT, {"qk_norm": None}, "qk_norm=None must be 'rms_norm_across_heads'"),
    (DIT, {"cross_attn_norm": False}, "cross_attn_norm=False must be True"),
    (DIT, {"added_kv_proj_dim": 5120}, "added_kv_proj_dim=5120 must be None"),
    (DIT, {"image_dim": 1280}, "image_dim=1280 must be None"),
    (DIT, {"out_channels": 16}, "out_channels=16 must be in_channels=48"),
    (DIT, {"num_layers": 0}, "num_layers=0 must be at least 1"),
    (DIT, {"ffn_dim": "wide"}, "ffn_dim='wide' must be of type int"),
    (VAE, {"is_residual": False}, "is_residual=False must be True"),
    (VAE, {"patch_size": None}, "patch_size=None must be 2"),
    (VAE, {"in_channels": 3}, "in_channels=3 must be 12"),
    (VAE, {"attn_scales": [1.0]}, r"attn_scales=\[1.0\] must be \[\]"),
    (VAE, {"dim_mult": [1, 2, 4]}, r"model.vae.multipliers=\(1, 2, 4\) must have 4 entries"),
    (VAE, {"dim_mult": [1, 2, 0, 4]}, "dim_mult=0 must be at least 1"),
    (TEXT, {"model_type": "t5"}, "model_type='t5' must be 'umt5'"),
    (TEXT, {"feed_forward_proj": "relu"}, "feed_forward_proj='relu' must be 'gated-gelu'"),
    (TEXT, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05 must be 1e-06"),
    (files.latent_statistics, {"latents_std": [1.0]}, "latents_std has 1 numbers; z_dim=48"),
    (files.latent_statistics, {"latents_std": [0.0] * 48}, "must be finite, the latter positive"),
  ],
)
def test_what_our_networks_cannot_be_is_refused_by_its_field(read, changes, message):
  files_of = {DIT: files.dit_json(Model()), TEXT: files.text_json(Text())}
  data = files_of.get(read, files.vae_json(Vae())) | changes
  with pytest.raises(ValueError, match=message):
    read(data)


@pytest.mark.parametrize(
  ("read", "full", "optional"),
  [
    (DIT, files.dit_json(SMALL), {*files.DIT_FIXED, "rope_max_seq_len"}),
    (
      VAE,
      files.vae_json(SMALL_VAE),
      {"_class_name", "attn_scales", "scale_factor_temporal", "latents_mean", "latents_std"},
    ),
    (
      TEXT,
      files.text_json(SMALL_TEXT),
      {"architectures", "feed_forward_proj", "layer_norm_epsilon"},
    ),
  ],
)
def test_a_field_is_needed_unless_its_absence_means_the_same(read, full, optional):
  for name in full.keys() - {"decoder_base_dim"}:
    data = {key: value for key, value in full.items() if key != name}
    if name in optional:
      assert read(data) == read(full)
    else:
      with pytest.raises(ValueError, match=name):
        read(data)


def test_a_width_of_the_decoder_left_out_is_that_of_the_encoder():
  data = files.vae_json(SMALL_VAE)
  assert VAE(data | {"decoder_base_dim": None}).decoder_width == 16
  del data["decoder_base_dim"]
  assert VAE(data).decoder_width == 16


def test_what_diffusers_has_no_setting_for_is_refused():
  with pytest.raises(ValueError, match="model.rope_theta=500.0 must be 10000.0 for Diffusers"):
    files.dit_json(Model(rope_theta=500.0))
  with pytest.raises(ValueError, match="mean has 48 numbers; model.vae.latent_channels=8 needs"):
    files.vae_json(Vae(latent_channels=8))


def test_the_index_names_every_folder_and_the_classes_of_the_weights():
  index = read_back(files.pipeline_json())
  assert index["transformer"][1] == files.dit_json(Model())["_class_name"]
  assert index["vae"][1] == files.vae_json(Vae())["_class_name"]
  assert [index["text_encoder"][1]] == files.text_json(Text())["architectures"]
  assert index["expand_timesteps"] is True and {"tokenizer", "scheduler"} < index.keys()
