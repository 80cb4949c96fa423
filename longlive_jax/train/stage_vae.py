"""Stage "vae": trains the autoencoder on short clips of the shapes world."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.data import shapes
from longlive_jax.model.module import Network
from longlive_jax.parallel.mesh import make_mesh, replicate, split_batch
from longlive_jax.train import autoencoder, clips
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
  return replicate(autoencoder.with_statistics(state.ema, jnp.asarray(np.concatenate(means))), mesh)
