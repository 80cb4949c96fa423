"""One update of the transformer: random numbers of a step, its batch, parts, gradients.

Everything that is drawn is a function of (seed, step) and of the place in the batch, so that any
mesh, and a run that goes on, draws the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import register_dataclass

from longlive_jax.config import Experiment
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.flow import Table, training_table
from longlive_jax.model.rope import expand, spatial_table
from longlive_jax.parallel.mesh import split_batch
from longlive_jax.parallel.rules import DIT_RULES, shardings_of
from longlive_jax.parallel.split_ops import split_ops
from longlive_jax.sample.sampler import Models
from longlive_jax.train import teacher_forcing
from longlive_jax.train.state import TrainState, apply_gradients, init_state
from longlive_jax.train.teacher_forcing import Batch
from longlive_jax.types import Array, PyTree

Errors = tuple[Array, Array, Array]  # of noise, latents and context, `[B, F, H, W, C]` each
Step = Callable[..., tuple[TrainState, dict[str, Array], tuple[Array, Array] | None]]


@functools.partial(
  register_dataclass, data_fields=["latents", "prompts", "cos", "sin", "mask"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Clips:
  """Training data of one update.

  Attributes:
    latents: `[B, F, H, W, C]` float32 normalised.
    prompts: embeddings `[B * P, L, E_text]`, one prompt a block, sample-major.
    cos, sin: temporal rotations `[B, F, P_t]` float32.
    mask: `[B, F]` float32, latents that count; None = all.
  """

  latents: Array
  prompts: Array
  cos: Array
  sin: Array
  mask: Array | None = None


class Keys(NamedTuple):
  """Random keys of one step."""

  pick: Array
  noise: Array
  levels: Array
  given: Array
  dropped: Array
  context: Array
  rounding: Array


def keys_of(seed: int, step: Array | int) -> Keys:
  """Keys of the step after `step` updates."""
  data, rounding = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
  pick, noise, levels, given, dropped = jax.random.split(data, 5)
  context = jax.random.fold_in(data, 5)
  return Keys(pick, noise, levels, given, dropped, context, rounding)


def block_levels(experiment: Experiment) -> Callable[[int], Array]:
  """`step -> int32 [B, P]`: entries of the table of noise levels that a step draws."""
  train, blocks = experiment.train, experiment.data.blocks
  size = training_table(experiment.model.shift).timesteps.shape[0]

  @jax.jit
  def levels(step: Array) -> Array:
    key = keys_of(train.seed, step).levels
    return teacher_forcing.block_indices(key, train.batch, blocks, size)

  return levels


def draw_batch(experiment: Experiment, table: Table, keys: Keys, clips: Clips) -> Batch:
  """The batch of a step: noise, noise levels, which samples are given their first latent."""
  train, f = experiment.train, experiment.model.block_latents
  clean, (batch, latents) = clips.latents, clips.latents.shape[:2]
  batch_of = Batch(
    clean=clean,
    noise=jax.random.normal(keys.noise, clean.shape),
    timesteps=teacher_forcing.block_timesteps(keys.levels, batch, latents, f, table),
    prompts=clips.prompts,
    pieces=latents // f,
    mask=clips.mask,
  )
  if train.first_latent_share:
    given = jax.random.bernoulli(keys.given, train.first_latent_share, (batch,))
    batch_of = dataclasses.replace(batch_of, first=clean[:, :1], given=given)
  if train.context_noise:
    levels, noise = jax.random.split(keys.context)
    low = table.below(train.context_noise)
    batch_of = dataclasses.replace(
      batch_of,
      context_timesteps=teacher_forcing.block_timesteps(levels, batch, latents, f, low),
      context_noise=jax.random.normal(noise, clean.shape),
    )
  return batch_of


class Part(NamedTuple):
  """What the loss is computed of: a batch or a part of it, its rotations, the key of rounding."""

  batch: Batch
  turns: tuple[Array, Array]
  key: Array


def make_loss(experiment: Experiment, models: Models, mesh: Mesh) -> Callable[..., Any]:
  """`(params, part) -> (loss, errors to recycle or None)`, split over `mesh`."""
  train, model = experiment.train, experiment.model
  table = training_table(model.shift, weighting=train.loss_weighting)
  latents = experiment.data.blocks * model.block_latents
  rows, columns = (n // model.patch for n in (experiment.latent_height, experiment.latent_width))
  space = spatial_table(rows, columns, model.head_dim, model.rope_theta)
  borders = block_borders(latents, model.block_latents, experiment.latent_tokens)
  ops = split_ops(models.ops, mesh)

  def loss(params: PyTree, part: Part) -> tuple[Array, tuple[Array, Array] | None]:
    batch = teacher_forcing.split(part.batch, mesh)
    plan = TeacherForcing(expand(split_batch(part.turns, mesh), space), borders)
    value, estimate = teacher_forcing.objective(
      models.dit, params, batch, plan, table, ops.with_key(part.key), train.remat
    )
    if not train.recycling.enabled:
      return value, None
    made = teacher_forcing.errors_of(batch, estimate, table)
    return value, jax.tree.map(lambda a: a.astype(model.dtype), made)

  return loss


def make_part(
  experiment: Experiment, step: Array | int, clips: Clips, errors: Errors | None
) -> Part:
  """What the loss of the step after `step` updates is computed of."""
  table = training_table(experiment.model.shift)
  keys = keys_of(experiment.train.seed, step)
  batch = draw_batch(experiment, table, keys, clips)
  batch = dataclasses.replace(batch, errors=errors or (None, None, None))
  return Part(batch, (clips.cos, clips.sin), keys.rounding)


def make_step(
  experiment: Experiment, models: Models, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Step:
  """The jitted update `(state, clips, errors or None) -> (state, metrics, made)`.

  Samples, latents of a clip and parameters are split over `mesh`. The state is donated. `made` is
  what error recycling keeps, errors of latents and noise in `model.dtype`, or None when it is off.
  """
  train, loss = experiment.train, make_loss(experiment, models, mesh)
  places = state_places(models, optimizer, mesh)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None, None))
  def step(state: TrainState, clips: Clips, errors: Errors | None) -> Any:
    whole = make_part(experiment, state.step, clips, errors)
    value, made, gradients = accumulate(loss, state.params, whole, train.accumulate, places.params)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients)}
    return apply_gradients(state, gradients, optimizer, train), metrics, made

  return step


def state_places(models: Models, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Where the leaves of the training state live."""
  abstract = jax.eval_shape(lambda p: init_state(p, optimizer), models.dit.abstract)
  return shardings_of(abstract, DIT_RULES, mesh)


