"""The quantiser against plain numpy, the worked example, and measured errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.quant import ieee
from longlive_jax.quant.formats import unpack
from longlive_jax.quant.nvfp4 import (
  Spec,
  dequantise,
  fake_quantise,
  quantise,
  scale_free,
  unit_of,
)
from longlive_jax.quant.qtensor import QTensor, transposed
from longlive_jax.quant.rounding import rotate
from longlive_jax.quant.rules import RULES, find_rule
from longlive_jax.quant.semantics import in_order
from tests.parity.runner import check_file
from tests.quant import naive

EXAMPLE = """0.10986328 -0.51953125 1.3671875 0 -2.046875 0.73046875 0.25976562 -0.91015625 3.015625
  -0.04003906 0.66015625 1.1171875 -1.4765625 0.31054688 -0.20019531 2.40625"""
EXAMPLE_BYTES = {
  "static_6": ("a0053ec187431d79", 0x78),
  "mse": ("90042da186321c59", 0x76),
  "mae": ("a0053eb187431d69", 0x72),
  "abs_max": ("90042da186321c59", 0x76),
}
AMAX = np.float32(5.09375)  # of the table: it decides where scales fall between two E4M3 numbers
# relative squared error on N(0, 1): 1x16 to nearest, 16x16 to nearest, 1x16 stochastic
ERRORS = {
  "static_6": (9.050e-3, 1.2389e-2, 1.890e-2),
  "static_4": (9.637e-3, 1.6365e-2, 2.115e-2),
  "mse": (7.563e-3, 1.2373e-2, 1.433e-2),
  "mae": (7.800e-3, 1.2393e-2, 1.481e-2),
  "abs_max": (7.983e-3, 1.5391e-2, 1.499e-2),
}
run = jax.jit(quantise, static_argnums=1)
fake = jax.jit(fake_quantise, static_argnums=1)


def draw(seed: int, *shape: int) -> np.ndarray:
  """bfloat16 numbers of several magnitudes, with zeros of both signs."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
  x[..., 0, :4], x[..., 1, :2] = 0.0, -0.0
  return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def same(q: QTensor, expected: tuple[np.ndarray, np.ndarray, np.float32]) -> None:
  np.testing.assert_array_equal(unpack(q.codes), expected[0])
  np.testing.assert_array_equal(np.asarray(q.row_scales).astype(np.float32), expected[1])
  np.testing.assert_array_equal(q.amax, expected[2])


