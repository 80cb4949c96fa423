"""Frozen weights of a distillation step: there once, without gradients and optimiser state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import declare_networks
from longlive_jax.config.load import load_config
from longlive_jax.io.leaves import flat
from longlive_jax.model.tokenizer import load_tokenizer
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.sample.sampler import Models
from longlive_jax.sample.schedule import Schedule
from longlive_jax.train.distill import PLAIN, ROLES, Conditions, Distillation
from longlive_jax.train.distill_step import DistillStep
from longlive_jax.train.passes import plan_passes
from longlive_jax.types import PyTree
from tests.train.test_stage_dmd import SETTINGS

# few tokens and wide layers: what is computed of a clip is small beside the weights
SIZES = {
  "model.layers": 1,
  "model.ffn_width": 40000,
  "train.batch": 1,
  "sample.steps": 1,
  "distill.rank": 1,
}


def size(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def step(root):
  """What the executables of a step take, its weights, and the state that it changes."""
  experiment = load_config(root / "configs/tiny.py:dmd", {**SETTINGS, **SIZES})
  nets, mesh = declare_networks(experiment), mesh_of(experiment, jax.devices()[:1])
  tokenizer = load_tokenizer(experiment.model.text)
  models = Models(experiment, nets["dit"], nets["vae"], nets["text"], {}, tokenizer)
  work = Distillation(experiment, models, mesh)
  assert {work.kind(role) for role in ROLES} == {PLAIN}
  bases, state = {PLAIN: nets["dit"].abstract}, jax.eval_shape(work.start)
  text, blocks = experiment.model.text, experiment.data.blocks
  prompts = jax.ShapeDtypeStruct((1, blocks, text.length, text.width), jnp.float32)
  nothing = jax.ShapeDtypeStruct((text.length, text.width), jnp.float32)
  passes = plan_passes(Schedule.of(experiment), [[False]] * blocks, blocks)
  given, passes = Conditions(prompts, nothing), jax.tree.map(np.asarray, passes)
  step, rest = DistillStep(work), (bases, given, passes)
  student, critic = state.student, state.critic
  parts = {
    "gradients": (step.gradients, (state, *rest)),
    "critic": (step.critic, (critic, student.params, state.step, *rest)),
    "move": (step.move, (student, student.params)),
  }
  memory = {name: run.lower(*a).compile().memory_analysis() for name, (run, a) in parts.items()}
  return memory, bases, state


def test_one_copy_of_the_frozen_weights(step):
  memory, bases, _ = step
  frozen = size(bases)
  for part in ("gradients", "critic"):
    arguments = memory[part].argument_size_in_bytes
    assert 0.8 * arguments < frozen < arguments
    assert memory[part].temp_size_in_bytes < frozen


def test_they_have_no_gradient_and_no_optimiser_state(step):
  memory, bases, state = step
  adapters = sum(leaf.size for leaf in jax.tree.leaves(state.student.params))
  kernels = {leaf.shape for leaf in jax.tree.leaves(bases) if leaf.size > adapters}
  assert kernels and not kernels & {leaf.shape for leaf in flat(state).values()}
  made = sum(part.output_size_in_bytes for part in memory.values())
  assert made < size(state) + size(state.student.params) + 0.01 * size(bases)
