"""Stage "ar": trains the transformer with teacher forcing on long clips, over a mesh."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.eval.flops import peak_flops, step_flops
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.sample.sampler import Models
from longlive_jax.train.feed import Feed, FileFeed, ShapesFeed
from longlive_jax.train.loop import Rider, Work, run
from longlive_jax.train.recycle import Recycling
from longlive_jax.train.rollouts import Rollouts
from longlive_jax.train.state import TrainState, make_optimizer, place_state
from longlive_jax.train.step import make_step, state_places
from longlive_jax.types import Array, PyTree


def train_ar(
  experiment: Experiment, models: Models, workdir: str | Path, mesh: Mesh | None = None
) -> PyTree:
  """Trains the transformer.

  Args:
    experiment: checked experiment, `train.stage` "ar".
    models: the trained VAE, the text encoder and where the transformer starts; its parameters are
      taken over.
    workdir: checkpoints, metrics and videos.
    mesh: default that of all devices.

  Returns:
    Averaged parameters of the transformer, on the mesh.
  """
  mesh, optimizer = mesh or mesh_of(experiment), make_optimizer(experiment.train)
  logging.info("mesh %s", ", ".join(f"{name} {size}" for name, size in mesh.shape.items()))
  places = state_places(models, optimizer, mesh)
  state = place_state(models.params["dit"], optimizer, places)
  rollouts = Rollouts(experiment, models, workdir) if experiment.io.evaluate_every_steps else None
  rider = Ar(experiment, models, optimizer, mesh)
  return run(experiment, workdir, state, rider, rider, work_of(experiment, mesh), rollouts).ema


def work_of(experiment: Experiment, mesh: Mesh) -> Work:
  """Tokens and floating-point operations of an update."""
  train, latents = experiment.train, experiment.data.blocks * experiment.model.block_latents
  tokens = train.batch * 2 * latents * experiment.latent_tokens
  peak = peak_flops(jax.devices()[0].device_kind)
  return Work(tokens, step_flops(experiment), mesh.size, peak)


class Ar(Rider):
  """The update with all that rides on it: data, recycled errors, and where both stand.

  Args:
    experiment: checked experiment.
    models: see `train_ar`.
    optimizer: of the run.
    mesh: of the run.
  """

  def __init__(
    self,
    experiment: Experiment,
    models: Models,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
  ):
    self.experiment, self.mesh, self.done, self.samples = experiment, mesh, 0, 0
    shapes = experiment.data.source == "shapes"
    self.feed: Feed = (ShapesFeed if shapes else FileFeed)(experiment, models, mesh)
    self.step = make_step(experiment, models, optimizer, mesh)
    self.recycling = Recycling(experiment, mesh) if experiment.train.recycling.enabled else None

  def __call__(self, state: TrainState) -> tuple[TrainState, dict[str, Array | float]]:
    clips = self.feed(self.done)
    errors = self.recycling.errors(self.done) if self.recycling else None
    state, metrics, made = self.step(state, clips, errors)
    self.done, self.samples = self.done + 1, self.samples + self.experiment.train.batch
    metrics = {**metrics, "data_wait_seconds": self.feed.waited}
    if self.recycling and made is not None:
      metrics |= self.recycling.metrics
      self.recycling.take(made)
    return state, metrics

  def snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = self.recycling.snapshot() if self.recycling else {}
    return arrays, {"samples": self.samples, "files": self.feed.fingerprint}

  def restore(self, done: int, arrays: dict[str, np.ndarray], extra: dict[str, Any]) -> None:
    self.done = done
    self.samples = int(extra.get("samples", done * self.experiment.train.batch))
    self.feed.start(self.samples)
    if extra.get("files", self.feed.fingerprint) != self.feed.fingerprint:
      logging.warning(
        "the files of data.path='%s' are not those of step %d: the run goes on with another order"
        " of samples",
        *(self.experiment.data.path, done),
      )
    if self.recycling and arrays:
      self.recycling.restore(arrays)

  def close(self) -> None:
    self.feed.close()
