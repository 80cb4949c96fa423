"""What a training step keeps for its backward pass, from the memory of its executable."""

import jax
import jax.numpy as jnp
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


def gradient(layers: int, quantised: bool, names: tuple[str, ...]) -> jax.stages.Compiled:
  """The gradient of a step that keeps what has these names."""
  cfg = Model(
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
  """q, k and v share their input: eleven widths a layer, 2 bytes each or 9 / 16."""
  other = bytes_a_layer(False, ())  # the layer's own input, and gradients
  dense, packed = (bytes_a_layer(quantised, KEPT) - other for quantised in (False, True))
  width = 64 * 2 * TOKENS
  print(f"bytes an element: {dense / width:.2f} and {packed / width:.2f}: {packed / dense:.3f}")
  assert dense >= 18 * width and packed <= 0.35 * dense
