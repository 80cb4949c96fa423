"""One step of distillation: the critic learns the student's clips, now and then the student moves.

Student, teacher and critic share one frozen base; student and critic have an adapter tree each. The
teacher is the base alone. A step draws prompts, and if it is the student's turn makes a clip with
gradient and moves the student along the direction of `train.dmd`; then, in any case, makes another
clip of the student as it was before and takes a step of the critic on it.

Everything that is drawn is a function of (seed, step).

Source: spec/training.md section 9.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import register_dataclass

from longlive_jax.config import Experiment, Train
from longlive_jax.model import solvers
from longlive_jax.model.attention import BlockCausal, TeacherForcing, block_borders
from longlive_jax.model.flow import TIMESTEPS, training_table
from longlive_jax.model.lora import adapted, adapted_ops, adapter_shapes, init_adapters
from longlive_jax.model.ops import Ops
from longlive_jax.model.rope import video_rope
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.sampler import Models
from longlive_jax.train import dmd
from longlive_jax.train.self_forcing import Pass, SelfForcing, stopped
from longlive_jax.train.state import TrainState, apply_gradients, init_state, make_optimizer
from longlive_jax.types import Array, PyTree


@functools.partial(register_dataclass, data_fields=["step", "student", "critic"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DistillState:
  """What a run needs to go on.

  Attributes:
    step: int32 scalar, steps done.
    student, critic: adapters with optimiser and average; their own count of updates.
  """

  step: Array
  student: TrainState
  critic: TrainState

  @property
  def params(self) -> PyTree:
    return {"student": self.student.params, "critic": self.critic.params}

  @property
  def ema(self) -> PyTree:
    return self.student.ema


class Prompts(NamedTuple):
  """Embeddings `[B, P, L, E]` of the prompts of each block, and the negative one `[L, E]`."""

  blocks: Array
  nothing: Array


def of_student(experiment: Experiment) -> Train:
  """Settings of the student's optimiser, which counts its own updates."""
  train, every = experiment.train, experiment.distill.student_every
  warmup = -(-train.warmup_steps // every)
  return dataclasses.replace(train, steps=-(-train.steps // every), warmup_steps=warmup)


def of_critic(experiment: Experiment) -> Train:
  """Settings of the critic's."""
  return dataclasses.replace(experiment.train, lr=experiment.distill.critic_lr)


@dataclasses.dataclass(frozen=True)
class Distillation:
  """The networks of a run and how they are trained.

  Attributes:
    experiment: checked experiment, `train.stage` "dmd".
    models: declared networks and ops.
  """

  experiment: Experiment
  models: Models

  @functools.cached_property
  def optimizers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    return tuple(make_optimizer(of(self.experiment)) for of in (of_student, of_critic))  # type: ignore[return-value]

  def start(self) -> DistillState:
    """Adapters that change nothing yet."""
    cfg = self.experiment.distill
    shapes = adapter_shapes(self.models.dit.abstract, cfg.rank, cfg.layers)
    key = jax.random.key(self.experiment.train.seed)
    student, critic = (
      init_state(init_adapters(jax.random.fold_in(key, number), shapes), optimizer)
      for number, optimizer in enumerate(self.optimizers)
    )
    return DistillState(jnp.zeros((), jnp.int32), student, critic)

  def with_adapters(self, base: PyTree, adapters: PyTree) -> PyTree:
    """The base with one of the adapter trees beside it."""
    return adapted(base, adapters, self.experiment.distill.alpha)

  def clip(
    self,
    params: PyTree,
    prompts: Prompts,
    passes: Sequence[tuple[Pass, Pass]],
    key: Array,
    trained: int,
  ) -> Array:
    """A clip `[B, F, H, W, C]` of the student, its last `trained` blocks with gradient."""
    e, cfg = self.experiment, self.experiment.distill
    noises, exit_key, context, rounding = jax.random.split(key, 4)
    steps = e.sample.steps
    last = jnp.full((), steps - 1, jnp.int32)
    exit_step = last if cfg.last_step_only else jax.random.randint(exit_key, (), 0, steps)
    size = (e.latent_height, e.latent_width, e.model.vae.latent_channels)
    shape = (prompts.blocks.shape[0], len(passes) * e.model.block_latents, *size)
    fresh = jax.random.normal(context, shape) if cfg.original_levels else None
    ops = self.ops(rounding)
    solver = solvers.plan(e.sample.solver, steps, e.model.shift)
    student = SelfForcing(
      Denoiser(self.models.dit, e.model, solver, ops=ops),
      remat=e.train.remat,
      attached=cfg.attached_cache,
      original=cfg.original_levels,
    )
    model = self.models.dit.bind(params)
    texts = [model.text_kv(prompts.blocks[:, block], ops) for block in range(len(passes))]
    exits = jnp.broadcast_to(exit_step, (len(passes),))
    noise = jax.random.normal(noises, shape)
    return student.rollout(
      params, noise, texts, passes, exits, trained=trained, context_noise=fresh
    )

  def ops(self, key: Array) -> Ops:
    """How all three networks multiply; gradients in NVFP4 are rounded by the key."""
    return adapted_ops(self.models.ops).with_key(key)

  def score(self, key: Array) -> dmd.Score:
    """How teacher and critic look at whole clips; the key as in `ops`."""
    e = self.experiment
    latents, patch = e.data.blocks * e.model.block_latents, e.model.patch
    rows, columns = e.latent_height // patch, e.latent_width // patch
    positions = np.arange(latents) * e.sample.t_scale
    rope = video_rope(positions, rows, columns, e.model.head_dim, e.model.rope_theta)
    borders = block_borders(latents, e.model.block_latents, rows * columns)
    plan: Any = (TeacherForcing if e.distill.clean_history else BlockCausal)(rope, borders)
    return dmd.Score(self.models.dit, plan, e.data.blocks, self.ops(key), e.train.remat)

  def noised(self, clip: Array, key: Array) -> dmd.Noised:
    """A clip at a level drawn for each sample."""
    levels, noise = jax.random.split(key)
    raw = jax.random.randint(levels, (clip.shape[0], 1), 0, TIMESTEPS)
    shift = self.experiment.model.shift
    timesteps = jnp.broadcast_to(dmd.score_timesteps(raw, shift), clip.shape[:2])
    return dmd.noised(clip, jax.random.normal(noise, clip.shape), timesteps, training_table(shift))

  def student_loss(
    self,
    adapters: PyTree,
    critic: PyTree,
    base: PyTree,
    prompts: Prompts,
    passes: Sequence[tuple[Pass, Pass]],
    key: Array,
  ) -> tuple[Array, Array]:
    """Loss of the student, and the mean size of its direction."""
    cfg = self.experiment.distill
    rolls, levels, rounding = jax.random.split(key, 3)
    trained = cfg.trained_blocks or len(passes)
    clip = self.clip(self.with_adapters(base, adapters), prompts, passes, rolls, trained)
    noised, score = self.noised(clip, levels), self.score(rounding)
    flat = prompts.blocks.reshape(-1, *prompts.blocks.shape[2:])
    g = dmd.matching_direction(
      score,
      score,
      (base, self.with_adapters(base, critic)),
      noised,
      flat,
      jnp.broadcast_to(prompts.nothing, flat.shape),
      (cfg.guidance, cfg.critic_guidance),
      self.experiment.model.block_latents,
    )
    latents = trained * self.experiment.model.block_latents
    counts = noised.mask * (jnp.arange(clip.shape[1]) >= clip.shape[1] - latents)
    return dmd.student_loss(clip, g, counts), jnp.mean(jnp.abs(g))

  def critic_loss(
    self,
    adapters: PyTree,
    student: PyTree,
    base: PyTree,
    prompts: Prompts,
    passes: Sequence[tuple[Pass, Pass]],
    key: Array,
  ) -> Array:
    """Loss of the critic on a clip of the student."""
    rolls, levels, rounding = jax.random.split(key, 3)
    params = stopped(self.with_adapters(base, student))
    clip = self.noised(stopped(self.clip(params, prompts, passes, rolls, 0)), levels)
    flat = prompts.blocks.reshape(-1, *prompts.blocks.shape[2:])
    score = self.score(rounding)
    return dmd.critic_loss(score, self.with_adapters(base, adapters), clip, flat)

  def update(
    self,
    state: DistillState,
    base: PyTree,
    prompts: Prompts,
    passes: Sequence[tuple[Pass, Pass]],
    moves: bool,
  ) -> tuple[DistillState, dict[str, Array]]:
    """A step; with `moves` the student takes part."""
    key = jax.random.fold_in(jax.random.key(self.experiment.train.seed), state.step)
    of_student_key, of_critic_key = jax.random.split(key)
    student, metrics = state.student, {}
    if moves:
      grad = jax.value_and_grad(self.student_loss, has_aux=True)
      (value, size), found = grad(
        student.params, state.critic.params, base, prompts, passes, of_student_key
      )
      metrics = {
        "student_loss": value,
        "student_direction": size,
        "student_grad_norm": optax.tree.norm(found),
      }
      student = apply_gradients(student, found, self.optimizers[0], of_student(self.experiment))
    value, found = jax.value_and_grad(self.critic_loss)(
      state.critic.params, state.student.params, base, prompts, passes, of_critic_key
    )
    metrics |= {"loss": value, "grad_norm": optax.tree.norm(found)}
    critic = apply_gradients(state.critic, found, self.optimizers[1], of_critic(self.experiment))
    return DistillState(state.step + 1, student, critic), metrics
