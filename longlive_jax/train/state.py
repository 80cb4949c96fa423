"""Optimiser and training state: plain values, every update returns a new one.

AdamW; with beta1 = 0 the first moment is not kept, as in the original's recipe.
Source: spec/training.md section 8, design.md section 8.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import register_dataclass

from longlive_jax.config import Train
from longlive_jax.types import Array, PyTree


@functools.partial(
  register_dataclass, data_fields=["step", "params", "opt_state", "ema"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a run needs to go on.

  Attributes:
    step: int32 scalar, updates done.
    params: float32 masters.
    opt_state: of the optimiser.
    ema: moving average of params, float32; None where it is not wanted.
  """

  step: Array
  params: PyTree
  opt_state: Any
  ema: PyTree


def learning_rate(cfg: Train) -> optax.Schedule:
  """Linear warm-up to `lr`, then a cosine down to `lr * final_lr_fraction`.

  Returns:
    A function of the updates done before: update number `warmup_steps` is the first at `lr`, and
    the last update of the run is at the final rate.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0 if cfg.warmup_steps else cfg.lr,
    cfg.lr,
    cfg.warmup_steps,
    max(cfg.steps, cfg.warmup_steps + 1),
    cfg.lr * cfg.final_lr_fraction,
  )
  return lambda done: schedule(done + 1)


def make_optimizer(cfg: Train) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW on all parameters, with decay apart from the moments."""
  if cfg.beta1 == 0.0:
    moments = optax.scale_by_rms(cfg.beta2, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
  else:
    moments = optax.scale_by_adam(cfg.beta1, cfg.beta2, eps=1e-8)
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    moments,
    optax.add_decayed_weights(cfg.weight_decay),
    optax.scale_by_learning_rate(learning_rate(cfg)),
  )


def init_state(
  params: PyTree, optimizer: optax.GradientTransformation, *, averaged: bool = True
) -> TrainState:
  """State before the first step; the average starts at the parameters.

  Args:
    params: float32, taken over: the first step that is given its state to keep frees them.
    optimizer: from `make_optimizer`.
    averaged: keep an average.
  """
  copy = jax.tree.map(jnp.array, params) if averaged else None
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), copy)


def place_state(
  params: PyTree, optimizer: optax.GradientTransformation, places: TrainState
) -> TrainState:
  """`init_state` with every leaf made where it lives; `params` are taken over."""
  start = jax.jit(lambda p: init_state(p, optimizer), out_shardings=places, donate_argnums=0)
  return start(jax.device_put(params, places.params))


def apply_gradients(
  state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, cfg: Train
) -> TrainState:
  """One update; the average follows the parameters until `ema_start_step`, then lags."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  keep = jnp.where(state.step < cfg.ema_start_step, 0.0, cfg.ema)
  ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - keep)
  return TrainState(state.step + 1, params, opt_state, ema)
