"""The bidirectional transformer: outputs, inner results and gradients."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Model
from longlive_jax.model import flow
from longlive_jax.model.attention import Full
from longlive_jax.model.layers import gelu
from longlive_jax.model.module import Network
from longlive_jax.model.ops import REFERENCE
from longlive_jax.model.rope import Rope, video_rope
from longlive_jax.types import Array, PyTree
from tests.parity.networks import (
  compare_gradient,
  compare_gradients,
  grid,
  latents_last,
  layer_outputs,
  load,
)
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 2e-5, 1e-4


def velocities(
  network: Network, params: PyTree, x: Array, timesteps: Array, prompts: Array, rope: Rope
) -> Array:
  """Velocities `[B, F, H, W, C]` of latents x at timesteps `[B, F]`."""
  model = network.bind(params)
  return model(x, timesteps, model.text_kv(prompts), Full(rope))[0]


def inner(
  network: Network, params: PyTree, x: Array, times_a: Array, times_b: Array, prompts: Array
) -> dict[str, Array]:
  """Inner results of cases A and B by their recorded names."""
  model, ops = network.bind(params), REFERENCE
  embed = model.text_embed
  out = {"A/text_emb": embed.down(gelu(embed.up(prompts, ops)), ops)}
  embedding, conditions = model.embed_times(times_a, ops)
  out["A/time_emb_tok0"] = embedding[:, 0]
  out["A/time_proj_tok0"] = conditions[:, 0].reshape(x.shape[0], -1)
  rope = video_rope(np.arange(x.shape[1]), *grid(x, model.cfg), model.cfg.head_dim)
  text = model.text_kv(prompts)
  out["B/patch_embed"], layers = layer_outputs(model, x, times_b, text, Full(rope))
  out |= {f"B/block{i}": value for i, value in enumerate(layers)}
  out["B/head"] = model.head(layers[-1], model.embed_times(times_b, ops)[0], ops)
  return out


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout."""
  cfg, network, params = load(archive, config)
  x = latents_last(archive["in/x"], 1)
  prompts = np.asarray(archive["in/context_padded"], np.float32)
  rope = video_rope(np.arange(x.shape[1]), *grid(x, cfg), cfg.head_dim)
  run = jax.jit(lambda *args: velocities(network, *args))
  times_a = np.repeat(np.asarray(archive["A/t"], np.float32)[:, None], x.shape[1], 1)
  times_b = np.asarray(archive["B/t_frame"], np.float32)
  for name, times in (("A", times_a), ("B", times_b)):
    ours = np.moveaxis(np.asarray(run(params, x, times, prompts, rope)), -1, 1)
    yield compare(f"{name}/out", ours, archive[f"{name}/out"], ATOL, RTOL)
  yield Refused("C/out", "one timestep per token: timesteps are one per latent")
  yield Refused("D/out", "padded sequence: a clip is never padded")
  yield from check_wrapper(archive, cfg, run, (params, x, prompts, rope))
  results = jax.jit(lambda *args: inner(network, *args))(params, x, times_a, times_b, prompts)
  for name, ours in results.items():
    if name in archive:
      yield compare(name, ours, archive[name], ATOL, RTOL)
  yield from check_gradients(archive, cfg, network, (params, x, times_b, prompts, rope))


def check_wrapper(
  archive: Mapping[str, np.ndarray], cfg: Model, run: Any, inputs: tuple
) -> Iterator[Compared]:
  """The original's wrapper: every latent has the timestep of the first, and a clean estimate."""
  params, x, prompts, rope = inputs
  times = np.asarray(archive["W/timestep"], np.float32)
  velocity = run(params, x, np.broadcast_to(times[:, :1], times.shape), prompts, rope)
  clean = flow.to_clean(x, velocity, flow.sigma_at(flow.training_table(cfg.shift), times))
  for name, ours in (("W/flow_pred", velocity), ("W/x0_pred", clean)):
    yield compare(name, np.moveaxis(np.asarray(ours), -1, 2), archive[name], ATOL, RTOL)


def check_gradients(
  archive: Mapping[str, np.ndarray], cfg: Model, network: Network, inputs: tuple
) -> Iterator[Compared]:
  """Gradients of mean(velocities * w) of case B."""
  params, x, times, prompts, rope = inputs
  weights = latents_last(archive["grad/w"], 1)

  def loss(params: PyTree, x: Array, prompts: Array) -> Array:
    return jnp.mean(velocities(network, params, x, times, prompts, rope) * weights)

  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, x, prompts)
  yield compare("grad/loss", value, archive["grad/loss"], ATOL, RTOL)
  yield compare_gradient("grad/x", np.moveaxis(np.asarray(grads[1]), -1, 1), archive["grad/x"])
  for sample, gradient in enumerate(grads[2]):
    name = f"grad/context{sample}"
    if name in archive:
      golden = archive[name]
      yield compare_gradient(name, gradient[: len(golden)], golden)
  yield from compare_gradients(archive, "grad/param/", grads[0], cfg)