def same_bits(a: QTensor, b: QTensor) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("rule", EXAMPLE_BYTES)
@pytest.mark.parametrize("exact", [True, False])
def test_the_worked_example(rule, exact):
  x = jnp.asarray([float(v) for v in EXAMPLE.split()], jnp.bfloat16)[None]
  q = run(x, Spec(rule, exact=exact), amax=jnp.float32(5.0))
  assert np.asarray(q.codes).tobytes().hex() == EXAMPLE_BYTES[rule][0]
  assert int(q.scales.view(jnp.uint8)[0, 0]) == EXAMPLE_BYTES[rule][1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("two_d", [False, True])
def test_exact_arithmetic_is_that_of_numpy_on_ragged_shapes(rule, two_d):
  x = draw(1, 20, 40)
  q = run(x, Spec(rule, two_d, exact=True))
  assert q.shape == (20, 40) and q.padding == 8
  assert q.codes.shape == (20, 24) and q.scales.shape == (2 if two_d else 20, 3)
  same(q, naive.quantise(x, rule, two_d))


@pytest.mark.parametrize("amax", [3.0625, 3.5, 4.0, 4.0625])  # round ones make ties of scales
def test_fast_arithmetic_differs_in_less_than_a_thousandth(amax):
  x = np.clip(draw(2, 32, 64), -amax, amax)
  x[5, 7] = amax
  for rule in RULES:
    ours, exact = run(x, Spec(rule)), run(x, Spec(rule, exact=True))
    assert np.mean(np.asarray(ours.codes) != np.asarray(exact.codes)) <= 1e-3
    assert np.mean(np.asarray(ours.scales) != np.asarray(exact.scales)) <= 1e-3
  same(exact, naive.quantise(x, rule))


def test_division_is_rounded_as_on_the_host():
  ieee.check_device()


@pytest.mark.parametrize("ulp", [-2, -1, 0, 1, 2])  # how far off a device may divide
def test_float32_quotients_are_refined(ulp):
  rng = np.random.default_rng(1)
  a, b = (np.exp(rng.uniform(-8, 8, 2**20)).astype(np.float32) for _ in range(2))
  refine = jax.jit(ieee.refine, static_argnames="b")
  for divisor in (3.0, 6.0, 1536.0):
    true = a / np.float32(divisor)
    guess = (true.view(np.int32) + ulp).view(np.float32)
    np.testing.assert_array_equal(refine(guess, a, b=divisor), true)
  guess = ((a / b).view(np.int32) + ulp).view(np.float32)
  assert np.sum(np.asarray(jax.jit(ieee.refine)(guess, a, b)) != a / b) <= 2
  np.testing.assert_array_equal(jax.jit(ieee.quotient)(a, b), a / b)


def test_a_device_that_divides_badly_is_reported(monkeypatch):
  monkeypatch.setattr(ieee, "divide", lambda a, b: a * (1 / b))
  with pytest.raises(RuntimeError, match=r"x / 6 is wrongly rounded on .* for \d+ of 4096"):
    ieee.check_device(4096)


def test_a_fused_square_is_rounded_once():
  rng = np.random.default_rng(0)
  a, b = (rng.normal(size=4096).astype(np.float32) for _ in range(2))
  wide = a.astype(np.float64)
  once = (wide * wide + b).astype(np.float32)
  np.testing.assert_array_equal(jax.jit(ieee.square_add)(a, b), once)
  assert np.any(once != a * a + b)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("rule", ["mse", "mae", "abs_max"])
def test_errors_are_summed_in_the_stated_order(rows, rule):
  residual = np.random.default_rng(2).normal(size=(40, rows, 3, 16)).astype(np.float32)
  total = np.asarray(jax.jit(in_order, static_argnums=1)(residual, find_rule(rule).error))
  assert total.shape == (40, 1, 3, 1)
  for i, j in np.ndindex(40, 3):
    assert total[i, 0, j, 0] == naive.error(residual[i, :, j], rule)


@pytest.mark.parametrize("rule", ["mse", "static_6"])
def test_square_blocks_of_the_transpose_are_the_transpose(rule):
  w = draw(3, 48, 32)
  spec = Spec(rule, two_d=True, exact=True)
  direct = run(w.T.copy(), spec)
  same_bits(transposed(run(w, spec)), direct)
  same_bits(run(w, dataclasses.replace(spec, transpose=True)), direct)


def test_transposition_comes_before_filling_up():
  x = draw(4, 20, 40)
  q = run(x, Spec(transpose=True, exact=True))
  assert q.shape == (40, 20)
  same(q, naive.quantise(np.ascontiguousarray(x.T), "mse"))


@pytest.mark.parametrize("transpose", [False, True])
def test_hadamard_runs_along_the_blocks_and_fills_up_first(transpose):
  x = draw(5, 24, 40)
  q = run(x, Spec("static_6", transpose=transpose, hadamard=True, exact=True))
  rows = x.T if transpose else x
  filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))
  assert q.shape == filled.shape and q.padding == 0
  turned = np.asarray(rotate(jnp.asarray(filled)).astype(jnp.float32))
  same(q, naive.quantise(turned, "static_6"))


def test_stacked_layers_have_an_amax_each():
  x = np.stack([draw(6, 16, 32), 100 * draw(7, 16, 32)])
  q = run(x, Spec(exact=True, lead=1))
  assert q.amax.shape == (2,)
  for layer in range(2):
    same(jax.tree.map(lambda a, layer=layer: a[layer], q), naive.quantise(x[layer], "mse"))
  whole = run(x, Spec(exact=True))
  assert whole.amax.shape == ()
  flat = naive.quantise(x.reshape(32, 32), "mse")
  same(jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]) if a.ndim else a, whole), flat)


def test_a_given_amax_makes_parts_agree_with_the_whole():
  x = draw(8, 32, 32)
  whole = run(x, Spec(exact=True))
  part = run(x[:16], Spec(exact=True), amax=whole.amax)
  np.testing.assert_array_equal(part.codes, whole.codes[:16])
  small = run(x, Spec("static_6", exact=True), amax=jnp.float32(0.5))
  same(small, naive.quantise(x, "static_6", amax=0.5))
  assert float(jnp.max(small.scales.astype(jnp.float32))) == 448.0
  per_batch = run(np.stack([x, x]), Spec(exact=True), amax=jnp.array([float(whole.amax), 0.5]))
  same(jax.tree.map(lambda a: a[1], per_batch), naive.quantise(x, "mse", amax=0.5))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("power", [-115, -90, 40, 120])
