"""The autoregressive objective: every block is denoised given the clean blocks before it.

The network sees [context | target] of the same clip in one pass; the loss is the weighted squared
error of the velocity, `w(t) |v - (noise - clean)|^2`, with one noise level a block.

Source: spec/training.md section 3.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass

from longlive_jax.model import flow
from longlive_jax.model.attention import TeacherForcing
from longlive_jax.model.module import Network
from longlive_jax.model.ops import REFERENCE, Ops
from longlive_jax.types import SAMPLES, SEQ, Array, PyTree


@functools.partial(
  register_dataclass,
  data_fields=[
    *(
      "clean",
      "noise",
      "timesteps",
      "prompts",
      "first",
      "given",
      "context_timesteps",
      "context_noise",
      "mask",
      "total",
      "errors",
    )
  ],
  meta_fields=["pieces"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
  """Everything one evaluation of the objective needs.

  Attributes:
    clean: latents `[B, F, H, W, C]` float32.
    noise: same shape.
    timesteps: `[B, F]` float32 from the training table, equal within a block.
    prompts: embeddings `[B * P, L, E_text]`, sample-major.
    pieces: P, prompts a sample.
    first: image-to-video: the given first latent `[B, 1, H, W, C]`; it carries no loss.
    given: bool `[B]`, the samples to which `first` is given; None = all.
    context_timesteps: noise level of the context `[B, F]`; None = clean, labelled 0.
    context_noise: of the context, like `noise`; None = the same as the target's.
    mask: `[B, F]`, weight of each latent in the loss; None = all.
    total: what the weighted errors are divided by, for a part of a batch; None = their weights.
    errors: recycled errors of noise, latents and context, `[B, F, H, W, C]` each or None.
  """

  clean: Array
  noise: Array
  timesteps: Array
  prompts: Array
  pieces: int = 1
  first: Array | None = None
  given: Array | None = None
  context_timesteps: Array | None = None
  context_noise: Array | None = None
  mask: Array | None = None
  total: Array | None = None
  errors: tuple[Array | None, Array | None, Array | None] = (None, None, None)


def split(batch: Batch, mesh: Mesh) -> Batch:
  """Inside a jitted function: samples split over "data" and "fsdp", latents and prompts over "seq".

  Blocks stay whole, so noise, levels and loss of a latent are where the latent is; the prompts of
  the blocks are too, unless there is one for all.
  """
  latents = P(SAMPLES, SEQ)
  prompts = P((*SAMPLES, SEQ)) if batch.pieces > 1 else P(SAMPLES)
  specs = dict(
    clean=latents,
    noise=latents,
    timesteps=latents,
    prompts=prompts,
    first=P(SAMPLES),
    given=P(SAMPLES),
    context_timesteps=latents,
    context_noise=latents,
    mask=latents,
    errors=latents,
  )

  def place(value: Array, spec: P) -> Array:
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))

  placed = {
    name: jax.tree.map(functools.partial(place, spec=spec), getattr(batch, name))
    for name, spec in specs.items()
  }
  return dataclasses.replace(batch, **placed)


def block_indices(key: Array, batch: int, blocks: int, size: int) -> Array:
  """Draws one entry of a table of `size` noise levels for each block: int32 `[B, blocks]`."""
  return jax.random.randint(key, (batch, blocks), 0, size)


def block_timesteps(
  key: Array, batch: int, latents: int, block_latents: int, table: flow.Table
) -> Array:
  """Draws one level of the table for each block: `[B, F]` float32 timesteps."""
  index = block_indices(key, batch, latents // block_latents, table.timesteps.shape[0])
  return jnp.repeat(jnp.asarray(table.timesteps)[index], block_latents, 1)


def given_latents(batch: Batch) -> Array:
  """bool `[B, F]`: latents that are given, the first one of some samples."""
  samples, latents = batch.timesteps.shape
  given = jnp.ones(samples, bool) if batch.given is None else batch.given
  return given[:, None] & (jnp.arange(latents) == 0)


def loss_mask(batch: Batch) -> Array:
  """Weight `[B, F]` of each latent in the loss, with given latents taken out."""
  mask = jnp.ones_like(batch.timesteps) if batch.mask is None else batch.mask
  return mask if batch.first is None else jnp.where(given_latents(batch), 0.0, mask)


class Inputs(NamedTuple):
  """What the network is shown and compared with; latents `[B, F, H, W, C]`, the rest `[B, F]`."""

  noisy: Array
  context: Array
  target: Array
  timesteps: Array
  context_timesteps: Array | None
  sigmas: Array
  weights: Array


def plus(x: Array, error: Array | None) -> Array:
  """x with an error, if there is one."""
  return x if error is None else x + error


def prepare(batch: Batch, table: flow.Table) -> Inputs:
  """Adds the noise; a given first latent stays clean in both halves, at timestep 0."""
  timesteps, context, times = batch.timesteps, batch.clean, batch.context_timesteps
  sigmas, weights = flow.sigma_at(table, timesteps), flow.weight_at(table, timesteps)
  of_noise, of_latents, of_context = batch.errors
  noise = plus(batch.noise, of_noise)
  noisy = flow.add_noise(plus(batch.clean, of_latents), noise, sigmas)
  target = flow.velocity_target(batch.clean, noise)
  if times is not None:
    context_noise = batch.noise if batch.context_noise is None else batch.context_noise
    context = flow.add_noise(batch.clean, context_noise, flow.sigma_at(table, times))
  context = plus(context, of_context)
  if batch.first is not None:
    given = given_latents(batch)
    wide = given[..., None, None, None]
    noisy, context = (jnp.where(wide, batch.first, x) for x in (noisy, context))
    target = jnp.where(wide, 0.0, target)
    timesteps = jnp.where(given, 0.0, timesteps)
    sigmas = jnp.where(given, flow.sigma_at(table, 0.0), sigmas)
    times = None if times is None else jnp.where(given, 0.0, times)
  return Inputs(noisy, context, target, timesteps, times, sigmas, weights)


class Estimate(NamedTuple):
  """What the network made of a batch, `[B, F, H, W, C]` each.

  Attributes:
    clean: its estimate of the clean latents.
    wrong: velocity less target.
  """

  clean: Array
  wrong: Array


def errors_of(batch: Batch, estimate: Estimate, table: flow.Table) -> tuple[Array, Array]:
  """Errors of latents and of noise, to be recycled; none at given latents.

  Source: spec/training.md section 4.3 (6); given latents are left out, see G15 there.
  """
  sigmas = flow.sigma_at(table, batch.timesteps)[..., None, None, None]
  found = estimate.clean - batch.clean, (1.0 - sigmas) * estimate.wrong
  if batch.first is None:
    return found
  given = given_latents(batch)[..., None, None, None]
  latents, noise = (jnp.where(given, 0.0, error) for error in found)
  return latents, noise


def objective(
  network: Network,
  params: PyTree,
  batch: Batch,
  plan: TeacherForcing,
  table: flow.Table,
  ops: Ops = REFERENCE,
  remat: str = "none",
) -> tuple[Array, Estimate]:
  """Loss and estimate of one batch.

  Args:
    network: declared DiT.
    params: its parameters.
    batch: inputs and random numbers.
    plan: teacher-forcing plan for F latents.
    table: training table of the schedule.
    ops: matmul, attend, norm.
    remat: see the network.

  Returns:
    (loss scalar float32, estimate).
  """
  inputs = prepare(batch, table)
  model = network.bind(params)
  velocity, _ = model(
    inputs.noisy,
    inputs.timesteps,
    model.text_kv(batch.prompts, ops),
    plan,
    context=inputs.context,
    context_timesteps=inputs.context_timesteps,
    pieces=batch.pieces,
    remat=remat,
    ops=ops,
  )
  wrong = velocity - inputs.target
  weights = loss_mask(batch)
  total = jnp.maximum(jnp.sum(weights), 1.0) if batch.total is None else batch.total
  loss = jnp.sum(jnp.mean(wrong**2, (2, 3, 4)) * inputs.weights * weights) / total
  return loss, Estimate(flow.to_clean(inputs.noisy, velocity, inputs.sigmas), wrong)
