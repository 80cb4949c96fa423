"""State of a distillation run: two trees of adapters, each with an optimiser of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import register_dataclass

from longlive_jax.config import Experiment, Train
from longlive_jax.model.lora import init_adapters
from longlive_jax.train.state import TrainState, init_state, make_optimizer
from longlive_jax.types import Array, PyTree


@functools.partial(register_dataclass, data_fields=["step", "student", "critic"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DistillState:
  """What a run needs to go on.

  Attributes:
    step: int32 scalar, steps done.
    student, critic: adapters with optimiser, and of the student an average; their own count of
      updates.
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


def of_student(experiment: Experiment) -> Train:
  """Settings of the student's optimiser, which counts its own updates."""
  train, every = experiment.train, experiment.distill.student_every
  names = ("steps", "warmup_steps", "ema_start_step")
  return dataclasses.replace(train, **{name: -(-getattr(train, name) // every) for name in names})


def of_critic(experiment: Experiment) -> Train:
  """Settings of the critic's."""
  return dataclasses.replace(experiment.train, lr=experiment.distill.critic_lr)


def optimizers_of(experiment: Experiment) -> tuple[optax.GradientTransformation, ...]:
  """Those of student and critic."""
  return tuple(make_optimizer(of(experiment)) for of in (of_student, of_critic))


def start_state(experiment: Experiment, shapes: PyTree) -> DistillState:
  """Adapters of these shapes that change nothing yet, before the first step."""
  key = jax.random.key(experiment.train.seed)
  student, critic = (
    init_state(init_adapters(jax.random.fold_in(key, n), shapes), optimizer, averaged=n == 0)
    for n, optimizer in enumerate(optimizers_of(experiment))
  )
  return DistillState(jnp.zeros((), jnp.int32), student, critic)
