"""The VAE: latents, videos, outputs of every stage, streaming in pieces and what it carries."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Vae
from longlive_jax.config.rules import check_vae
from longlive_jax.convert.keys_vae import vae_rows
from longlive_jax.convert.torch_import import import_params
from longlive_jax.model.conv import patchify
from longlive_jax.model.module import Network
from longlive_jax.model.vae import TIME, declare_vae
from longlive_jax.model.vae import Vae as Module
from longlive_jax.types import Array, PyTree
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 1e-4, 1e-3
MIDDLE = ("middle.0", "middle.1", "middle.2")


def vae_of(config: dict) -> Vae:
  """Our configuration of a recorded VAE."""
  return Vae(
    encoder_width=config["dim"],
    decoder_width=config["dec_dim"],
    multipliers=tuple(config["dim_mult"]),
    residual_blocks=config["num_res_blocks"],
    temporal_downsample=tuple(config["temperal_downsample"]),
    latent_channels=config["z_dim"],
  )


def load(
  archive: Mapping[str, np.ndarray], config: dict, form: str | None = None
) -> tuple[Network, PyTree]:
  """Network and parameters of a recorded VAE."""
  cfg = vae_of(config)
  network = declare_vae(cfg, form=form)
  tensors = {k.removeprefix("param/"): archive[k] for k in archive if k.startswith("param/")}
  params = import_params(vae_rows(cfg), tensors, network.abstract)
  statistics = {
    f"latent_{k}": np.asarray(archive[f"const/{k}"], np.float32) for k in ("mean", "std")
  }
  return network, {**params, **statistics}


def last(x: np.ndarray, channel: int = 1) -> np.ndarray:
  """Moves the channel axis last, float32."""
  return np.moveaxis(np.asarray(x, np.float32), channel, -1)


def whole_clips(
  network: Network, params: PyTree, video: Array, latents: Array, encoded: Array
) -> dict[str, Array]:
  """Results of whole clips under the recorded names."""
  decode = jax.jit(lambda p, z: network.bind(p).decode(z))  # of both: compiled once
  decode_raw = jax.jit(lambda p, z: network.bind(p).decode_raw(z))

  @jax.jit
  def encode(params: PyTree, video: Array) -> tuple[Array, Array]:
    vae = network.bind(params)
    return vae.moments(video)[0], vae.encode(video)

  decoded = decode(params, latents)
  mean, normalised = encode(params, video)
  return {
    "enc/mu_raw": mean,
    "enc/mu_norm": normalised,
    "enc/wrapper_latent": normalised,
    "dec/video": decoded,
    "dec/raw_scale01": decode_raw(params, latents),
    "dec/wrapper_pixel": jnp.clip(decoded, -1.0, 1.0),
    "rt/video": decode(params, encoded),
  }


def stage_outputs(
  parts: Sequence[Any], names: Sequence[str], pieces: Sequence[Array], prefix: str
) -> dict[str, Array]:
  """Output of every part for the first pieces of a clip, under the recorded names."""
  states: list[Any] = [None] * len(parts)
  out = {}
  for i, x in enumerate(pieces):
    for j, (part, name) in enumerate(zip(parts, names, strict=True)):
      x, states[j] = part(x, states[j])
      out[f"{prefix}/{name}/chunk{i}"] = x
  return out


def all_stages(vae: Module, video: Array, latents: Array) -> dict[str, Array]:
  """Outputs of the stages of encoder and decoder for the first two latents."""
  count = len(vae.encoder.stages)
  patches = patchify(video)
  raw = vae.from_latent(vae.denormalise(latents))
  down = [f"downsamples.{i}" for i in range(count)]
  up = [f"upsamples.{i}" for i in range(count)]
  frames = [patches[:, :1], patches[:, 1 : 1 + TIME]]
  steps = [raw[:, :1], raw[:, 1:2]]
  out = {}
  for parts, names, pieces, prefix in (
    (vae.encoder.parts(), ("conv1", *down, *MIDDLE, "head"), frames, "enc/act"),
    (vae.decoder.parts(), ("conv1", *MIDDLE, *up, "head"), steps, "dec/act"),
  ):
    pieces = [piece for piece in pieces if piece.shape[1]]
    out |= stage_outputs(parts, names, pieces, prefix)
  return out


def decode_in_pieces(
  network: Network, params: PyTree, latents: Array, pieces: Sequence[int]
) -> tuple[list[Array], PyTree]:
  """Frames of every piece, and the state after the last."""
  decode = jax.jit(lambda p, z, s: network.bind(p).decode_next(z, s))
  frames, state, at = [], None, 0
  for size in pieces:
    video, state = decode(params, latents[:, at : at + size], state)
    frames.append(video)
    at += size
  return frames, state


def check_streaming(
  archive: Mapping[str, np.ndarray], config: dict, network: Network, params: PyTree, whole: Array
) -> Iterator[Compared | Refused]:
  """Decoding in the recorded pieces; `whole` is the clip decoded at once."""
  latents = jnp.asarray(last(archive["in/z"]))
  pieces = config["pieces"]
  frames, state = decode_in_pieces(network, params, latents, pieces)
  counts = [video.shape[1] for video in frames]
  if "dec/stream_piece_frames" in archive:
    yield compare("dec/stream_piece_frames", counts, archive["dec/stream_piece_frames"], 0, 0)
  streamed = np.concatenate(frames, 1)
  golden = last(archive["dec/video"])[:, : streamed.shape[1]]
  yield compare("dec/video (in pieces)", streamed, golden, ATOL, RTOL)
  if "dec/stream_maxabsdiff" in archive:
    error = np.max(np.abs(streamed - np.asarray(whole)[:, : streamed.shape[1]]))
    yield compare("dec/stream_maxabsdiff", error, archive["dec/stream_maxabsdiff"], ATOL, RTOL)
  if "dec/stream_bit_equal" in archive:
    yield Refused("dec/stream_bit_equal", "says how the original's convolutions round")
  carried = jax.tree.leaves(state)
  if "dec/feat_cache_len" in archive:  # the original also counts the 1x1x1 shortcuts
    paths = [row.path for row in vae_rows(vae_of(config))]
    shortcuts = [p for p in paths if p.startswith("decoder") and p.endswith("shortcut/kernel")]
    length = len(carried) + len(shortcuts)
    yield compare("dec/feat_cache_len", length, archive["dec/feat_cache_len"], 0, 0)
  prefix = "dec/final_feat_cache/"
  for name in sorted(k for k in archive if k.startswith(prefix)):
    recorded = last(archive[name])
    ours = carried[int(name.removeprefix(prefix))][:, -recorded.shape[1] :]
    yield compare(name, ours, recorded, ATOL, RTOL)


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout."""
  try:
    check_vae(vae_of(config))
  except ValueError as error:
    yield Refused("param", str(error))
    return
  if config.get("attn_scales"):
    yield Refused("param", "attention outside the middle: the released networks have none")
    return
  network, params = load(archive, config)
  video = jnp.asarray(last(archive["in/video"]))
  video = video[:, : video.shape[1] - (video.shape[1] - 1) % TIME]  # the original drops the rest
  latents, encoded = (jnp.asarray(last(archive[k])) for k in ("in/z", "enc/mu_norm"))
  results = whole_clips(network, params, video, latents, encoded)
  results |= jax.jit(lambda p, *a: all_stages(network.bind(p), *a))(params, video, latents)
  for name, ours in results.items():
    if name in archive:
      channel = 2 if "wrapper" in name else 1
      yield compare(name, ours, last(archive[name], channel), ATOL, RTOL)
  yield from check_streaming(archive, config, network, params, results["dec/video"])
