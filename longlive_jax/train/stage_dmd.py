"""Stage "dmd": distils the transformer into a student of few steps, as adapters."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.model.dit import cast_params
from longlive_jax.model.lora import merge
from longlive_jax.parallel.mesh import mesh_of, replicate, split_batch
from longlive_jax.quant.policy import quantise_params
from longlive_jax.sample.sampler import Models
from longlive_jax.sample.schedule import Schedule
from longlive_jax.train.clips import block_prompts, find_cuts, make_clips
from longlive_jax.train.distill import Distillation, DistillState, Prompts
from longlive_jax.train.loop import Rider, run
from longlive_jax.train.rollouts import Rollouts
from longlive_jax.train.self_forcing import plan_passes
from longlive_jax.types import Array, PyTree


def train_dmd(
  experiment: Experiment, models: Models, workdir: str | Path, mesh: Mesh | None = None
) -> tuple[PyTree, PyTree]:
  """Distils the transformer.

  Args:
    experiment: checked experiment, `train.stage` "dmd".
    models: VAE, text encoder, and the transformer: teacher, and base of student and critic.
    workdir: checkpoints, metrics and videos.
    mesh: default that of all devices; a batch is split over it, all else is on every device.

  Returns:
    (the transformer with the averaged student merged into it, float32; the averaged adapters).
  """
  mesh, work = mesh or mesh_of(experiment), Distillation(experiment, models)
  wide, alpha = jax.device_get(models.params["dit"]), experiment.distill.alpha
  rider = Dmd(work, mesh)
  rollouts = Rollouts(experiment, models, workdir) if experiment.io.evaluate_every_steps else None

  def show(step: int, adapters: PyTree) -> None:
    if rollouts is not None:
      rollouts(step, merge(jax.device_put(wide), jax.device_get(adapters), alpha))

  state = replicate(work.start(), mesh)
  state = run(experiment, workdir, state, rider, rider, rollouts=show if rollouts else None)  # type: ignore[arg-type]
  adapters = jax.device_get(state.ema)
  return merge(jax.device_put(wide), adapters, alpha), adapters


class Dmd(Rider):
  """The step with its prompts.

  Args:
    work: networks and losses.
    mesh: of the run.
  """

  def __init__(self, work: Distillation, mesh: Mesh):
    experiment, models = work.experiment, work.models
    self.experiment, self.mesh, self.done = experiment, mesh, 0
    self.schedule = Schedule.of(experiment)
    self.feed = PromptFeed(experiment, models)
    base = quantise_params(
      cast_params(models.params["dit"], experiment.model.dtype), experiment.quant
    )
    self.given = replicate((base, models.params["text"]), mesh)
    self.nothing = models.tokenizer([experiment.sample.negative_prompt])
    self.student: dict[str, Array | float] = {}

    @functools.partial(jax.jit, static_argnames="moves", donate_argnums=0)
    def update(
      state: DistillState, given: Any, tokens: Any, nothing: Any, passes: Any, moves: bool
    ) -> tuple[DistillState, dict[str, Array]]:
      base, text = given
      encode = functools.partial(models.text.bind(text), dtype=experiment.model.text.dtype)
      ids, masks = split_batch(tokens, mesh)
      batch, blocks, length = ids.shape
      found = encode(ids.reshape(-1, length), masks.reshape(-1, length))
      prompts = Prompts(found.reshape(batch, blocks, length, -1), encode(*nothing)[0])
      return work.update(state, base, prompts, passes, moves)

    self.update = update

  def __call__(self, state: DistillState) -> tuple[DistillState, dict[str, Array | float]]:
    tokens, cuts = self.feed(self.done)
    moves = self.done % self.experiment.distill.student_every == 0
    passes = plan_passes(self.schedule, cuts)
    state, metrics = self.update(state, self.given, tokens, self.nothing, passes, moves=moves)
    self.done += 1
    if moves:
      self.student = {n: v for n, v in metrics.items() if n.startswith("student_")}
    return state, {**self.student, **metrics}

  def restore(self, done: int, arrays: dict[str, np.ndarray], extra: dict[str, Any]) -> None:
    self.done = done


class PromptFeed:
  """Prompts and cuts of clips of the shapes world; a step draws its own from (seed, step)."""

  def __init__(self, experiment: Experiment, models: Models):
    data, self.train = experiment.data, experiment.train
    specs, lengths = make_clips(experiment, data.clips, data.seed)
    prompts: list[str] = []
    self.cuts = np.zeros((data.clips, data.blocks), bool)
    for row, (spec, shots) in enumerate(zip(specs, lengths, strict=True)):
      cuts, shot_of = find_cuts(spec, shots), np.repeat(np.arange(len(shots)), shots)
      prompts += block_prompts(spec, shot_of, cuts, experiment.sample.cut_prefix)[: data.blocks]
      self.cuts[row, [cut for cut in cuts if cut < data.blocks]] = True
    shape = (data.clips, data.blocks, -1)
    self.tokens, self.masks = (a.reshape(shape) for a in models.tokenizer(prompts))
    logging.info("prompts of %d clips", data.clips)

  def __call__(self, step: int) -> tuple[tuple[np.ndarray, np.ndarray], list[list[bool]]]:
    """((tokens, masks) `[B, P, L]`, cuts of each block, one a sample)."""
    rng = np.random.default_rng((self.train.seed, step))
    rows = rng.integers(len(self.cuts), size=self.train.batch)
    return (self.tokens[rows], self.masks[rows]), self.cuts[rows].T.tolist()
