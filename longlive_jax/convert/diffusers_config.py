"""The JSON files beside weights in a Diffusers pipeline folder, from our configuration and back.

    model_index.json                    pipeline_json
    transformer/config.json             dit_json    model_from_json
    vae/config.json                     vae_json    vae_from_json, latent_statistics
    text_encoder/config.json            text_json   text_from_json
    tokenizer/, scheduler/              not made here

The last two hold no weights and nothing of ours: the user copies them from the released pipeline,
or passes both to `WanPipeline.from_pretrained`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longlive_jax.checks import check_at_least, check_divides
from longlive_jax.config import Model, Text, Vae
from longlive_jax.config.rules import check_model, check_text, check_vae, of_type
from longlive_jax.model.text import EPS
from longlive_jax.model.vae import SPACE, TIME, WAN_MEAN, WAN_STD

DIT_FILE, VAE_FILE = "transformer/config.json", "vae/config.json"
TEXT_FILE = "text_encoder/config.json"

# What our networks are, in the libraries' words.
DIT_FIXED: dict[str, Any] = {
  "_class_name": "WanTransformer3DModel",
  "qk_norm": "rms_norm_across_heads",
  "cross_attn_norm": True,
  "image_dim": None,
  "added_kv_proj_dim": None,
  "pos_embed_seq_len": None,
}
VAE_FIXED: dict[str, Any] = {
  "_class_name": "AutoencoderKLWan",
  "is_residual": True,
  "patch_size": 2,
  "in_channels": 12,  # of a 2 x 2 patch
  "out_channels": 12,
  "attn_scales": [],
  "scale_factor_temporal": TIME,
  "scale_factor_spatial": SPACE,
}
TEXT_FIXED: dict[str, Any] = {
  "model_type": "umt5",
  "feed_forward_proj": "gated-gelu",
  "layer_norm_epsilon": EPS,
}
# What an absent field means to the library, where that is something else.
VAE_ABSENT: dict[str, Any] = {
  "is_residual": False,
  "patch_size": None,
  "in_channels": 3,
  "out_channels": 3,
  "scale_factor_spatial": 8,
}
ROPE_THETA = 10000.0  # the library's, which has no setting for it
ROPE_LENGTH = 1024  # latents its tables reach; ours have no limit


def _check_fixed(
  file: str, data: Mapping[str, Any], fixed: Mapping[str, Any], absent: Mapping[str, Any]
) -> None:
  """Raises ValueError unless every field of `fixed` has its value."""
  for name, wanted in fixed.items():
    found = data.get(name, absent.get(name, wanted))
    found = list(found) if isinstance(found, tuple) else found
    if found != wanted:
      raise ValueError(f"{file}: {name}={found!r} must be {wanted!r}")


def _read(file: str, data: Mapping[str, Any], name: str, kind: Any = int) -> Any:
  """A field of a type that the schema knows, a list where that is a tuple; an `int` is a size."""
  value: Any = data.get(name)
  if isinstance(value, list):
    value = tuple(value)
  if not of_type(kind, value):
    raise ValueError(f"{file}: {name}={value!r} must be of type {getattr(kind, '__name__', kind)}")
  if kind in (int, tuple[int, ...]):
    for size in value if isinstance(value, tuple) else (value,):
      check_at_least(f"{file}: {name}", size, 1)
  return value


def dit_json(model: Model) -> dict[str, Any]:
  """`transformer/config.json`.

  Raises:
    ValueError: the library's transformer cannot be this one.
  """
  if model.rope_theta != ROPE_THETA:
    raise ValueError(f"model.rope_theta={model.rope_theta} must be {ROPE_THETA} for Diffusers")
  return DIT_FIXED | {
    "patch_size": [1, model.patch, model.patch],
    "num_attention_heads": model.heads,
    "attention_head_dim": model.head_dim,
    "in_channels": model.vae.latent_channels,
    "out_channels": model.vae.latent_channels,
    "text_dim": model.text.width,
    "freq_dim": model.frequency_width,
    "ffn_dim": model.ffn_width,
    "num_layers": model.layers,
    "eps": model.eps,
    "rope_max_seq_len": ROPE_LENGTH,
  }


def model_from_json(data: Mapping[str, Any], base: Model | None = None) -> Model:
  """The configuration of the transformer of a `transformer/config.json`.

  Args:
    data: content of the file; fields that are not named here are ignored.
    base: gives all settings that the file does not have; default `Model()`.

  Returns:
    `base` with the sizes of the file, `text.width` and `vae.latent_channels` among them; it is
    equal to `base` if the file is of that configuration.

  Raises:
    ValueError: names the field that is missing or that our transformer cannot have.
  """
  base = Model() if base is None else base
  _check_fixed(DIT_FILE, data, DIT_FIXED, {})
  read = functools.partial(_read, DIT_FILE, data)
  patch = read("patch_size", tuple[int, ...])
  if len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
    raise ValueError(f"{DIT_FILE}: patch_size={list(patch)} must be [1, p, p]")
  channels = read("in_channels")
  if read("out_channels") != channels:
    raise ValueError(
      f"{DIT_FILE}: out_channels={data['out_channels']} must be in_channels={channels}"
    )
  model = dataclasses.replace(
    base,
    width=read("num_attention_heads") * read("attention_head_dim"),
    ffn_width=read("ffn_dim"),
    heads=read("num_attention_heads"),
    layers=read("num_layers"),
    frequency_width=read("freq_dim"),
    patch=patch[1],
    eps=read("eps", float),
    rope_theta=ROPE_THETA,
    text=dataclasses.replace(base.text, width=read("text_dim")),
    vae=dataclasses.replace(base.vae, latent_channels=channels),
  )
  check_model(model)
  return model


def vae_json(
  vae: Vae, mean: Sequence[float] = WAN_MEAN, std: Sequence[float] = WAN_STD
) -> dict[str, Any]:
  """`vae/config.json`.

  Args:
    vae: sizes.
    mean, std: of the latent channels: `latent_mean`, `latent_std` of the parameters; by default
      those of the released weights.

  Raises:
    ValueError: another number of them than latent channels.
  """
  for name, values in (("mean", mean), ("std", std)):
    if len(values) != vae.latent_channels:
      raise ValueError(
        f"{name} has {len(values)} numbers; model.vae.latent_channels={vae.latent_channels} needs"
        " as many"
      )
  return VAE_FIXED | {
    "base_dim": vae.encoder_width,
    "decoder_base_dim": vae.decoder_width,
    "z_dim": vae.latent_channels,
    "dim_mult": list(vae.multipliers),
    "num_res_blocks": vae.residual_blocks,
    "temperal_downsample": list(vae.temporal_downsample),
    "latents_mean": [float(x) for x in mean],
    "latents_std": [float(x) for x in std],
  }


def vae_from_json(data: Mapping[str, Any], base: Vae | None = None) -> Vae:
  """The configuration of the VAE of a `vae/config.json`; as `model_from_json`."""
  base = Vae() if base is None else base
  _check_fixed(VAE_FILE, data, VAE_FIXED, VAE_ABSENT)
  read = functools.partial(_read, VAE_FILE, data)
  width = read("base_dim")
  given = data.get("decoder_base_dim") is not None  # else it is the encoder's to the library
  vae = dataclasses.replace(
    base,
    encoder_width=width,
    decoder_width=read("decoder_base_dim") if given else width,
    multipliers=read("dim_mult", tuple[int, ...]),
    residual_blocks=read("num_res_blocks"),
    temporal_downsample=read("temperal_downsample", tuple[bool, ...]),
    latent_channels=read("z_dim"),
  )
  check_vae(vae)
  return vae


def latent_statistics(data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation `[C]` float32 of the latent channels that a `vae/config.json` gives.

  Raises:
    ValueError: they are missing, or not as many as latent channels.
  """
  channels = _read(VAE_FILE, data, "z_dim")
  found = []
  for name in ("latents_mean", "latents_std"):
    values = _read(VAE_FILE, data, name, tuple[float, ...])
    if len(values) != channels:
      raise ValueError(f"{VAE_FILE}: {name} has {len(values)} numbers; z_dim={channels}")
    found.append(np.asarray(values, np.float32))
  mean, std = found
  if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
    raise ValueError(
      f"{VAE_FILE}: latents_mean and latents_std must be finite, the latter positive"
    )
  return mean, std


