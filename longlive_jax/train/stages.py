"""The two stages of a training run: "vae", then "ar".

Each returns trained parameters; the loop, the objective and the data are in their own modules.
How a batch, its clips and the parameters are split over devices, `parallel` says.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.data import shapes
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.flow import Table, training_table
from longlive_jax.model.module import Network
from longlive_jax.model.rope import expand, spatial_table, temporal_table
from longlive_jax.parallel.mesh import make_mesh, mesh_of, replicate, split_batch
from longlive_jax.parallel.rules import DIT_RULES, shardings_of
from longlive_jax.parallel.ulysses import sequence_parallel
from longlive_jax.sample.sampler import Models
from longlive_jax.train import autoencoder, clips, teacher_forcing
from longlive_jax.train.loop import run
from longlive_jax.train.state import TrainState, apply_gradients, init_state, make_optimizer
from longlive_jax.types import Array, PyTree

ENCODED = 16  # clips encoded at a time
STATISTICS_CLIPS = 256  # clips whose latents give the normalisation constants


def train_vae(
  experiment: Experiment, network: Network, params: PyTree, workdir: str | Path
) -> PyTree:
  """Trains the autoencoder on short clips of the shapes world.

  Args:
    experiment: checked experiment, `train.stage` "vae".
    network: declared VAE.
    params: where to start.
    workdir: checkpoints and metrics.

  Returns:
    Averaged parameters, with the statistics of their latents set.
  """
  cfg, video = experiment.train, experiment.video
  optimizer, mesh = make_optimizer(cfg), make_mesh(cfg.batch)
  packed = replicate(clips.vae_clips(experiment, experiment.data.clips), mesh)
  frames = jnp.arange(4 * experiment.data.vae_latents - 3)
  draw = functools.partial(
    shapes.render_packed, frame_indices=frames, height=video.height, width=video.width
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
    pick, noise = jax.random.split(key)
    rows = jax.random.randint(pick, (cfg.batch,), 0, experiment.data.clips)
    taken = split_batch(jax.tree.map(lambda a: a[rows], packed), mesh)
    batch = split_batch(jax.vmap(draw)(taken), mesh)
    loss = functools.partial(autoencoder.objective, network)
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), gradients = grad(state.params, batch, noise, cfg)
    return apply_gradients(state, gradients, optimizer, cfg), {"loss": value, **metrics}

  state = run(experiment, workdir, replicate(init_state(params, optimizer), mesh), step)
  encode = jax.jit(lambda p, rows: network.bind(p).moments(jax.vmap(draw)(rows))[0])
  groups = min(STATISTICS_CLIPS, experiment.data.clips) // cfg.batch
  means = [
    np.asarray(encode(state.ema, jax.tree.map(lambda a, i=i: a[i : i + cfg.batch], packed)))
    for i in range(0, max(groups, 1) * cfg.batch, cfg.batch)
  ]
  return autoencoder.with_statistics(state.ema, jnp.asarray(np.concatenate(means)))


def train_ar(experiment: Experiment, models: Models, workdir: str | Path) -> PyTree:
  """Trains the transformer with teacher forcing on a bank of latents of the shapes world.

  Args:
    experiment: checked experiment, `train.stage` "ar".
    models: the trained VAE, the frozen text encoder and where the transformer starts.
    workdir: checkpoints and metrics.

  Returns:
    Averaged parameters of the transformer.
  """
  mesh = mesh_of(experiment)
  optimizer = make_optimizer(experiment.train)
  vae, f = models.vae, experiment.model.block_latents
  group = mesh.size * max(1, min(ENCODED, experiment.data.clips) // mesh.size)
  bank = clips.make_bank(
    experiment,
    lambda params, video: vae.bind(params).encode(split_batch(video, mesh), f),
    models.params["vae"],
    models.tokenizer,
    group,
  )
  logging.info("bank of %d clips, latents %s", experiment.data.clips, bank.latents.shape)
  bank, text = replicate((bank, models.params["text"]), mesh)
  step = ar_step(experiment, models, optimizer, mesh)
  state = init_state(models.params["dit"], optimizer)
  state = jax.device_put(state, shardings_of(state, DIT_RULES, mesh))
  return run(experiment, workdir, state, lambda s: step(s, bank, text)).ema


def ar_step(experiment: Experiment, models: Models, optimizer: Any, mesh: Mesh) -> Any:
  """The jitted update `(state, bank, parameters of the text encoder) -> (state, metrics)`.

  Samples, latents of a clip and parameters are split over `mesh`; all else is on every device.
  """
  cfg, model = experiment.train, experiment.model
  table = training_table(model.shift, weighting=cfg.loss_weighting)
  latents = experiment.data.blocks * model.block_latents
  rows, columns = (n // model.patch for n in (experiment.latent_height, experiment.latent_width))
  space = spatial_table(rows, columns, model.head_dim, model.rope_theta)
  borders = block_borders(latents, model.block_latents, experiment.latent_tokens)
  draw = batch_of(experiment, models, table)

  ops = models.ops
  if experiment.parallel.seq > 1:
    ops = dataclasses.replace(ops, attend=sequence_parallel(ops.dense, mesh))
  abstract = jax.eval_shape(lambda p: init_state(p, optimizer), models.dit.abstract)
  places = shardings_of(abstract, DIT_RULES, mesh)

  def loss(params: PyTree, batch: teacher_forcing.Batch, plan: TeacherForcing, key: Array) -> Array:
    here = ops.with_key(key)
    return teacher_forcing.objective(models.dit, params, batch, plan, table, here, cfg.remat)[0]

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
  def step(
    state: TrainState, bank: clips.Bank, text: PyTree
  ) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
    data, rounding = jax.random.split(key)
    batch, turns = draw(data, bank, text)
    batch = teacher_forcing.split(batch, mesh)
    plan = TeacherForcing(expand(split_batch(turns, mesh), space), borders)
    value, gradients = jax.value_and_grad(loss)(state.params, batch, plan, rounding)
    return apply_gradients(state, gradients, optimizer, cfg), {"loss": value}

  return step


Turns = tuple[Array, Array]
Draw = Callable[[Array, clips.Bank, PyTree], tuple[teacher_forcing.Batch, Turns]]


def rotations(experiment: Experiment) -> Callable[[clips.Bank, Any, tuple[int, ...]], Turns]:
  """Temporal rotations (cos, sin) `[B, F, P_t]` of the blocks taken of a bank, as the sampler's.

  With relative positions the blocks that are seen stand side by side, whenever they were.
  """
  model, sample = experiment.model, experiment.sample

  def absolute(bank: clips.Bank, take: Any, shape: tuple[int, ...]) -> Turns:
    return bank.cos[take].reshape(*shape, -1), bank.sin[take].reshape(*shape, -1)

  def relative(bank: clips.Bank, take: Any, shape: tuple[int, ...]) -> Turns:
    positions = np.arange(shape[1])[None] * sample.t_scale
    cos, sin = temporal_table(positions, model.head_dim, model.rope_theta)
    return jnp.tile(cos, (shape[0], 1, 1)), jnp.tile(sin, (shape[0], 1, 1))

  return relative if sample.relative_rope else absolute


def batch_of(experiment: Experiment, models: Models, table: Table) -> Draw:
  """Draws a batch of a bank: `(key, bank, text parameters) -> (batch, (cos, sin))`."""
  cfg, data, f = experiment.train, experiment.data, experiment.model.block_latents
  turns = rotations(experiment)
  nothing = models.tokenizer([experiment.sample.negative_prompt])

  def draw(key: Array, bank: clips.Bank, text: PyTree) -> tuple[teacher_forcing.Batch, Turns]:
    pick, noise, levels, given, dropped = jax.random.split(key, 5)
    clip, blocks = clips.choose(pick, bank, cfg.batch, data)
    take = clip[:, None], blocks
    clean = bank.latents[take].astype(jnp.float32)
    clean = clean.reshape(cfg.batch, -1, *clean.shape[3:])
    drop = jax.random.bernoulli(dropped, cfg.prompt_dropout_share, (cfg.batch, 1, 1))
    tokens, masks = (
      jnp.where(drop, empty, a[take]).reshape(-1, a.shape[-1])
      for a, empty in zip((bank.tokens, bank.masks), nothing, strict=True)
    )
    batch = teacher_forcing.Batch(
      clean=clean,
      noise=jax.random.normal(noise, clean.shape),
      timesteps=teacher_forcing.block_timesteps(levels, cfg.batch, clean.shape[1], f, table),
      prompts=models.text.bind(text)(tokens, masks),
      pieces=data.blocks,
      first=clean[:, :1] if cfg.first_latent_share else None,
      given=jax.random.bernoulli(given, cfg.first_latent_share, (cfg.batch,)),
    )
    return batch, turns(bank, take, clean.shape[:2])

  return draw