def test_powers_of_two_change_nothing_but_amax(exact, power):
  x = draw(9, 16, 32)
  scaled = x * np.float32(2.0**power)
  q, other = run(x, Spec(exact=exact)), run(scaled, Spec(exact=exact))
  np.testing.assert_array_equal(other.codes, q.codes)
  np.testing.assert_array_equal(other.scales, q.scales)
  assert float(other.amax) == float(q.amax) * 2.0**power


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-39])
def test_a_tensor_of_nothing_becomes_zero(exact, value):
  q = run(jnp.full((16, 16), value, jnp.float32), Spec(exact=exact))
  assert not np.any(q.codes) and not np.any(q.scales.view(jnp.uint8))
  assert not np.any(dequantise(q, jnp.float32))


@pytest.mark.parametrize("exact", [True, False])
def test_blocks_far_below_the_largest_have_zero_codes(exact):
  x = np.full((2, 16), -1e-9, np.float32)
  x[0, 0] = 1.0
  q = run(x, Spec(exact=exact))
  assert not np.any(q.codes[1]) and not np.any(q.scales[1].view(jnp.uint8))


@pytest.mark.parametrize("rule", ["static_6", "mse"])
@pytest.mark.parametrize("exact", [True, False])
def test_nan_is_seen_everywhere(rule, exact):
  x = jnp.ones((2, 32)).at[1, 3].set(jnp.nan)
  q = run(x, Spec(rule, exact=exact))
  assert np.isnan(q.amax) and np.all(np.isnan(np.asarray(q.scales).astype(np.float32)))
  assert np.all(np.isnan(dequantise(q, jnp.bfloat16).astype(jnp.float32)))


def test_bfloat16_holds_every_code_times_every_scale():
  codes = np.broadcast_to(np.arange(256, dtype=np.uint8), (127, 256))
  scales = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn)
  q = QTensor(
    jnp.asarray(codes), jnp.asarray(np.repeat(scales[:, None], 32, 1)), jnp.float32(1), "mse"
  )
  free = jax.jit(scale_free)(q)
  elements = np.stack([codes & 15, codes >> 4], -1).reshape(127, 512)
  expected = naive.decode(elements).astype(np.float64) * scales.astype(np.float64)[:, None]
  assert free.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(free, np.float64), expected)


@pytest.mark.parametrize("rule", RULES)
def test_dequantised_values_follow_the_formula(rule):
  x = draw(10, 2, 16, 40)
  q = run(x, Spec(rule, lead=1))
  m2, m4 = naive.TARGETS[rule]
  assert find_rule(rule).c == m2 * m4
  values = naive.decode(np.asarray(unpack(q.codes))).reshape(2, 16, 3, 16)
  scales = np.asarray(q.row_scales).astype(np.float32)
  free = (values * scales[..., None]).reshape(2, 16, 48)[..., :40]
  amax = np.asarray(q.amax)[:, None, None]
  wide = free.astype(np.float64) * amax / (m2 * m4)
  np.testing.assert_allclose(dequantise(q, jnp.float32), wide, 2.5e-7, 0)
  ordered = (free * amax) / np.float32(m2 * m4)
  exact = jax.jit(functools.partial(dequantise, dtype=jnp.float32, exact=True))(q)
  np.testing.assert_array_equal(exact, ordered)
  np.testing.assert_allclose(unit_of(q), np.asarray(q.amax) / (m2 * m4), 1.2e-7)


def test_operands_without_scale_give_the_product_of_the_quantised_matrices():
  a, b = (jax.random.normal(jax.random.key(i), (24, 14336), jnp.bfloat16) for i in range(2))
  left, right = run(a, Spec("static_6")), run(b, Spec("mse"))
  sums = jnp.dot(scale_free(left), scale_free(right).T, preferred_element_type=jnp.float32)
  ours = (sums * (unit_of(left) * unit_of(right))).astype(jnp.bfloat16)
  wide = [np.asarray(scale_free(q), np.float64) for q in (left, right)]
  alpha = np.float64(left.amax) * np.float64(right.amax) / (2688 * 1536)
  expected = jnp.asarray((wide[0] @ wide[1].T * alpha).astype(np.float32)).astype(jnp.bfloat16)
  assert np.mean(np.asarray(ours) != np.asarray(expected)) <= 1e-3