def text_json(text: Text) -> dict[str, Any]:
  """`text_encoder/config.json`.

  Raises:
    ValueError: the heads do not divide the width of attention.
  """
  check_divides("model.text.attention_width", text.attention_width, "model.text.heads", text.heads)
  return TEXT_FIXED | {
    "architectures": ["UMT5EncoderModel"],
    "vocab_size": text.vocabulary,
    "d_model": text.width,
    "d_kv": text.attention_width // text.heads,
    "d_ff": text.ffn_width,
    "num_heads": text.heads,
    "num_layers": text.layers,
    "relative_attention_num_buckets": text.buckets,
    "relative_attention_max_distance": text.max_distance,
  }


def text_from_json(data: Mapping[str, Any], base: Text | None = None) -> Text:
  """The configuration of the encoder of a `text_encoder/config.json`; as `model_from_json`."""
  base = Text() if base is None else base
  _check_fixed(TEXT_FILE, data, TEXT_FIXED, {"model_type": None})
  read = functools.partial(_read, TEXT_FILE, data)
  text = dataclasses.replace(
    base,
    vocabulary=read("vocab_size"),
    width=read("d_model"),
    attention_width=read("d_kv") * read("num_heads"),
    ffn_width=read("d_ff"),
    heads=read("num_heads"),
    layers=read("num_layers"),
    buckets=read("relative_attention_num_buckets"),
    max_distance=read("relative_attention_max_distance"),
  )
  check_text(text)
  return text


def pipeline_json() -> dict[str, Any]:
  """`model_index.json` of a `WanPipeline`: the class of each folder, and one timestep a token.

  `tokenizer` and `scheduler` have the released pipeline's classes.
  """
  return {
    "_class_name": "WanPipeline",
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
  }
