"""One step of distillation: the critic learns the student's clips, now and then the student moves.

Student and critic are frozen weights with a tree of adapters each; the teacher is frozen weights
alone. All three share these, unless they are wanted in different precisions. A step draws
conditions, and if it is the student's turn makes a clip with gradient and moves the student along
the direction of `train.dmd`; then, in any case, makes another clip of the student as it was before
and takes a step of the critic on it.

Teacher and critic look at what the sampler's window shows at the end of the rollout: the whole
clip, or of a longer one the sink, the pinned block and the newest ones, side by side.

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
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.config.rules_train import ROLES
from longlive_jax.model import solvers
from longlive_jax.model.attention import BlockCausal, TeacherForcing, block_borders
from longlive_jax.model.flow import TIMESTEPS, training_table
from longlive_jax.model.lora import adapted, adapted_ops, adapter_shapes
from longlive_jax.model.ops import Ops
from longlive_jax.model.rope import video_rope
from longlive_jax.parallel.split_ops import split_ops
from longlive_jax.quant.policy import quantised_ops
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.sampler import Models
from longlive_jax.train import dmd
from longlive_jax.train.distill_state import DistillState, of_critic, optimizers_of, start_state
from longlive_jax.train.passes import Pass
from longlive_jax.train.self_forcing import SelfForcing, stopped
from longlive_jax.train.state import TrainState, apply_gradients
from longlive_jax.types import Array, PyTree

STUDENT, TEACHER, CRITIC = ROLES
PLAIN, QUANTISED = "plain", "quantised"


class Conditions(NamedTuple):
  """What clips are made of.

  Attributes:
    prompts: embeddings `[B, P, L, E]` of the prompts of each block.
    nothing: `[L, E]`, of the negative prompt.
    first: `[B, 1, H, W, C]`, first latents for image-to-video, or None.
    given: bool `[B]`, the samples that they are given to; None without them.
    seen: int32 `[B, W]`, the blocks that teacher and critic look at; None = all.
  """

  prompts: Array
  nothing: Array
  first: Array | None = None
  given: Array | None = None
  seen: Array | None = None


class Judged(NamedTuple):
  """What teacher and critic look at: W blocks of a clip.

  Attributes:
    clip: `[B, F, H, W, C]`.
    prompts, nothing: `[B * W, L, E]`.
    trained: `[B, F]` float32, latents that carry a gradient.
    given: bool `[B]`, samples whose first latent here was given, or None.
  """

  clip: Array
  prompts: Array
  nothing: Array
  trained: Array
  given: Array | None


@dataclasses.dataclass(frozen=True)
class Distillation:
  """The networks of a run and how they are trained.

  Attributes:
    experiment: checked experiment, `train.stage` "dmd".
    models: declared networks, and ops that quantise nothing.
    mesh: of the run.
  """

  experiment: Experiment
  models: Models
  mesh: Mesh

  @functools.cached_property
  def optimizers(self) -> tuple[optax.GradientTransformation, ...]:
    return optimizers_of(self.experiment)

  def start(self) -> DistillState:
    """Adapters that change nothing yet."""
    cfg = self.experiment.distill
    return start_state(
      self.experiment, adapter_shapes(self.models.dit.abstract, cfg.rank, cfg.layers)
    )

  def kind(self, role: str) -> str:
    """Which frozen weights a network has: `PLAIN` or `QUANTISED`."""
    quantised = self.experiment.quant.linears != "none"
    return QUANTISED if quantised and role in self.experiment.distill.quantised else PLAIN

  def base(self, role: str, bases: dict[str, PyTree]) -> PyTree:
    """The frozen weights of a network, out of those of each kind that some network has."""
    return bases[self.kind(role)]

  def with_adapters(self, base: PyTree, adapters: PyTree) -> PyTree:
    """Frozen weights with one of the adapter trees beside them."""
    return adapted(base, adapters, self.experiment.distill.alpha)

  def ops(self, role: str, key: Array, *, by_block: bool) -> Ops:
    """How a network multiplies; gradients in NVFP4 are rounded by the key.

    Args:
      role: of `ROLES`.
      key: see `Ops`.
      by_block: it looks at clips with a prompt a block; else at one block.
    """
    quant, ops = self.experiment.quant, self.models.ops
    if self.kind(role) == QUANTISED:
      ops = quantised_ops(ops, quant, self.models.dit.abstract)
    return split_ops(adapted_ops(ops), self.mesh, by_block=by_block).with_key(key)

  def clip(
    self,
    params: PyTree,
    given: Conditions,
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
    shape = (given.prompts.shape[0], len(passes) * e.model.block_latents, *size)
    ops = self.ops(STUDENT, rounding, by_block=False)
    solver = solvers.plan(e.sample.solver, steps, e.model.shift)
    student = SelfForcing(
      Denoiser(self.models.dit, e.model, solver, ops=ops),
      remat=e.train.remat,
      attached=cfg.attached_cache,
      original=cfg.original_levels,
    )
    model = self.models.dit.bind(params)
    return student.rollout(
      params,
      jax.random.normal(noises, shape),
      [model.text_kv(given.prompts[:, block], ops) for block in range(len(passes))],
      passes,
      jnp.broadcast_to(exit_step, (len(passes),)),
      trained=trained,
      first=given.first,
      given=given.given,
      context_noise=jax.random.normal(context, shape) if cfg.original_levels else None,
    )

  def judged(self, clip: Array, given: Conditions, trained: int) -> Judged:
    """What teacher and critic look at of a clip whose last `trained` blocks carry a gradient."""
    batch, blocks = given.prompts.shape[:2]
    counts = jnp.broadcast_to(jnp.arange(blocks) >= blocks - trained, (batch, blocks))
    parts, first = clip.reshape(batch, blocks, -1, *clip.shape[2:]), given.given
    prompts = given.prompts
    if given.seen is not None:
      rows = jnp.arange(batch)[:, None], given.seen
      parts, prompts, counts = parts[rows], prompts[rows], counts[rows]
      first = None if first is None else first & (given.seen[:, 0] == 0)
    flat = prompts.reshape(-1, *prompts.shape[2:])
    each = jnp.repeat(counts.astype(jnp.float32), parts.shape[2], 1)
    joined = parts.reshape(batch, -1, *clip.shape[2:])
    return Judged(joined, flat, jnp.broadcast_to(given.nothing, flat.shape), each, first)

  def score(self, role: str, blocks: int, key: Array) -> dmd.Score:
    """How a network looks at clips of so many blocks; the key as in `ops`."""
    e = self.experiment
    latents, patch = blocks * e.model.block_latents, e.model.patch
    rows, columns = e.latent_height // patch, e.latent_width // patch
    positions = np.arange(latents) * e.sample.t_scale
    rope = video_rope(positions, rows, columns, e.model.head_dim, e.model.rope_theta)
    borders = block_borders(latents, e.model.block_latents, rows * columns)
    plan: Any = (TeacherForcing if e.distill.clean_history else BlockCausal)(rope, borders)
    ops = self.ops(role, key, by_block=True)
    return dmd.Score(self.models.dit, plan, blocks, ops, e.train.remat)

  def noised(self, judged: Judged, given: Conditions, key: Array) -> dmd.Noised:
    """A clip at levels that are drawn: one a sample, one a block where a first latent is given."""
    levels, noise = jax.random.split(key)
    clip, f = judged.clip, self.experiment.model.block_latents
    raw = jax.random.randint(levels, (clip.shape[0], clip.shape[1] // f), 0, TIMESTEPS)
    each = jnp.broadcast_to(raw[:, :1], raw.shape)
    if given.given is not None:
      each = jnp.where(given.given[:, None], raw, each)
    shift = self.experiment.model.shift
    timesteps = jnp.repeat(dmd.score_timesteps(each, shift), f, 1)
    fresh = jax.random.normal(noise, clip.shape)
    table, first = training_table(shift), given.first
    return dmd.noised(clip, fresh, timesteps, table, first, judged.given)

  def student_loss(
    self,
    adapters: PyTree,
    critic: PyTree,
    bases: dict[str, PyTree],
    given: Conditions,
    passes: Sequence[tuple[Pass, Pass]],
    key: Array,
  ) -> tuple[Array, Array]:
    """Loss of the student, and the mean size of its direction."""
    cfg, f = self.experiment.distill, self.experiment.model.block_latents
    rolls, levels, rounding = jax.random.split(key, 3)
    trained = cfg.trained_blocks or len(passes)
    params = self.with_adapters(self.base(STUDENT, bases), adapters)
    judged = self.judged(self.clip(params, given, passes, rolls, trained), given, trained)
    noised, blocks = self.noised(judged, given, levels), judged.clip.shape[1] // f
    teacher, fake = (self.score(role, blocks, rounding) for role in (TEACHER, CRITIC))
    g = dmd.matching_direction(
      teacher,
      fake,
      (self.base(TEACHER, bases), self.with_adapters(self.base(CRITIC, bases), critic)),
      noised,
      judged.prompts,
      judged.nothing,
      (cfg.guidance, cfg.critic_guidance),
      f,
    )
    return dmd.student_loss(judged.clip, g, noised.mask * judged.trained), jnp.mean(jnp.abs(g))

  def critic_loss(
    self,
    adapters: PyTree,
    student: PyTree,
    bases: dict[str, PyTree],
    given: Conditions,
    passes: Sequence[tuple[Pass, Pass]],
    key: Array,
  ) -> Array:
    """Loss of the critic on a clip of the student."""
    rolls, levels, rounding = jax.random.split(key, 3)
    params = stopped(self.with_adapters(self.base(STUDENT, bases), student))
    judged = self.judged(stopped(self.clip(params, given, passes, rolls, 0)), given, len(passes))
    blocks = judged.clip.shape[1] // self.experiment.model.block_latents
    score, noised = self.score(CRITIC, blocks, rounding), self.noised(judged, given, levels)
    params = self.with_adapters(self.base(CRITIC, bases), adapters)
    return dmd.critic_loss(score, params, noised, judged.prompts)

  def student_gradients(
    self,
    state: DistillState,
    bases: dict[str, PyTree],
    given: Conditions,
    passes: Sequence[tuple[Pass, Pass]],
  ) -> tuple[PyTree, dict[str, Array]]:
    """Gradients of the student's adapters, and metrics. `bases`: frozen weights by kind."""
    (value, size), found = jax.value_and_grad(self.student_loss, has_aux=True)(
      state.student.params, state.critic.params, bases, given, passes, self.keys(state.step)[0]
    )
    names = "student_loss", "student_direction", "student_grad_norm"
    return found, dict(zip(names, (value, size, optax.tree.norm(found)), strict=True))

  def critic_step(
    self,
    critic: TrainState,
    student: PyTree,
    step: Array,
    bases: dict[str, PyTree],
    given: Conditions,
    passes: Sequence[tuple[Pass, Pass]],
  ) -> tuple[TrainState, Array, dict[str, Array]]:
    """The critic after a step on a clip of the student's adapters, steps done, and metrics."""
    value, found = jax.value_and_grad(self.critic_loss)(
      critic.params, student, bases, given, passes, self.keys(step)[1]
    )
    metrics = {"loss": value, "grad_norm": optax.tree.norm(found)}
    critic = apply_gradients(critic, found, self.optimizers[1], of_critic(self.experiment))
    return critic, step + 1, metrics

  def keys(self, step: Array) -> Array:
    """Of the student and of the critic in a step."""
    return jax.random.split(jax.random.fold_in(jax.random.key(self.experiment.train.seed), step))
