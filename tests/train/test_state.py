"""Optimiser, schedule and average against the same in numpy, in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Train
from longlive_jax.train.state import apply_gradients, init_state, learning_rate, make_optimizer

STEPS = 12
CFG = Train(
  steps=STEPS,
  lr=3e-2,
  final_lr_fraction=0.1,
  warmup_steps=4,
  beta1=0.9,
  beta2=0.95,
  weight_decay=0.1,
  clip_norm=1.0,
  ema=0.8,
  ema_start_step=3,
)


def rate(cfg: Train, update: int) -> float:
  """Learning rate of update number `update`, counted from 1."""
  if update <= cfg.warmup_steps:
    return cfg.lr * update / cfg.warmup_steps
  way = (update - cfg.warmup_steps) / (cfg.steps - cfg.warmup_steps)
  low = cfg.final_lr_fraction
  return cfg.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * way)))


def adamw(cfg: Train, params: dict, gradients: list[dict]) -> list[tuple[dict, dict]]:
  """Parameters and their average after each update."""
  params = {name: np.float64(value) for name, value in params.items()}
  mean, square, average = ({n: np.zeros_like(p) for n, p in params.items()} for _ in range(3))
  out = []
  for update, given in enumerate(gradients, 1):
    norm = math.sqrt(sum(float((g**2).sum()) for g in given.values()))
    for name, g in given.items():
      g = g * min(1.0, cfg.clip_norm / norm)
      mean[name] = cfg.beta1 * mean[name] + (1 - cfg.beta1) * g
      square[name] = cfg.beta2 * square[name] + (1 - cfg.beta2) * g**2
      first = mean[name] / (1 - cfg.beta1**update)
      second = square[name] / (1 - cfg.beta2**update)
      step = first / (np.sqrt(second) + 1e-8) + cfg.weight_decay * params[name]
      params[name] = params[name] - rate(cfg, update) * step
      if update <= cfg.ema_start_step:
        average[name] = params[name]
      else:
        average[name] = cfg.ema * average[name] + (1 - cfg.ema) * params[name]
    out.append((dict(params), dict(average)))
  return out


@pytest.fixture(scope="module")
def problem() -> tuple[dict, list[dict]]:
  rng = np.random.default_rng(0)
  params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(5,))}
  scale = [0.05, 3.0, 0.2, 1.0, 10.0, 1e-3] * 2  # some are clipped, some are not
  return params, [{n: s * rng.normal(size=p.shape) for n, p in params.items()} for s in scale]


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"beta1": 0.0},
    {"beta1": 0.0, "weight_decay": 0.0, "clip_norm": 10.0},
    {"warmup_steps": 0, "final_lr_fraction": 1.0},
    {"ema_start_step": 100},
  ],
  ids=str,
)
def test_updates_are_those_of_adamw(problem, change):
  cfg = dataclasses.replace(CFG, **change)
  params, gradients = problem
  optimizer = make_optimizer(cfg)
  state = init_state(jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params), optimizer)
  step = jax.jit(lambda state, g: apply_gradients(state, g, optimizer, cfg), donate_argnums=0)
  for number, (given, (want, average)) in enumerate(
    zip(gradients, adamw(cfg, params, gradients), strict=True), 1
  ):
    state = step(state, jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), given))
    assert int(state.step) == number
    for name in params:
      np.testing.assert_allclose(state.params[name], want[name], rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-5, atol=1e-6)


def test_the_average_starts_at_the_first_parameters(problem):
  cfg = dataclasses.replace(CFG, ema_start_step=0, warmup_steps=0, final_lr_fraction=1.0)
  params = {"a": jnp.ones(3)}
  optimizer = make_optimizer(cfg)
  state = apply_gradients(init_state(params, optimizer), {"a": jnp.ones(3)}, optimizer, cfg)
  np.testing.assert_allclose(state.ema["a"], 0.8 * 1.0 + 0.2 * state.params["a"], rtol=1e-6)


def test_without_beta1_no_first_moment_is_kept():
  params = {"a": jnp.ones((7, 3))}

  def kept(beta1: float) -> int:
    state = make_optimizer(dataclasses.replace(CFG, beta1=beta1)).init(params)
    return sum(leaf.shape == (7, 3) for leaf in jax.tree.leaves(state))

  assert (kept(0.0), kept(0.9)) == (1, 2)


@pytest.mark.parametrize("warmup", [0, 1, 4, STEPS, STEPS + 5])
def test_every_update_has_a_rate_and_the_last_has_the_final_one(warmup):
  cfg = dataclasses.replace(CFG, warmup_steps=warmup)
  rates = np.asarray([learning_rate(cfg)(done) for done in range(STEPS)])
  assert (rates > 0).all()
  assert rates.max() <= cfg.lr * (1 + 1e-6)
  if warmup < STEPS:
    np.testing.assert_allclose(rates[-1], cfg.lr * cfg.final_lr_fraction, rtol=1e-5)
    np.testing.assert_allclose(
      rates, [rate(cfg, update) for update in range(1, STEPS + 1)], rtol=1e-5
    )