def accumulate(
  loss: Callable[..., Any], params: PyTree, whole: Part, parts: int, places: PyTree
) -> tuple[Array, Any, PyTree]:
  """Loss, what it makes, and gradients of a batch, computed in parts one after the other.

  Args:
    loss: `(params, part) -> (value, arrays with a sample axis)`.
    params: differentiated.
    whole: the batch.
    parts: equal, in order; the sum over parts is that of the batch.
    places: shardings of the gradients.
  """
  grad = jax.value_and_grad(loss, has_aux=True)
  if parts == 1:
    (value, made), gradients = grad(params, whole)
    return value, made, gradients
  total = jnp.maximum(jnp.sum(teacher_forcing.loss_mask(whole.batch)), 1.0)

  def cut(a: Array) -> Array:
    return a.reshape(parts, a.shape[0] // parts, *a.shape[1:])

  batch, turns = jax.tree.map(cut, (whole.batch, whole.turns))

  def one(carry: tuple[Array, PyTree], inputs: Any) -> tuple[tuple[Array, PyTree], Any]:
    number, batch, turns = inputs
    part = Part(
      dataclasses.replace(batch, total=total), turns, jax.random.fold_in(whole.key, number)
    )
    (value, made), gradients = grad(params, part)
    added = jax.tree.map(jnp.add, carry, (value, gradients))
    return (added[0], jax.lax.with_sharding_constraint(added[1], places)), made

  zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
  (value, gradients), made = jax.lax.scan(one, zero, (jnp.arange(parts), batch, turns))
  made = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made)
  return value, made, gradients
