"""QTensor as a value: transformations, sharding, files, and the form for interchange."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.io.checkpoint import MismatchError, TrainCheckpointer, load_params, save_params
from longlive_jax.quant.formats import pack, unpack
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise
from longlive_jax.quant.qtensor import QTensor, from_tiles, to_tiles, transposed
from longlive_jax.types import PyTree

L, M, N = 3, 20, 40
run = jax.jit(quantise, static_argnums=1)


@pytest.fixture(scope="module")
def stacked() -> QTensor:
  x = jax.random.normal(jax.random.key(0), (L, M, N), jnp.float32)
  return run(x, Spec("mae", lead=1))


@pytest.fixture(scope="module")
def matrix(stacked: QTensor) -> QTensor:
  return jax.tree.map(lambda a: a[1], stacked)


def same(a: PyTree, b: PyTree) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bytes_and_shapes(stacked):
  assert stacked.shape == (L, M, N) and stacked.padding == 8
  assert stacked.codes.shape == (L, M, 24) and stacked.codes.dtype == jnp.uint8
  assert stacked.scales.shape == (L, M, 3) and stacked.scales.dtype == jnp.float8_e4m3fn
  assert stacked.amax.shape == (L,) and stacked.amax.dtype == jnp.float32
  assert stacked.nbytes == L * M * (24 + 3) + 4 * L  # 0.5625 bytes an element of 48


def test_a_slice_knows_its_shape_rule_and_values(stacked, matrix):
  assert matrix.shape == (M, N) and matrix.rule == "mae" and matrix.amax.shape == ()
  whole = dequantise(stacked, jnp.float32)
  np.testing.assert_array_equal(dequantise(matrix, jnp.float32), whole[1])


def test_scan_over_stacked_layers(stacked):
  x = jax.random.normal(jax.random.key(1), (2, N))

  @jax.jit
  def forward(weights):
    def layer(x, w):
      assert isinstance(w, QTensor) and w.shape == (M, N)
      return x, x @ dequantise(w, jnp.float32).T

    return jax.lax.scan(layer, x, weights)[1]

  expected = np.einsum("sn,lmn->lsm", x, dequantise(stacked, jnp.float32))
  np.testing.assert_allclose(forward(stacked), expected, 1e-5, 1e-5)


def test_jit_and_vmap_return_the_same_value(stacked):
  same(jax.jit(lambda q: q)(stacked), stacked)
  same(jax.vmap(lambda q: q)(stacked), stacked)
  assert jax.tree.structure(jax.jit(lambda q: q)(stacked)) == jax.tree.structure(stacked)


def test_rule_and_blocks_are_part_of_the_type(matrix):
  traced = []

  @jax.jit
  def f(q):
    traced.append(q.rule)
    return dequantise(q, jnp.float32)

  six = dataclasses.replace(matrix, rule="static_6")
  np.testing.assert_allclose(f(matrix), np.asarray(f(six)) * (2688 / 1536), 1e-6)
  assert traced == ["mae", "static_6"]


def test_donated_arrays_are_reused(stacked):
  given = jax.tree.map(jnp.copy, stacked)
  step = jax.jit(lambda q: dataclasses.replace(q, codes=q.codes ^ 0x88), donate_argnums=0)
  negated = step(given)
  assert given.codes.is_deleted() and given.scales.is_deleted() and given.amax.is_deleted()
  np.testing.assert_array_equal(
    dequantise(negated, jnp.float32), -np.asarray(dequantise(stacked, jnp.float32))
  )


def test_it_can_be_spread_over_a_mesh():
  x = jax.random.normal(jax.random.key(2), (32, 128))
  q = run(x, Spec())
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
  split = NamedSharding(mesh, PartitionSpec("a", "b"))
  whole = NamedSharding(mesh, PartitionSpec())
  spread = jax.device_put(q, dataclasses.replace(q, codes=split, scales=split, amax=whole))
  assert spread.codes.sharding == split and spread.codes.addressable_shards[0].data.shape == (8, 32)
  assert spread.scales.addressable_shards[0].data.shape == (8, 4)
  same(spread, q)
  dense = jax.jit(dequantise, static_argnums=1)
  np.testing.assert_array_equal(dense(spread, jnp.float32), dense(q, jnp.float32))


def test_a_shard_is_a_whole_tensor_inside_shard_map():
  x = jax.random.normal(jax.random.key(3), (32, 128))
  q = run(x, Spec(exact=True))
  mesh = Mesh(np.array(jax.devices()), ("a",))
  place = PartitionSpec("a")
  spec = dataclasses.replace(q, codes=place, scales=place, amax=PartitionSpec())
  island = jax.shard_map(
    lambda x: quantise(x, Spec(exact=True), amax=jax.lax.pmax(jnp.max(jnp.abs(x)), "a")),
    mesh=mesh,
    in_specs=place,
    out_specs=spec,
  )
  same(jax.jit(island)(x), q)


def trees(q: QTensor) -> dict[str, PyTree]:
  return {"dit": {"layers": {"up": q}, "head": jax.tree.map(lambda a: a[0], q)}}


def shapes(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def test_weights_are_saved_a_layer_at_a_time_and_read_back(tmp_path, stacked):
  saved = trees(stacked)
  save_params(tmp_path / "w", saved, {}, {})
  loaded = load_params(tmp_path / "w", shapes(saved))
  same(loaded, saved)
  assert loaded["dit"]["layers"]["up"].rule == "mae"
  assert jax.tree.structure(loaded) == jax.tree.structure(saved)
  other = shapes(trees(jax.tree.map(lambda a: a[:, :8] if a.ndim > 1 else a, stacked)))
  with pytest.raises(MismatchError, match="dit/head/codes. has shape \\(20, 24\\)"):
    load_params(tmp_path / "w", other)


def test_weights_that_are_not_finite_are_refused(tmp_path, stacked):
  bad = dataclasses.replace(stacked, scales=stacked.scales.at[1, 2, 0].set(jnp.nan))
  save_params(tmp_path / "w", trees(bad), {}, {})
  with pytest.raises(ValueError, match="dit/layers/1/up/scales.* not finite"):
    load_params(tmp_path / "w", shapes(trees(bad)))


def test_a_training_state_with_quantised_weights_is_restored_onto_a_mesh(tmp_path):
  q = run(jax.random.normal(jax.random.key(4), (128, 64)), Spec("static_6", two_d=True))
  with TrainCheckpointer(tmp_path / "run", every=1, keep=1) as checkpointer:
    checkpointer.save(1, {"w": q})
    mesh = Mesh(np.array(jax.devices()), ("a",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["a"], []))
    places = dataclasses.replace(q, codes=split, scales=split, amax=whole)
    template = {"w": jax.device_put(jax.tree.map(jnp.zeros_like, q), places)}
    restored = checkpointer.restore_latest(template)["w"]
  same(restored, q)
  assert restored.codes.sharding == split and restored.blocks == "16x16"


@pytest.mark.parametrize("shape", [(20, 40), (128, 64), (130, 80)])
def test_tiles_are_padded_with_zeros_and_read_back(shape):
  q = run(jax.random.normal(jax.random.key(5), shape), Spec("mse"))
  codes, scales, amax = to_tiles(q)
  rows, columns = (-(-shape[0] // 128) * 128, -(-shape[1] // 64) * 64)
  assert codes.shape == (rows, columns // 2) and scales.shape == (rows * columns // 16,)
  assert not np.any(codes[shape[0] :]) and np.sum(np.asarray(codes) != 0) <= np.prod(shape) // 2
  for number in (amax, amax[None]):  # files hold either
    again = from_tiles(codes, scales, number, rule="mse", shape=shape)
    same(again, q)
    assert again.shape == shape
  same(from_tiles(codes, scales.view(jnp.uint8), amax, rule="mse", shape=shape), q)


def test_tiles_of_another_shape_or_rule_are_refused(matrix):
  codes, scales, amax = to_tiles(matrix)
  with pytest.raises(ValueError, match="codes has shape .* must be \\(256, 32\\)"):
    from_tiles(codes, scales, amax, rule="mae", shape=(200, 40))
  with pytest.raises(ValueError, match="scale rule='l1' must be one of"):
    from_tiles(codes, scales, amax, rule="l1", shape=(M, N))
  with pytest.raises(ValueError, match="blocks='2d' must be one of"):
    from_tiles(codes, scales, amax, rule="mae", shape=(M, N), blocks="2d")


def test_square_blocks_are_transposed_without_rounding():
  q = run(jax.random.normal(jax.random.key(6), (2, 32, 24)), Spec(two_d=True, lead=1))
  turned = transposed(q)
  assert turned.shape == (2, 24, 32) and turned.padding == 0
  expected = np.swapaxes(dequantise(q, jnp.float32), 1, 2)
  np.testing.assert_array_equal(dequantise(turned, jnp.float32), expected)
  np.testing.assert_array_equal(pack(unpack(turned.codes)), turned.codes)


def test_row_blocks_and_open_squares_are_not_transposed(matrix):
  with pytest.raises(ValueError, match="blocks='1x16' must be one of 16x16"):
    transposed(matrix)
  ragged = run(jnp.ones((20, 32)), Spec(two_d=True))
  with pytest.raises(ValueError, match="rows=20 must be a positive multiple of block=16"):
    transposed(ragged)
