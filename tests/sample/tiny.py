"""The smallest experiment that still has every part of the sampler, and parameters for it."""

import jax
import numpy as np

from longlive_jax.build import build_models
from longlive_jax.config import Experiment, Model, Sample, Text, Vae, Video
from longlive_jax.config.load import from_flags
from longlive_jax.model import solvers
from longlive_jax.model.dit import declare_dit
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.rollout import Engine
from longlive_jax.sample.sampler import Models
from longlive_jax.types import PyTree

BLOCK = 2  # latents


def experiment(**sample: object) -> Experiment:
  """Blocks of 2 latents of 2 x 4 (2 tokens each), window 4 blocks, sink 1; `sample` settings."""
  settings = dict(steps=2, solver="euler", window_latents=8, sink_latents=2, cut_prefix="Cut. ")
  return from_flags(
    Experiment(
      name="smallest",
      model=Model(
        width=24,
        ffn_width=32,
        heads=2,
        layers=2,
        frequency_width=16,
        block_latents=BLOCK,
        shift=3.0,
        dtype="float32",
        text=Text(
          vocabulary=260,
          width=16,
          attention_width=16,
          ffn_width=16,
          heads=2,
          layers=1,
          length=24,
          tokenizer="bytes",
          frozen_seed=0,
        ),
        vae=Vae(encoder_width=4, decoder_width=4, residual_blocks=1, latent_channels=4),
      ),
      video=Video(height=32, width=64, fps=24),
      sample=Sample(**(settings | sample)),
    )
  )


def shaken(params: PyTree, seed: int = 0, scale: float = 0.1) -> PyTree:
  """Parameters away from their initial zeros, so that nothing is hidden."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  noisy = [np.asarray(a) + scale * rng.standard_normal(a.shape, np.float32) for a in leaves]
  return jax.tree.unflatten(tree, noisy)


def models(config: Experiment) -> Models:
  """Networks, tokenizer and fresh parameters; those of the transformer are shaken."""
  made = build_models(config)
  made.params["dit"] = shaken(made.params["dit"])
  return made


def engine(config: Experiment, batch: int = 1) -> tuple[Engine, PyTree]:
  """An engine and shaken parameters, without any other network."""
  network = declare_dit(config.model)
  params = shaken(network.init(0))
  plan = solvers.plan(config.sample.solver, config.sample.steps, config.model.shift)
  return Engine(
    Denoiser(network, config.model, plan, config.sample.guidance), config, params, batch
  ), params
