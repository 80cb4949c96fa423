"""Which layers are quantised, and the whole network with quantised layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Model, Quant, Text, Vae
from longlive_jax.model.attention import Full
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.ops import REFERENCE, Ops
from longlive_jax.model.rope import expand, spatial_table, temporal_table
from longlive_jax.quant.nvfp4 import dequantise
from longlive_jax.quant.policy import linear_paths, quantise_params, quantised_ops, selected
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.types import Array, PyTree

CFG = Model(
  width=32,
  ffn_width=64,
  heads=2,
  layers=2,
  frequency_width=16,
  dtype="float32",
  text=Text(width=16, length=4),
  vae=Vae(latent_channels=4),
)
NETWORK = declare_dit(CFG)
PATHS = frozenset(linear_paths(NETWORK.abstract))
CHOSEN = {f"layers/{kind}_attn/{name}" for kind in ("self", "cross") for name in "qkvo"}
CHOSEN |= {"layers/ffn/up", "layers/ffn/down"}
QUANT = Quant(linears="nvfp4", gradient_rounding="nearest", weight_blocks="16x16")


@pytest.fixture(scope="module")
def params() -> PyTree:
  """Fresh, with noise where a fresh network is zero."""
  flat, tree = jax.tree.flatten(NETWORK.init(0))
  keys = jax.random.split(jax.random.key(1), len(flat))
  noisy = [a + 0.02 * jax.random.normal(k, a.shape) for a, k in zip(flat, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


@functools.partial(jax.jit, static_argnames="quant")
def run(params: PyTree, quant: Quant, key: Array | None = None) -> Array:
  """Sum of squares of a forward pass, and so its gradient."""
  x = jax.random.normal(jax.random.key(2), (2, 2, 4, 4, 4))
  text = jax.random.normal(jax.random.key(3), (2, 4, 16))
  ops = quantised_ops(Ops(key=key), quant, NETWORK.abstract)
  space = spatial_table(2, 2, CFG.head_dim, CFG.rope_theta)
  plan = Full(expand(temporal_table(np.arange(2), CFG.head_dim, CFG.rope_theta), space))
  model = NETWORK.bind(params)
  return model(x, jnp.full((2, 2), 500.0), model.text_kv(text, ops), plan, ops=ops)[0]


def test_the_default_chooses_the_ten_linear_layers_of_a_layer():
  assert selected(PATHS, QUANT.layers) == CHOSEN
  kept = {"patch_embed", "time_proj", "head/proj"}
  kept |= {f"{embed}_embed/{part}" for embed in ("text", "time") for part in ("up", "down")}
  assert kept == PATHS - CHOSEN


def test_the_full_model_has_300_quantised_layers():
  network = declare_dit(Model())
  leaves = network.abstract["layers"]
  sizes = [leaves[p.split("/")[1]][p.split("/")[2]]["kernel"] for p in CHOSEN]
  assert sum(a.shape[0] for a in sizes) == 300
  assert sum(int(np.prod(a.shape)) for a in sizes) == 4_907_335_680


def test_a_pattern_that_matches_nothing_is_refused():
  with pytest.raises(ValueError, match=r"quant\.layers has 'layers/ffn/upp', which matches no"):
    quantised_ops(REFERENCE, Quant(linears="nvfp4", layers=("layers/ffn/upp",)), NETWORK.abstract)


def test_nothing_changes_without_quantisation(params: PyTree):
  assert quantised_ops(REFERENCE, Quant(), NETWORK.abstract) is REFERENCE
  assert quantise_params(params, Quant()) is params


def test_weights_quantised_ahead_give_what_weights_quantised_on_the_way_give(params: PyTree):
  packed = quantise_params(params, QUANT)
  kernel = packed["layers"]["ffn"]["up"]["kernel"]
  assert isinstance(kernel, QTensor) and kernel.shape == (2, 64, 32)
  assert linear_paths(packed) == linear_paths(params)
  dense = np.asarray(params["layers"]["ffn"]["up"]["kernel"]).swapaxes(1, 2)
  error = np.asarray(dequantise(kernel, jnp.float32)) - dense
  assert 0.01 < np.linalg.norm(error) / np.linalg.norm(dense) < 0.15
  out, plain = run(params, QUANT), run(params, Quant())
  np.testing.assert_allclose(run(packed, QUANT), out, atol=0.02 * float(jnp.max(jnp.abs(out))))
  relative = float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain))
  assert 0.001 < relative < 0.3


def test_only_the_chosen_layer_is_quantised(params: PyTree):
  quant = Quant(linears="nvfp4", layers=("layers/ffn/down",))
  packed = quantise_params(params, quant)
  kinds = jax.tree.leaves(packed, is_leaf=lambda a: isinstance(a, QTensor))
  assert sum(isinstance(a, QTensor) for a in kinds) == 1


def test_fp8_weights_ahead_give_what_weights_on_the_way_give(params: PyTree):
  quant = Quant(linears="fp8")
  packed = quantise_params(params, quant)
  assert packed["layers"]["ffn"]["up"]["kernel"].values.dtype == jnp.float8_e4m3fn
  assert linear_paths(packed) == linear_paths(params)
  out, plain = run(params, quant), run(params, Quant())
  np.testing.assert_allclose(run(packed, quant), out, atol=1e-3 * float(jnp.max(jnp.abs(out))))
  assert 1e-4 < float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain)) < 0.1


def test_each_layer_and_path_has_its_own_noise(params: PyTree):
  quant = Quant(linears="nvfp4")
  gradient = jax.jit(jax.grad(lambda p, key: jnp.sum(run(p, quant, key) ** 2)), static_argnums=())
  first, second = (gradient(params, jax.random.key(seed)) for seed in (0, 1))
  again = gradient(params, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  for name in ("up", "down"):
    a, b = (tree["layers"]["ffn"][name]["kernel"] for tree in (first, second))
    assert bool(jnp.isfinite(a).all()) and not np.array_equal(a, b)
  ops = Ops(key=jax.random.key(0))
  keys = [ops.in_layer(i).key_of(path) for i in (0, 1) for path in ("layers/ffn/up", "head/proj")]
  assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 4
