"""Adapters beside kernels: shapes, products, merging, quantised bases, what is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Model, Quant, Text, Vae
from longlive_jax.convert.keys_lora import lora_rows
from longlive_jax.io.leaves import flat
from longlive_jax.model.attention import BlockCausal, block_borders
from longlive_jax.model.dit import declare_dit, separate_layers
from longlive_jax.model.lora import (
  adapted,
  adapted_ops,
  adapter_shapes,
  init_adapters,
  merge,
  unmerge,
)
from longlive_jax.model.ops import REFERENCE
from longlive_jax.model.rope import video_rope
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.types import Array, PyTree

CFG = Model(
  width=32,
  ffn_width=48,
  heads=2,
  layers=2,
  frequency_width=16,
  block_latents=2,
  dtype="float32",
  text=Text(width=16, length=6),
  vae=Vae(latent_channels=4),
)
NETWORK = declare_dit(CFG)
RANK, ALPHA = 4, 6.0


def shaken(tree: PyTree) -> PyTree:
  """The tree with noise, for fresh heads and adapters are 0."""
  return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), tree)


@pytest.fixture(scope="module")
def params() -> PyTree:
  return shaken(NETWORK.init(0))


@pytest.fixture(scope="module")
def adapters() -> PyTree:
  """Adapters that change something."""
  fresh = init_adapters(jax.random.key(1), adapter_shapes(NETWORK.abstract, RANK))
  return shaken(fresh)


def velocity(params: PyTree, ops=REFERENCE, network=NETWORK) -> Array:
  """The network on fixed inputs."""
  x = jax.random.normal(jax.random.key(2), (1, 4, 4, 4, 4))
  prompts = jax.random.normal(jax.random.key(3), (1, 6, 16))
  plan = BlockCausal(video_rope(np.arange(4), 2, 2, CFG.head_dim), block_borders(4, 2, 4))
  model = network.bind(params)
  text = model.text_kv(prompts, ops)
  return model(x, jnp.full((1, 4), 500.0), text, plan, ops=ops)[0]


def test_adapters_are_those_of_the_original():
  """One pair for each linear layer inside the layers: 20 tensors a layer."""
  names = set(flat(adapter_shapes(NETWORK.abstract, RANK)))
  assert names == {row.path for row in lora_rows(CFG)} and len(names) == 20
  assert len(lora_rows(CFG)) == 20 * CFG.layers


def test_some_layers_may_be_chosen():
  chosen = adapter_shapes(NETWORK.abstract, 2, ("layers/self_attn/(q|v)",))
  assert set(flat(chosen)) == {f"layers/self_attn/{p}/{h}" for p in "qv" for h in "ab"}
  assert chosen["layers"]["self_attn"]["q"]["a"].shape == (CFG.layers, CFG.width, 2)


def test_a_pattern_without_a_layer_and_a_rank_of_0_are_refused():
  with pytest.raises(ValueError, match="distill.layers has 'layers/nose'.*matches no layer"):
    adapter_shapes(NETWORK.abstract, 2, ("layers/nose",))
  with pytest.raises(ValueError, match="at least 1, not 0"):
    adapter_shapes(NETWORK.abstract, 0)


def test_fresh_adapters_change_nothing(params):
  fresh = init_adapters(jax.random.key(0), adapter_shapes(params, RANK))
  ours = velocity(adapted(params, fresh, ALPHA), adapted_ops(REFERENCE))
  np.testing.assert_array_equal(ours, velocity(params))
  assert float(jnp.abs(fresh["layers"]["ffn"]["up"]["a"]).max()) <= CFG.width**-0.5


@pytest.mark.parametrize("unrolled", [False, True])
def test_merged_is_live(params, adapters, unrolled: bool):
  live, network = adapted(params, adapters, ALPHA), NETWORK
  if unrolled:
    live, network = separate_layers(live), declare_dit(CFG, unrolled=True)
  ours = velocity(live, adapted_ops(REFERENCE), network)
  theirs = velocity(merge(params, adapters, ALPHA))
  assert float(jnp.abs(theirs - velocity(params)).max()) > 1e-2  # they do something
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_unmerged_is_the_base(params, adapters):
  back = unmerge(merge(params, adapters, ALPHA), adapters, ALPHA)
  for name, leaf in flat(params).items():
    np.testing.assert_allclose(flat(back)[name], leaf, atol=1e-6, err_msg=name)


def test_a_quantised_base_takes_adapters_and_cannot_be_merged(params, adapters):
  quant = Quant(linears="nvfp4", weights="mse", layers=("layers/.*",))
  base = quantise_params(params, quant)
  ops = quantised_ops(REFERENCE, quant, NETWORK.abstract)
  ours = velocity(adapted(base, adapters, ALPHA), adapted_ops(ops))
  merged, plain = velocity(merge(params, adapters, ALPHA)), velocity(base, ops)
  error = jnp.linalg.norm(ours - merged) / jnp.linalg.norm(merged)
  assert error < 0.35 and error < jnp.linalg.norm(plain - merged) / jnp.linalg.norm(merged)
  with pytest.raises(ValueError, match="quantised; merge adapters first"):
    merge(base, adapters, ALPHA)


def test_adapters_of_another_network_are_refused(params, adapters):
  other = {"layers": {"nose": adapters["layers"]["ffn"]["up"]}}
  with pytest.raises(ValueError, match="does not have: layers/nose"):
    adapted(params, other, ALPHA)


def test_only_adapters_have_gradients(params, adapters):
  def loss(adapters: PyTree) -> Array:
    return jnp.sum(velocity(adapted(params, adapters, ALPHA), adapted_ops(REFERENCE)) ** 2)

  def merged_loss(adapters: PyTree) -> Array:
    return jnp.sum(velocity(merge(params, adapters, ALPHA)) ** 2)

  ours, theirs = jax.grad(loss)(adapters), jax.grad(merged_loss)(adapters)
  for name, leaf in flat(theirs).items():
    scale = float(jnp.abs(leaf).max())
    np.testing.assert_allclose(flat(ours)[name], leaf, atol=2e-4 * scale, err_msg=name)


def test_scale_is_alpha_over_rank(params, adapters):
  one, two = merge(params, adapters, 1.0), merge(params, adapters, 2.0)
  kernel = lambda tree: tree["layers"]["ffn"]["up"]["kernel"]  # noqa: E731
  np.testing.assert_allclose(
    kernel(two) - kernel(params), 2 * (kernel(one) - kernel(params)), atol=1e-6
  )
  pair = adapters["layers"]["ffn"]["up"]
  change = np.einsum("lir,lro->lio", pair["a"], pair["b"]) / RANK
  np.testing.assert_allclose(kernel(one) - kernel(params), change, atol=1e-5)
  assert dataclasses.is_dataclass(adapted(params, adapters, 1.0)["layers"]["ffn"]["up"]["kernel"])
