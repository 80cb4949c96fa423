"""Passes over rows: the kernels interpreted, and what they lower to, against plain definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax.kernels import row_jobs, rows
from longlive_jax.kernels.row_jobs import Product
from longlive_jax.kernels.rows import PART, Tuning, fitting, takes
from longlive_jax.model.attention import Cached
from longlive_jax.model.between import Between, Keys, OnePass, Sum
from longlive_jax.model.kv_cache import empty_cache, stored_as
from longlive_jax.model.layers import gelu
from longlive_jax.model.ops import REFERENCE, affine_norm
from longlive_jax.model.rope import Rope, rotate
from longlive_jax.quant.fp8 import Rows, quantise_rows
from longlive_jax.quant.fp8_rows import Fp8OnePass
from longlive_jax.quant.kv import empty_quantised_cache
from longlive_jax.types import SEQ
from tests.kernels.mosaic import interpreted, lower

T, GROUPS, WIDTH, EPS = 26, 2, 2 * PART, 1e-6
BF16, F32 = jnp.bfloat16, jnp.float32


def draw(seed: int, *shape: int, dtype=F32, by: float = 1.0):
  return (by * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def a_product(seed: int, scaled: bool) -> Product:
  bias = draw(seed + 1, WIDTH)
  values = draw(seed, T, WIDTH, dtype=BF16)
  if not scaled:
    return Product(values, bias)
  return Product(
    values, bias, 0.5 + jnp.abs(draw(seed + 2, T)), 0.5 + jnp.abs(draw(seed + 3, WIDTH))
  )


X = draw(20, T, WIDTH, dtype=BF16, by=2.0)
GATE, FACTOR, SHIFT = (draw(seed, GROUPS, WIDTH) for seed in (30, 31, 32))


@pytest.fixture
def run(monkeypatch):
  """Calls a job in the interpreter, on blocks with several rows for each warpgroup."""
  monkeypatch.setattr(rows, "INLINE", False)
  monkeypatch.setattr(rows.RowsKernel, "_shares", lambda self, total: 2)

  def call(job, *args):
    with interpreted():
      return [np.asarray(each, np.float32) for each in jax.jit(job)(*args)]

  return call


def of_rows(found: list[np.ndarray]) -> np.ndarray:
  """FP8 rows and scales as numbers."""
  return found[0] * found[1][:, None]


def check_rows(found: list[np.ndarray], wanted, other: float = 0.02) -> None:
  """FP8 rows against those that `jnp` makes of `wanted`, but for a share of other codes."""
  rows = quantise_rows(wanted)
  values = np.asarray(rows.values, np.float32)
  np.testing.assert_allclose(found[1], np.asarray(rows.scales[:, 0]), rtol=8e-3)
  assert np.mean(found[0] != values) < other
  wide = np.asarray(wanted, np.float32)
  assert np.linalg.norm(of_rows(found) - wide) < 0.04 * np.linalg.norm(wide)


def by_groups(x):
  return x.reshape(GROUPS, -1, WIDTH)


def normed(x, factor, shift):
  return affine_norm(by_groups(x), factor[:, None], shift[:, None], EPS).reshape(x.shape)


def test_rows_become_fp8_as_in_jnp(run):
  zeros = X.at[3].set(0)
  found = run(row_jobs.quantise_rows, zeros)
  rows = quantise_rows(zeros)
  np.testing.assert_array_equal(found[0], np.asarray(rows.values, np.float32))
  np.testing.assert_allclose(found[1], np.asarray(rows.scales[:, 0]), rtol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_gelu_of_a_product(run, scaled):
  y = a_product(0, scaled)
  check_rows(run(row_jobs.gelu_rows, y), gelu(y.whole()))


def test_gelu_that_goes_with_a_product_in_bfloat16():
  y = a_product(0, False)
  found = np.asarray(OnePass().activate(REFERENCE, y, "a"), np.float32)
  wanted = np.asarray(gelu(y.whole()), np.float32)
  assert np.linalg.norm(found - wanted) < 6e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("quantise", [True, False])
def test_modulated_norm(run, quantise):
  found = run(lambda *a: row_jobs.norm_rows(*a, EPS, quantise), X, FACTOR, SHIFT)
  wanted = normed(X, FACTOR, SHIFT)
  if quantise:
    check_rows(found, wanted)
  else:
    np.testing.assert_allclose(found[0], np.asarray(wanted, np.float32), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("quantise", [True, False])
def test_a_residual_and_its_norm(run, gated, quantise):
  """With a gate one factor serves all groups, as between the attentions; else each has its own."""
  y = a_product(5, quantise)
  gate = GATE if gated else None
  factor, shift = (a[:1] if gated else a for a in (FACTOR, SHIFT))

  def job(x, y, factor, shift):
    return row_jobs.add_norm_rows(x, y, gate, factor, shift, EPS, quantise)

  total, *found = run(job, X, y, factor, shift)
  add = by_groups(y.whole()).astype(F32) * (GATE[:, None] if gated else 1.0)
  wanted = (by_groups(X).astype(F32) + add).astype(BF16).reshape(X.shape)
  np.testing.assert_allclose(total, np.asarray(wanted, np.float32), rtol=8e-3, atol=1e-6)
  wanted = normed(jnp.asarray(total).astype(BF16), factor, shift)
  if quantise:
    check_rows(found, wanted)
  else:
    np.testing.assert_allclose(found[0], np.asarray(wanted, np.float32), rtol=8e-3, atol=1e-5)


def test_root_mean_square_norm_of_a_product(run):
  y, weight = a_product(9, True), draw(40, WIDTH)
  (found,) = run(lambda y, w: row_jobs.rms_rows(y, w, EPS), y, weight)
  wanted = Between().rms(y, weight, EPS)
  np.testing.assert_allclose(found, np.asarray(wanted, np.float32), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("index", [0, 2])
def test_a_norm_of_one_of_several_products_that_are_side_by_side(run, index):
  each, weight = [a_product(seed, True) for seed in (9, 13, 17)], draw(40, WIDTH)
  y = each[index]
  joint = Product(
    jnp.concatenate([a.values for a in each], -1), y.bias, y.rows, y.columns, (3, index)
  )
  assert joint.shape == y.shape
  np.testing.assert_array_equal(joint.whole(), y.whole())
  for a, b in zip(
    *(run(lambda y: [OnePass().rms(y, weight, EPS)], p) for p in (joint, y)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("relative", [False, True])
def test_norms_that_turn_queries_and_keys(run, relative):
  """With positions of the window keys are turned when they are read, so nothing is turned early."""
  y, weight, x = a_product(9, True), draw(40, WIDTH), X.reshape(1, T, WIDTH)
  turn = Rope(*(jnp.asarray(f(draw(41, 1, T, 64))) for f in (jnp.cos, jnp.sin)))
  plan = Cached(1, turn, jnp.zeros(1, jnp.int32), window_rope=turn if relative else None)
  early, rest = OnePass().turns(REFERENCE, plan, x)
  assert (
    rest.rope is (turn if relative else None) and Between().turns(REFERENCE, plan, x)[1] is plan
  )
  y = Product(y.values.reshape(x.shape), y.bias, y.rows, y.columns)
  (found,) = run(lambda y, w: [OnePass().rms(y, w, EPS, early)], y, weight)
  heads = Between().rms(y, weight, EPS).reshape(1, T, -1, 128)
  wanted = (heads if relative else rotate(heads, turn)).reshape(x.shape)
  np.testing.assert_allclose(found, np.asarray(wanted, np.float32), rtol=8e-3, atol=2e-2)
  np.testing.assert_array_equal(Between().rms(y, weight, EPS, early), wanted)


@pytest.mark.parametrize("dtype", [BF16, jnp.float8_e4m3fn])
def test_keys_are_finished_where_they_are_written(run, dtype):
  """As by the plain definitions; other slots and layers stay. The interpreter knows no aliases."""
  y, weight = a_product(9, True), 200 * draw(40, WIDTH)  # beyond what E4M3 holds
  y = Product(y.values.reshape(1, T, WIDTH), y.bias, y.rows, y.columns)
  turn = Rope(*(f(draw(41, 1, T, 64)) for f in (jnp.cos, jnp.sin)))
  plan, cache = Cached(3, turn, jnp.asarray([1])), empty_cache(2, 1, 3, T, WIDTH // 128, 128, dtype)
  cache = dataclasses.replace(cache, k=cache.k + 1)
  early, rest = OnePass().turns(REFERENCE, plan, X[None])
  assert OnePass().writes_keys(REFERENCE, rest, cache, 0)
  assert not OnePass().writes_keys(REFERENCE, plan, cache, 0)  # they are turned by the plan
  assert not OnePass().writes_keys(
    REFERENCE, rest, empty_quantised_cache(cache.k.shape, BF16, "mse"), 0
  )
  assert not Between().writes_keys(REFERENCE, rest, cache, 0)

  def job(y, weight, cache):
    keys = Keys(y, weight, EPS, early, WIDTH // 128)
    return jax.tree.leaves(cache.write(1, rest.slot, keys, jnp.ones((1, T, WIDTH // 128, 128))))

  k, v = run(job, y, weight, cache)
  heads = Between().rms(y, weight, EPS, turn).reshape(1, T, -1, 128)
  plain = cache.write(1, rest.slot, heads, jnp.ones_like(heads))
  np.testing.assert_allclose(k, np.asarray(plain.k, np.float32), rtol=0.13, atol=10)
  assert np.abs(k).max() == 448 or dtype == BF16
  np.testing.assert_array_equal(v, np.asarray(plain.v, np.float32))
  kept = np.ones((2, 3), bool)
  kept[1, 1] = False
  assert (k[:, 0][kept] == 1).all()


def test_a_sum_is_added_by_what_comes_next(run):
  y, m = a_product(5, True), GATE[None, :, None]
  total = Sum(X[None], Product(y.values[None], y.bias, y.rows, y.columns), m)
  found = run(lambda s: OnePass().enter(REFERENCE, s, (1.0 + m, m), EPS, ("up",)), total)
  wanted = Between().enter(REFERENCE, Between().total(total), (1.0 + m, m), EPS, ("up",))
  for a, b in zip(found, wanted, strict=True):
    b = np.asarray(b, np.float32)
    assert np.linalg.norm(a - b) < 0.005 * np.linalg.norm(b)


def test_devices_that_share_a_block_turn_their_own_tokens():
  mesh = jax.make_mesh((2,), (SEQ,), axis_types=(jax.sharding.AxisType.Auto,))
  turn = Rope(*(draw(s, 1, T, 64) for s in (41, 42)))

  def job(x):
    ops = dataclasses.replace(REFERENCE, mesh=mesh)
    return OnePass().turns(ops, Cached(1, turn, jnp.zeros(1, jnp.int32)), x)[0]

  split = P(None, SEQ)
  found = jax.jit(jax.shard_map(job, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
  for ours, theirs in zip(*map(jax.tree.leaves, (found(X[None]), turn)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_rows_that_do_not_fit_are_left_to_jnp():
  assert takes((4, PART), BF16) and not takes((4, PART + 16), BF16) and not takes((4, PART), F32)
  assert fitting(Tuning(8, 1), 60_000, 0).warpgroups == 3
  assert fitting(Tuning(4, 1), 2000, 300_000) is None
  y = Product(draw(0, 4, 48, dtype=BF16), draw(1, 48))
  found = Fp8OnePass(frozenset({"a"})).activate(REFERENCE, y, "a")
  np.testing.assert_array_equal(np.asarray(found), np.asarray(gelu(y.whole())))
  assert (
    row_jobs.norm_rows(
      *(draw(s, 1, 64 * PART, dtype=d) for s, d in ((0, BF16), (1, F32), (2, F32))), EPS, False
    )
    is None
  )


def test_a_layer_in_one_pass_is_the_plain_layer(run):
  """All that `OnePass` and `Fp8OnePass` do, by their names, against `Between`."""
  plain, fast = Between(), Fp8OnePass(frozenset({"up", "down"}))
  x, m = X.reshape(1, T, WIDTH), GATE[None, :, None]
  y = a_product(5, True)
  y = Product(y.values.reshape(x.shape), y.bias, y.rows, y.columns)

  def job(x, m, y):
    total, rows = fast.add_norm(REFERENCE, x, y, m, (1.0 + m, m), EPS, ("up",))
    kept = OnePass().norm(REFERENCE, x, 1.0 + m, m, EPS, ("up",))
    down = fast.activate(REFERENCE, y, "down")
    out = fast.prepare(REFERENCE, x, ("up",))
    assert isinstance(rows, Rows) and isinstance(down, Rows) and isinstance(out, Rows)
    wide = [each.values.astype(F32) * each.scales for each in (rows, down, out)]
    return total, kept, *wide

  found = run(job, x, m, y)
  total, rows = plain.add_norm(REFERENCE, x, y, m, (1.0 + m, m), EPS, ("up",))
  kept = plain.norm(REFERENCE, x, 1.0 + m, m, EPS, ("up",))
  wanted = (total, kept, rows, plain.activate(REFERENCE, y, "down"), x)
  for a, b, bound in zip(found, wanted, (0.005, 0.005, 0.04, 0.04, 0.04), strict=True):
    b = np.asarray(b, np.float32)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)


@pytest.mark.parametrize("width", [3072, 14336])
def test_real_sizes_lower_for_hopper(monkeypatch, width):
  def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)

  tokens = 7040
  y = Product(shape(tokens, width, dtype=BF16), shape(width), shape(tokens), shape(width))
  assert "mosaic_gpu" in lower(monkeypatch, row_jobs.gelu_rows, y)
  if width == 3072:
    x, each = shape(tokens, width, dtype=BF16), shape(8, width)
    job = lambda x, y, g, f, s: row_jobs.add_norm_rows(x, y, g, f, s, EPS, True)  # noqa: E731
    assert "mosaic_gpu" in lower(monkeypatch, job, x, y, each, each, each)
    turned = lambda y, w, *turn: row_jobs.rms_rows(y, w, EPS, turn)  # noqa: E731
    angles = [shape(tokens, 64)] * 2
    assert "mosaic_gpu" in lower(monkeypatch, turned, y, shape(width), *angles)
    for dtype in (BF16, jnp.float8_e4m3fn):
      place = shape(4 * tokens, width, dtype=dtype), shape(1, dtype=jnp.int32)
      written = lambda y, w, *a: row_jobs.rms_rows(y, w, EPS, a[:2], a[2:])  # noqa: E731
      assert "output_operand_alias" in lower(monkeypatch, written, y, shape(width), *angles, *place)


@pytest.mark.gpu
def test_real_sizes_on_a_hopper_gpu():
  tokens, groups, width, wide = 7040, 8, 3072, 14336
  y, up = (
    Product(
      draw(seed, tokens, size, dtype=BF16, by=2.0),
      draw(seed + 1, size, by=0.5),
      0.5 + jnp.abs(draw(seed + 2, tokens, by=0.1)),
      0.7 + jnp.abs(draw(seed + 3, size, by=0.1)),
    )
    for seed, size in ((0, width), (10, wide))
  )
  x = draw(20, tokens, width, dtype=BF16, by=3.0)
  gate, factor, shift = (draw(seed, groups, width, by=0.3) for seed in (30, 31, 32))
  jobs = {
    "rows": (lambda: row_jobs.quantise_rows(x), x),
    "GELU": (lambda: row_jobs.gelu_rows(up), gelu(up.whole())),
  }
  for job, wanted in jobs.values():
    check_rows([np.asarray(each, np.float32) for each in jax.jit(job)()], wanted, 0.06)
  turn = [f(draw(40, tokens, 64)) for f in (jnp.cos, jnp.sin)]
  weight = draw(41, width)
  found = jax.jit(lambda: row_jobs.rms_rows(y, weight, EPS, turn))()[0]
  heads = Between().rms(y, weight, EPS).reshape(1, tokens, -1, 128)
  wanted = rotate(heads, Rope(*(each[None] for each in turn))).reshape(tokens, width)
  np.testing.assert_allclose(
    np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=8e-3, atol=4e-2
  )
  loud = 100 * weight  # beyond what E4M3 holds
  found = jax.jit(lambda: row_jobs.rms_rows(y, loud, EPS, turn))()[0]
  for dtype in (BF16, jnp.float8_e4m3fn):
    store = jnp.ones((4 * tokens, width), dtype)
    write = jax.jit(
      lambda store, row: row_jobs.rms_rows(y, loud, EPS, turn, (store, row))[0], donate_argnums=0
    )
    memory = store.unsafe_buffer_pointer()
    store = write(store, jnp.asarray([2 * tokens], jnp.int32))
    assert store.unsafe_buffer_pointer() == memory  # in place
    parts = store.reshape(4, tokens, width)
    np.testing.assert_array_equal(parts[2], stored_as(found, dtype))
    assert (parts[jnp.asarray([0, 1, 3])].astype(F32) == 1).all()
  for _ in range(20):  # a race would not show every time
    total, *found = jax.jit(row_jobs.add_norm_rows, static_argnums=(5, 6))(
      x, y, gate, factor, shift, EPS, True
    )
    add = (y.whole().reshape(groups, -1, width).astype(F32) * gate[:, None]).reshape(x.shape)
    wanted = (x.astype(F32) + add).astype(BF16)
    # one rounding of the product may fall the other way, and one of the sum
    bound = 2**-8 * (jnp.abs(add) + jnp.abs(x) + 1e-3)
    assert (jnp.abs(total.astype(F32) - wanted.astype(F32)) <= bound).all()
    normal = affine_norm(
      total.reshape(groups, -1, width), factor[:, None], shift[:, None], EPS
    ).reshape(x.shape)
    check_rows([np.asarray(each, np.float32) for each in found], normal, 0.06)
