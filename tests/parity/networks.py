"""The transformer of a recorded set: its configuration, parameters, gradients, inner results."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import Model, Text, Vae
from longlive_jax.convert.keys_dit import dit_rows
from longlive_jax.convert.torch_import import import_params, leaf_at, to_ours
from longlive_jax.model.attention import Cross, pair
from longlive_jax.model.between import between_of
from longlive_jax.model.dit import DiT, TextKV, declare_dit
from longlive_jax.model.layers import patchify
from longlive_jax.model.module import Network
from longlive_jax.model.ops import REFERENCE, Plan
from longlive_jax.types import Array, PyTree
from tests.parity.records import Compared, compare

GRADIENT = 1e-3  # tolerance of gradients, relative to the largest of an array


def model_of(config: dict) -> Model:
  """Our configuration of a recorded transformer."""
  return Model(
    width=config["dim"],
    ffn_width=config["ffn_dim"],
    heads=config["num_heads"],
    layers=config["num_layers"],
    frequency_width=config["freq_dim"],
    patch=config["patch_size"][1],
    block_latents=config.get("num_frame_per_block", 8),
    shift=config.get("shift", 5.0),
    eps=config["eps"],
    dtype="float32",
    text=Text(width=config["text_dim"], length=config["text_len"]),
    vae=Vae(latent_channels=config["in_dim"]),
  )


def load(
  archive: Mapping[str, np.ndarray], config: dict, prefix: str = "param/"
) -> tuple[Model, Network, PyTree]:
  """Configuration, network and parameters stored under `prefix`."""
  cfg = model_of(config)
  network = declare_dit(cfg)
  tensors = {k.removeprefix(prefix): archive[k] for k in archive if k.startswith(prefix)}
  return cfg, network, import_params(dit_rows(cfg), tensors, network.abstract)


def grid(latents: Array | np.ndarray, cfg: Model) -> tuple[int, int]:
  """Rows and columns of tokens of latents `[B, F, H, W, C]`."""
  return latents.shape[2] // cfg.patch, latents.shape[3] // cfg.patch


def latents_last(x: np.ndarray, channel: int) -> np.ndarray:
  """Moves the channel axis last, float32: 1 of `[B, C, F, H, W]`, 2 of `[B, F, C, H, W]`."""
  return np.moveaxis(np.asarray(x, np.float32), channel, -1)


def pad_prompts(prompts: Array, cfg: Model) -> Array:
  """Zero-pads embeddings `[B, L, E_text]` to the length of the configuration."""
  missing = cfg.text.length - prompts.shape[1]
  return jnp.pad(jnp.asarray(prompts, jnp.float32), ((0, 0), (0, missing), (0, 0)))


def layer_outputs(
  model: DiT,
  latents: Array,
  timesteps: Array,
  text: TextKV,
  plan: Plan,
  context: Array | None = None,
  pieces: int = 1,
) -> tuple[Array, list[Array]]:
  """Embedded tokens and the outputs of every layer, `[B, S, E]` each.

  With `context` (labelled timestep 0) the tokens are [context | target].
  """
  ops = REFERENCE
  x = model.patch_embed(patchify(latents, model.cfg.patch), ops)
  condition = model.embed_times(timesteps, ops)[1]
  cross = Cross(pieces, 1 if context is None else 2)
  if context is not None:
    x = pair(model.patch_embed(patchify(context, model.cfg.patch), ops), x)
    condition = pair(model.embed_times(jnp.zeros_like(timesteps), ops)[1], condition)
  joined = (latents.shape[0], -1, x.shape[-1])
  first, outs = x.reshape(joined), []
  graph, state = nnx.split(model.layers)
  for i in range(model.cfg.layers):
    layer = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))
    total, _ = layer(x, condition, (text.k[i], text.v[i]), plan, None, i, ops, cross)
    x = between_of(ops).total(total)
    outs.append(x.reshape(joined))
  return first, outs


def compare_gradient(name: str, ours: Any, golden: np.ndarray) -> Compared:
  """Compares within the tolerance of gradients."""
  largest = float(np.max(np.abs(golden))) if golden.size else 0.0
  return compare(name, np.asarray(ours), golden, GRADIENT * largest, 0.0)


def compare_gradients(
  archive: Mapping[str, np.ndarray], prefix: str, grads: PyTree, cfg: Model
) -> Iterator[Compared]:
  """Compares gradients of our parameters with all that are stored under `prefix`."""
  for row in dit_rows(cfg):
    name = prefix + row.key
    if name in archive:
      leaf = leaf_at(grads, row.path)
      ours = leaf if row.layer is None else leaf[row.layer]
      yield compare_gradient(name, ours, to_ours(row, np.asarray(archive[name])))