@pytest.fixture(scope="module")
def gaussian() -> jax.Array:
  x = jax.random.normal(jax.random.key(1234), (512, 2048), jnp.float32)
  return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["1x16", "16x16", "stochastic"])
def test_error_on_normal_numbers_is_that_of_the_table(gaussian, rule, kind):
  spec = Spec(rule, two_d=kind == "16x16", stochastic=kind == "stochastic")
  y = fake(gaussian, spec, amax=AMAX, key=jax.random.key(0))
  x = np.asarray(gaussian, np.float64)
  error = np.sum((np.asarray(y) - x) ** 2) / np.sum(x**2)
  expected = ERRORS[rule][("1x16", "16x16", "stochastic").index(kind)]
  assert error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("transpose", [False, True])
def test_fake_quantisation_is_there_and_back(exact, transpose):
  x = jnp.asarray(draw(11, 2, 20, 40), jnp.bfloat16)
  spec = Spec("mae", transpose=transpose, exact=exact, lead=1)
  there = dequantise(run(x, spec), jnp.bfloat16, exact=exact)
  back = jnp.swapaxes(there, -1, -2) if transpose else there
  ours = fake(x, spec)
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_array_equal(ours, back)


def test_the_gradient_of_fake_quantisation_is_the_identity():
  x, weights = jnp.asarray(draw(12, 16, 32)), jnp.asarray(draw(13, 16, 32))
  spec = Spec(stochastic=True)

  def loss(x, key, amax):
    return jnp.sum(fake_quantise(x, spec, key=key, amax=amax) * weights)

  for amax in (None, jnp.float32(2.0)):
    gradient = jax.jit(jax.grad(loss))(x, jax.random.key(0), amax)
    np.testing.assert_array_equal(gradient, weights)


@pytest.mark.parametrize("spec", [Spec(exact=True), Spec(two_d=True)])
def test_eager_jit_vmap_and_scan_agree_and_leave_precision_alone(spec):
  x = jnp.asarray(draw(14, 2, 16, 32))
  eager = [quantise(layer, spec) for layer in x]
  expected = jax.tree.map(lambda *layers: jnp.stack(layers), *eager)
  same_bits(jax.jit(jax.vmap(lambda x: quantise(x, spec)))(x), expected)
  same_bits(jax.lax.scan(lambda c, x: (c, quantise(x, spec)), None, x)[1], expected)
  same_bits(run(x, dataclasses.replace(spec, lead=1)), expected)
  assert not jax.config.jax_enable_x64
  assert expected.amax.dtype == jnp.float32 and jnp.ones(2).dtype == jnp.float32


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("two_d", [True, False])
def test_the_mesh_does_not_matter(exact, two_d):
  x = jnp.asarray(draw(15, 64, 128), jnp.bfloat16)
  spec = Spec("mse", two_d, stochastic=True, exact=exact)
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
  spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
  key = jax.random.key(5)
  same_bits(run(spread, spec, key=key), run(x, spec, key=key))


def test_what_cannot_be_quantised_is_refused():
  x = jnp.ones((2, 16))
  with pytest.raises(ValueError, match=r"scale rule='static' must be one of .*static_4"):
    Spec("static")
  with pytest.raises(ValueError, match="lead=-1 must be at least 0"):
    Spec(lead=-1)
  with pytest.raises(ValueError, match=r"cannot quantise float32 \(16,\): .* 2 axes or more"):
    quantise(x[0], Spec())
  with pytest.raises(ValueError, match=r"cannot quantise float32 \(2, 16\): .* 3 axes .*lead=1"):
    quantise(x, Spec(lead=1))
  with pytest.raises(ValueError, match="cannot quantise int32"):
    quantise(x.astype(jnp.int32), Spec())
  with pytest.raises(ValueError, match="needs a key"):
    quantise(x, Spec(stochastic=True))
  with pytest.raises(ValueError, match=r"amax has shape \(2,\); it must be \(\)"):
    quantise(x, Spec(), amax=jnp.ones(2))
  with pytest.raises(ValueError, match="has no fake quantisation"):
    fake_quantise(x, Spec(hadamard=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4_dev", "nvfp4_blocks_dev"])
def test_the_gpu_has_the_recorded_bits(golden, name):
  ieee.check_device()
  report = check_file(golden / f"{name}.npz")
  assert not report.problem
  assert not [record.name for record in report.compared if not record.passed]
