"""Stage "dmd": distils the transformer into a student of few steps, as adapters."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.config.rules_train import ROLES
from longlive_jax.model.dit import cast_params
from longlive_jax.model.lora import merge
from longlive_jax.model.vae import from_uint8
from longlive_jax.parallel.mesh import mesh_of, replicate, split_batch
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.sample.sampler import Models
from longlive_jax.sample.schedule import Schedule
from longlive_jax.train.distill import PLAIN, QUANTISED, Conditions, Distillation
from longlive_jax.train.distill_feed import open_feed
from longlive_jax.train.distill_state import DistillState
from longlive_jax.train.distill_step import DistillStep
from longlive_jax.train.loop import Rider, run
from longlive_jax.train.passes import last_seen, plan_passes
from longlive_jax.train.rollouts import Rollouts
from longlive_jax.types import Array, PyTree


def train_dmd(
  experiment: Experiment, models: Models, workdir: str | Path, mesh: Mesh | None = None
) -> tuple[PyTree, PyTree]:
  """Distils the transformer.

  Args:
    experiment: checked experiment, `train.stage` "dmd".
    models: VAE, text encoder, and the transformer: teacher, and frozen weights of student and
      critic; its ops quantise nothing. The transformer's parameters are taken out of
      `models.params`: the devices hold what the run multiplies with, and not the wide weights.
    workdir: checkpoints, metrics and videos.
    mesh: default that of all devices; a batch is split over it, and with `parallel.seq` the blocks
      of a clip; weights are whole on every device.

  Returns:
    (the transformer with the averaged student merged into it, in the dtype that it came in; the
    averaged adapters), on the host.
  """
  mesh, alpha = mesh or mesh_of(experiment), experiment.distill.alpha
  work, wide = Distillation(experiment, models, mesh), on_host(models.params.pop("dit"), mesh)
  rider = Dmd(work, frozen(work, wide))
  if not experiment.train.first_latent_share and not experiment.io.evaluate_every_steps:
    models.params["vae"] = on_host(models.params["vae"], mesh)  # only the result needs it
  quantised = quantised_ops(models.ops, experiment.quant, models.dit.abstract)
  shown = dataclasses.replace(models, ops=quantised)
  rollouts = Rollouts(experiment, shown, workdir) if experiment.io.evaluate_every_steps else None

  def show(step: int, adapters: PyTree) -> None:
    if rollouts is not None:
      rollouts(step, merge(wide, jax.device_get(adapters), alpha))

  state = replicate(work.start(), mesh)
  state = run(experiment, workdir, state, rider, rider, rollouts=show if rollouts else None)  # type: ignore[arg-type]
  adapters = jax.device_get(state.ema)
  return merge(wide, adapters, alpha), adapters


def on_host(params: PyTree, mesh: Mesh) -> PyTree:
  """Parameters that are split over a mesh, whole in the memory of each host."""
  return jax.device_get(replicate(params, mesh))


def frozen(work: Distillation, wide: PyTree) -> dict[str, PyTree]:
  """Frozen weights of each kind that some network has, on every device."""
  cfg, kinds = work.experiment, {work.kind(role) for role in ROLES}
  narrow = cast_params(wide, cfg.model.dtype)
  made = {PLAIN: replicate(narrow, work.mesh)} if PLAIN in kinds else {}
  if QUANTISED in kinds:
    made[QUANTISED] = replicate(quantise_params(narrow, cfg.quant), work.mesh)
  return made


class Dmd(Rider):
  """The step with its prompts.

  Args:
    work: networks and losses.
    bases: frozen weights, see `frozen`.
  """

  def __init__(self, work: Distillation, bases: dict[str, PyTree]):
    experiment, models, mesh = work.experiment, work.models, work.mesh
    self.experiment, self.work, self.done, self.samples = experiment, work, 0, 0
    self.schedule = Schedule.of(experiment)
    self.feed = open_feed(experiment, models, mesh)
    self.bases, self.params = replicate(bases, mesh), {"text": models.params["text"]}
    if not experiment.model.text.parked:
      self.params = replicate(self.params, mesh)
    if experiment.train.first_latent_share:
      self.params["vae"] = replicate(models.params["vae"], mesh)
    self.nothing = models.tokenizer([experiment.sample.negative_prompt])
    self.student: dict[str, Array | float] = {}

    self.conditions = jax.jit(functools.partial(conditions_of, work))
    self.update = DistillStep(work)

  def __call__(self, state: DistillState) -> tuple[DistillState, dict[str, Array | float]]:
    drawn, distill = self.feed(self.done), self.experiment.distill
    moves = self.done % distill.student_every == 0
    passes = plan_passes(self.schedule, drawn.cuts, distill.trained_blocks or len(drawn.cuts))
    arrays = (drawn.tokens, drawn.masks, drawn.first, last_seen(self.schedule, drawn.cuts))
    conditions = self.given(state, arrays)
    state, metrics = self.update(state, self.bases, conditions, passes, moves)
    self.done, self.samples = self.done + 1, self.samples + self.experiment.train.batch
    if moves:
      self.student = {n: v for n, v in metrics.items() if n.startswith("student_")}
    return state, {**self.student, **metrics}

  def given(self, state: DistillState, arrays: Any) -> Conditions:
    """What a step is given; a parked text encoder is on the devices between two steps only."""
    parked = self.experiment.model.text.parked
    if parked:
      jax.block_until_ready(state)
    params = replicate(self.params, self.work.mesh)
    found = self.conditions(params, state.step, arrays, self.nothing)
    return jax.block_until_ready(found) if parked else found

  def snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return {}, {"samples": self.samples, "files": self.feed.fingerprint}

  def restore(self, done: int, arrays: dict[str, np.ndarray], extra: dict[str, Any]) -> None:
    self.done = done
    self.samples = int(extra.get("samples", done * self.experiment.train.batch))
    if extra.get("files", self.feed.fingerprint) != self.feed.fingerprint:
      logging.warning("the files of data.path='%s' have changed", self.experiment.data.path)
    self.feed.start(self.samples)

  def close(self) -> None:
    self.feed.close()


def conditions_of(
  work: Distillation, params: dict[str, PyTree], step: Array, drawn: Any, nothing: Any
) -> Conditions:
  """Embeddings, first latents and who is given them.

  Args:
    work: networks.
    params: of "text", and of "vae" if first frames are given.
    step: steps done.
    drawn: tokens and masks `[B, P, L]`, `Drawn.first`, `last_seen`.
    nothing: tokens and mask `[1, L]` of the negative prompt.
  """
  experiment, models = work.experiment, work.models
  tokens, masks, first, seen = drawn
  ids, mask = split_batch((tokens, masks), work.mesh)
  batch, blocks, length = ids.shape
  encode = functools.partial(models.text.bind(params["text"]), dtype=experiment.model.text.dtype)
  found = encode(ids.reshape(-1, length), mask.reshape(-1, length))
  prompts = found.reshape(batch, blocks, length, -1)
  given, share = None, experiment.train.first_latent_share
  if first is not None:
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), step)
    given = jax.random.bernoulli(jax.random.fold_in(key, 2), share, (batch,))
    first = first_latents(work, params["vae"], first)
  return Conditions(prompts, encode(*nothing)[0], first, given, seen)


def first_latents(work: Distillation, params: PyTree, first: Array) -> Array:
  """`[B, 1, h, w, C]` float32 of first frames or latents."""
  if first.dtype != np.uint8:
    return first.astype(np.float32)
  return work.models.vae.bind(params).encode(from_uint8(split_batch(first, work.mesh)[:, None]))
