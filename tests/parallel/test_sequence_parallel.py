"""Clips split over "seq": loss and gradients of one device, and two exchanges a layer."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from longlive_jax.config import Model, Quant, Text, Vae
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.flow import training_table
from longlive_jax.model.ops import REFERENCE
from longlive_jax.model.rope import temporal_positions, video_rope
from longlive_jax.parallel.mesh import make_mesh, split_batch
from longlive_jax.parallel.rules import DIT_RULES, shardings_of
from longlive_jax.parallel.split_ops import split_ops
from longlive_jax.quant.policy import quantised_ops
from longlive_jax.train import teacher_forcing
from longlive_jax.types import Array, PyTree

BATCH, BLOCKS, SIZE = 2, 4, 4
LATENTS = 2 * BLOCKS
CFG = Model(
  width=32,
  ffn_width=64,
  heads=4,
  layers=2,
  frequency_width=16,
  block_latents=2,
  dtype="float32",
  text=Text(width=16, length=6),
  vae=Vae(latent_channels=4),
)
NETWORK = declare_dit(CFG)
TABLE = training_table(CFG.shift)
BORDERS = block_borders(LATENTS, CFG.block_latents, (SIZE // 2) ** 2)
# (fsdp, seq, layout, whether with a mask); the rest of eight devices splits the samples
MESHES = [
  (1, 1, "balanced", True),
  (1, 2, "balanced", True),
  (1, 4, "balanced", True),
  (2, 4, "balanced", True),
  (1, 2, "balanced", False),
  (2, 4, "balanced", False),
  (1, 2, "plain", False),
  (1, 4, "plain", True),
]


def normal(seed: int, *shape: int) -> Array:
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def params() -> PyTree:
  leaves, tree = jax.tree.flatten(NETWORK.init(0))
  noisy = [a + 0.3 * normal(i, *a.shape) for i, a in enumerate(leaves)]
  return jax.tree.unflatten(tree, noisy)


def batch_of(masked: bool) -> teacher_forcing.Batch:
  shape = (BATCH, LATENTS, SIZE, SIZE, 4)
  clean = normal(1, *shape)
  levels = teacher_forcing.block_timesteps(jax.random.key(2), BATCH, LATENTS, 2, TABLE)
  batch = teacher_forcing.Batch(clean, normal(3, *shape), levels, normal(4, 8, 6, 16), BLOCKS)
  if not masked:
    return batch
  mask = jnp.ones((BATCH, LATENTS)).at[1, 5:].set(0.0)
  return dataclasses.replace(batch, first=clean[:, :1], mask=mask)


def loss_and_gradients(params: PyTree, batch: teacher_forcing.Batch, mesh: Mesh | None):
  """Loss, gradients, and the text of the executable."""
  ops, rope = REFERENCE, temporal_positions(0, LATENTS, np.asarray([[0.0] * 8, [8.0] * 8]))
  tables = video_rope(rope, SIZE // 2, SIZE // 2, CFG.head_dim)
  if mesh is not None:
    ops = split_ops(ops, mesh)
    params = jax.device_put(params, shardings_of(params, DIT_RULES, mesh))

  @jax.jit
  def run(params: PyTree, batch: teacher_forcing.Batch) -> tuple[Array, PyTree]:
    turns = tables
    if mesh is not None:
      batch, turns = teacher_forcing.split(batch, mesh), split_batch(turns, mesh)
    plan = TeacherForcing(turns, BORDERS)

    def loss(params: PyTree) -> Array:
      return teacher_forcing.objective(NETWORK, params, batch, plan, TABLE, ops)[0]

    return jax.value_and_grad(loss)(params)

  compiled = run.lower(params, batch).compile()
  return *jax.device_get(compiled(params, batch)), compiled.as_text()


@pytest.fixture(scope="module")
def alone(params):
  """Results of one device, with and without a mask."""
  return {masked: loss_and_gradients(params, batch_of(masked), None) for masked in (False, True)}


@pytest.mark.parametrize(("fsdp", "seq", "layout", "masked"), MESHES)
def test_loss_and_gradients_are_those_of_one_device(params, alone, fsdp, seq, layout, masked):
  mesh = make_mesh(BATCH, fsdp, seq, layout)
  # plain: gradients of context and target are summed apart, which rounds otherwise (1.1e-6 seen)
  check_equal(params, alone[masked], masked, mesh, 1e-6 if layout == "balanced" else 2e-6)


def test_devices_that_share_clips_may_have_several(params, alone):
  """Two samples on two devices: each has the prompts of its own blocks of both."""
  check_equal(params, alone[True], True, make_mesh(BATCH, 1, 2, devices=jax.devices()[:2]), 1e-6)


def check_equal(params, alone, masked: bool, mesh: Mesh, close: float) -> None:
  """Loss and gradients over a mesh are those of one device."""
  loss, gradients, _ = loss_and_gradients(params, batch_of(masked), mesh)
  expected, wanted, _ = alone
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=close * max(np.abs(theirs).max(), 1e-6))


def compiled_text(params: PyTree, gradients: bool) -> str:
  """Of the loss on four devices a clip, or of the loss with its gradients."""
  mesh = make_mesh(BATCH, 1, 4)
  ops, places = split_ops(REFERENCE, mesh), shardings_of(params, DIT_RULES, mesh)
  rope = video_rope(temporal_positions(0, LATENTS), SIZE // 2, SIZE // 2, CFG.head_dim)

  def loss(params: PyTree, batch: teacher_forcing.Batch) -> Array:
    batch, plan = teacher_forcing.split(batch, mesh), TeacherForcing(rope, BORDERS)
    return teacher_forcing.objective(NETWORK, params, batch, plan, TABLE, ops)[0]

  run = jax.jit(jax.grad(loss), out_shardings=places) if gradients else jax.jit(loss)
  given = jax.device_put(params, places) if gradients else params
  return run.lower(given, batch_of(False)).compile().as_text()


def test_forward_has_two_exchanges_a_layer_and_gathers_no_tokens(params):
  text = compiled_text(params, gradients=False)
  assert len(re.findall(r" all-to-all\(", text)) == 2  # in the body of the scan over layers
  assert "all-gather" not in text and "collective-permute" not in text


def test_backward_has_two_more_and_gathers_parameters_alone(params):
  """Left to itself the compiler moves activations a dozen times a layer."""
  text = compiled_text(params, gradients=True)
  assert len(re.findall(r" all-to-all\(", text)) == 4
  assert "collective-permute" not in text
  widths = {CFG.width, CFG.ffn_width, 6 * CFG.width, CFG.frequency_width, CFG.text.width}
  for shape in re.findall(r"= f32\[([0-9,]*)\]\S* all-gather\(", text):
    assert set(map(int, shape.split(","))) <= widths, shape


def test_products_in_nvfp4_are_those_of_one_device(params):
  """Amax is of all devices' tokens, so only elements whose rounding is a near tie may differ."""
  quantised = quantised_ops(REFERENCE, Quant(linears="nvfp4"), NETWORK.abstract)
  rope = video_rope(temporal_positions(0, LATENTS), SIZE // 2, SIZE // 2, CFG.head_dim)

  def loss_over(mesh: Mesh) -> float:
    def loss(params: PyTree, batch: teacher_forcing.Batch) -> Array:
      batch, plan = teacher_forcing.split(batch, mesh), TeacherForcing(rope, BORDERS)
      ops = split_ops(quantised, mesh)
      return teacher_forcing.objective(NETWORK, params, batch, plan, TABLE, ops)[0]

    given = jax.device_put(params, shardings_of(params, DIT_RULES, mesh))
    return float(jax.jit(loss)(given, batch_of(False)))

  alone, shared = (
    loss_over(make_mesh(BATCH, 1, n, devices=jax.devices()[: 2 * n])) for n in (1, 4)
  )
  np.testing.assert_allclose(shared, alone, rtol=1e-4)
