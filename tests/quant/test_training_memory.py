"""What a training step keeps for its backward pass, from the memory of its executable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlive_jax.config import Model, Quant, Text, Vae
from longlive_jax.model import dit
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.ops import INPUT, PACKED, REFERENCE
from longlive_jax.model.rope import temporal_positions, video_rope
from longlive_jax.quant.policy import quantised_ops
from longlive_jax.types import Array, PyTree

LATENTS, SIZE = 4, 16
TOKENS = LATENTS * SIZE**2 // 4  # of each half
KEPT = (INPUT, PACKED)
RULES = dict(weights="static_6", activations="static_6", gradients="static_6")
QUANT = Quant(linears="nvfp4", gradient_rounding="nearest", **RULES)


def model_of(layers: int) -> Model:
  """Widths of whole blocks of 16, heads of 16 channels."""
  return Model(
    width=64,
    ffn_width=256,
    heads=4,
    layers=layers,
    frequency_width=16,
    block_latents=2,
    dtype="bfloat16",
    text=Text(width=16, length=16),
    vae=Vae(latent_channels=4),
  )


def gradient(layers: int, quantised: bool, names: tuple[str, ...]) -> jax.stages.Compiled:
  """The gradient of a step that keeps what has these names."""
  cfg = model_of(layers)
  network = dit.declare_dit(cfg)
  ops = quantised_ops(REFERENCE, QUANT, network.abstract) if quantised else REFERENCE
  rope = video_rope(temporal_positions(0, LATENTS), SIZE // 2, SIZE // 2, cfg.head_dim)
  plan = TeacherForcing(rope, block_borders(LATENTS, 2, SIZE**2 // 4))
  latents = jax.ShapeDtypeStruct((1, LATENTS, SIZE, SIZE, 4), jnp.float32)

  def loss(params: PyTree, latents: Array) -> Array:
    model, times = network.bind(params), jnp.full((1, LATENTS), 500.0)
    text = model.text_kv(jnp.ones((1, 16, 16)), ops)
    out, _ = model(latents, times, text, plan, context=latents, remat="kept", ops=ops)
    return jnp.mean(jnp.square(out))

  with pytest.MonkeyPatch.context() as patch:
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    patch.setitem(dit.REMAT, "kept", policy)
    return jax.jit(jax.grad(loss)).lower(network.abstract, latents).compile()


def bytes_a_layer(quantised: bool, names: tuple[str, ...]) -> float:
  """Growth of the executable's temporaries with each layer."""
  few, many = (
    gradient(layers, quantised, names).memory_analysis().temp_size_in_bytes for layers in (2, 6)
  )
  return (many - few) / 4


def test_packed_inputs_take_a_third_of_the_memory():
  """q, k and v share their input: nine widths a layer, 2 bytes each or 9 / 16."""
  other = bytes_a_layer(False, ())  # the layer's own input, and gradients
  dense, packed = (bytes_a_layer(quantised, KEPT) - other for quantised in (False, True))
  width = 64 * 2 * TOKENS
  assert dense == pytest.approx(18 * width, rel=0.01)
  assert packed <= 0.35 * dense, (dense / width, packed / width)


def test_what_is_kept_does_not_change_the_step():
  """Scales above 240, where a maximum is 448, are among what is kept."""
  cfg = model_of(1)
  network = dit.declare_dit(cfg)
  ops = quantised_ops(REFERENCE, QUANT, network.abstract)
  leaves, tree = jax.tree.flatten(network.init(0))
  rng = np.random.default_rng(0)
  shaken = [np.asarray(a) + 0.2 * rng.standard_normal(a.shape, np.float32) for a in leaves]
  rope = video_rope(temporal_positions(0, 2), 2, 2, cfg.head_dim)
  plan = TeacherForcing(rope, block_borders(2, 2, 4))
  latents = jax.random.normal(jax.random.key(1), (1, 2, 4, 4, 4))

  def loss(params: PyTree, remat: str) -> Array:
    model, times = network.bind(params), jnp.full((1, 2), 500.0)
    text = model.text_kv(jnp.ones((1, 16, 16)), ops)
    out, _ = model(latents, times, text, plan, context=latents, remat=remat, ops=ops)
    return jnp.mean(jnp.square(out))

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  params = jax.tree.unflatten(tree, shaken)
  value, gradients = run(params, "none")
  other, theirs = run(params, "inputs")

  @jax.jit
  def norms(a: PyTree, b: PyTree) -> tuple[Array, Array]:
    return optax.tree.norm(a), optax.tree.norm(jax.tree.map(jnp.subtract, a, b))

  norm, difference = norms(gradients, theirs)
  assert abs(other - value) < 0.02 * value and difference < 0.1 * norm
