"""A step of distillation as executables that run one after the other.

The clip that moves the student and the one that the critic learns are then never in memory
together; in one executable they are, in part. What frozen weights and state take is shared.
"""

from collections.abc import Sequence
from typing import Any

import jax

from longlive_jax.train.distill import Conditions, Distillation
from longlive_jax.train.distill_state import DistillState, of_student
from longlive_jax.train.passes import Pass
from longlive_jax.train.state import TrainState, apply_gradients
from longlive_jax.types import Array, PyTree


class DistillStep:
  """The executables of a step.

  Args:
    work: networks and losses.
  """

  def __init__(self, work: Distillation):
    train = of_student(work.experiment)

    def move(student: TrainState, found: PyTree) -> TrainState:
      return apply_gradients(student, found, work.optimizers[0], train)

    self.move = jax.jit(move, donate_argnums=0)
    self.gradients = jax.jit(work.student_gradients)
    self.critic = jax.jit(work.critic_step, donate_argnums=0)

  def __call__(
    self,
    state: DistillState,
    bases: dict[str, PyTree],
    given: Conditions,
    passes: Sequence[tuple[Pass, Pass]],
    moves: bool,
  ) -> tuple[DistillState, dict[str, Array]]:
    """The next state, and metrics.

    Args:
      state: before; donated.
      bases: frozen weights by kind.
      given: what clips are made of.
      passes: of the rollouts.
      moves: the student takes part; each learns from the other as it was before.
    """
    found: Any = None
    metrics: dict[str, Array] = {}
    if moves:
      found, metrics = self.gradients(state, bases, given, passes)
    critic, step, of_critic = self.critic(
      state.critic, state.student.params, state.step, bases, given, passes
    )
    student = self.move(state.student, found) if moves else state.student
    return DistillState(step, student, critic), metrics | of_critic
