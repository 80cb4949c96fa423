"""Queries, keys and values in one FP8 product make the block that three products make."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config.load import load_config
from longlive_jax.eval import bench_block
from longlive_jax.eval.bench import relative_error
from longlive_jax.model.between import Beside, OnePass
from longlive_jax.model.dit import TextKV, declare_dit, separate_layers
from longlive_jax.model.ops import REFERENCE
from longlive_jax.quant.joint import joins, unrolled_params
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.sample.latents import block_shape
from tests.launch.tiny import OVERRIDES

SIZES = {**OVERRIDES, "model.width": 64, "model.heads": 2, "model.dtype": "bfloat16"}
FAST = dataclasses.replace(REFERENCE, between=OnePass())


@pytest.fixture(scope="module")
def experiment():
  return bench_block.varied(load_config("configs/tiny.py", SIZES), "fp8", "none")


def ops_of(experiment, ops=FAST):
  return quantised_ops(ops, experiment.quant, declare_dit(experiment.model).abstract)


def test_a_block_of_joint_products(experiment):
  drawn = bench_block.random_params(experiment)
  params, ops = quantise_params(drawn, experiment.quant), ops_of(experiment)
  text = bench_block.random_text(experiment)
  text = TextKV(tuple(text.k), tuple(text.v))
  noise = jax.random.normal(jax.random.key(4), block_shape(experiment, 1))
  job = jax.jit(bench_block.one_block(experiment, FAST, unrolled=True))
  joint, apart = unrolled_params(params, ops), separate_layers(params)
  own = joint["layers"][0]["self_attn"]
  assert own["q"]["kernel"].values.shape[0] == 3 * experiment.model.width
  assert isinstance(own["k"]["kernel"], Beside) and isinstance(own["v"]["kernel"], Beside)
  found, wanted = (
    job(each, bench_block.cache_of(experiment, unrolled=True), noise, text)
    for each in (joint, apart)
  )
  assert relative_error(found[0], wanted[0]) < 1e-3
  for a, b in zip(*(jax.tree.leaves(each[1]) for each in (found, wanted)), strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.02
    )
  plain = job(separate_layers(drawn), bench_block.cache_of(experiment, unrolled=True), noise, text)
  assert relative_error(found[0], plain[0]) < 0.04


def test_where_they_are_apart(experiment):
  assert joins(ops_of(experiment))
  layers = dataclasses.replace(experiment.quant, layers=("layers/ffn/.*", "layers/self_attn/[qk]"))
  other = dataclasses.replace(experiment, quant=layers)
  for ops in (
    ops_of(other),  # values are not quantised
    ops_of(experiment, REFERENCE),  # no kernels
    FAST,  # nothing is quantised
    dataclasses.replace(ops_of(experiment), mesh=jax.make_mesh((1,), ("seq",))),
  ):
    assert not joins(ops)
  params = quantise_params(bench_block.random_params(experiment), experiment.quant)
  kernel = unrolled_params(params, FAST)["layers"][0]["self_attn"]["k"]["kernel"]
  assert kernel.values.dtype == jnp.float8_e4m3fn
