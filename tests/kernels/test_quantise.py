"""The fused quantiser: the kernel interpreted, and what it lowers to, against plain definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.kernels import quantise_reference as reference
from longlive_jax.kernels.quantise import Tuning, fake_quantise_rows, quantise_rows
from longlive_jax.kernels.quantise_blocks import sixth
from longlive_jax.kernels.timing import alternated_seconds
from longlive_jax.quant.formats import e2m1_decode, unpack
from longlive_jax.quant.nvfp4 import Spec, quantise, scale_free
from longlive_jax.quant.rules import RULES
from tests.quant import naive

COLUMNS = 80  # five blocks, and 125 rows of them are neither a tile nor whole steps
ROWS = 125
SHAPES = [(7040, 14336), (7040, 3072), (75, 48)]


@jax.jit
def _bf16(x):
  return x.astype(jnp.bfloat16)


def _inputs() -> dict[str, np.ndarray]:
  draw = np.random.default_rng(3)
  normal = draw.standard_normal((ROWS, COLUMNS))
  signed_zero = np.where(draw.random((ROWS, COLUMNS)) < 0.3, -0.0, normal)
  return {
    "normal": normal,
    "decades": normal * 10.0 ** draw.uniform(-8, 0, (ROWS, 1)),
    "whole": draw.integers(-8, 9, (ROWS, COLUMNS)),
    "ones": np.ones((ROWS, COLUMNS)),
    "zero rows, -0.0": signed_zero * (np.arange(ROWS)[:, None] % 3 > 0),
    "zeros": np.zeros((ROWS, COLUMNS)),
  }


INPUTS = {name: _bf16(values) for name, values in _inputs().items()}


def _largest(x):
  return jnp.max(jnp.abs(x)).astype(jnp.float32)


def _interpreted(function, x, amax, rule, steps=2):
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    run = jax.jit(function, static_argnums=(2, 3))
    return run(x, np.float32(amax), rule, Tuning(steps=steps))


_quantised = jax.jit(quantise, static_argnums=1)


def _errors(x, codes, scales, amax, rule):
  """Float64 error of each block, in units of amax / C."""
  blocks = np.asarray(x, np.float64).reshape(-1, 16) * (rule.m2 * rule.m4 / np.float64(amax))
  values = np.asarray(e2m1_decode(unpack(codes)), np.float64).reshape(-1, 16)
  d = np.abs(values * np.asarray(scales, np.float64).reshape(-1, 1) - blocks)
  return {"square": (d * d).sum(1), "absolute": d.sum(1), "largest": d.max(1)}[rule.error]


def _check_same(x, amax, rule, ours, theirs):
  """Equal, but where both candidates of a block are equally good."""
  codes, scales = (np.asarray(each) for each in ours)
  their_codes, their_scales = (np.asarray(each) for each in theirs)
  blocks = codes.reshape(-1, 8), their_codes.reshape(-1, 8)
  differ = (blocks[0] != blocks[1]).any(1)
  differ |= (scales.astype(np.float32) != their_scales.astype(np.float32)).reshape(-1)
  if not rule.error:
    assert not differ.any()
  if differ.any():
    a, b = (_errors(x, *pair, amax, rule)[differ] for pair in (ours, theirs))
    rtol = {"square": 2e-6, "absolute": 8e-6, "largest": 3e-5}[rule.error]
    np.testing.assert_allclose(a, b, rtol=rtol)
  return int(differ.sum())


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", INPUTS)
def test_codes_are_those_of_quant(name, rule):
  x = INPUTS[name]
  amax = _largest(x)
  ours = _interpreted(quantise_rows, x, amax, rule)
  theirs = _quantised(x, Spec(rule.name, exact=True), amax=amax)
  assert ours[0].shape == theirs.codes.shape and ours[0].dtype == jnp.uint8
  assert ours[1].shape == theirs.scales.shape and ours[1].dtype == jnp.float8_e4m3fn
  differ = _check_same(x, amax, rule, ours, (theirs.codes, theirs.scales))
  assert differ <= (40 if name == "whole" else 2), f"{differ} of 625 blocks are ties"


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("factor", [0.1, 300.0])
def test_amax_that_is_not_the_largest(rule, factor):
  """Smaller: scales and elements saturate. Larger: scales are small, some underflow."""
  x = INPUTS["decades"]
  amax = _largest(x) * np.float32(factor)
  ours = _interpreted(quantise_rows, x, amax, rule)
  theirs = _quantised(x, Spec(rule.name, exact=True), amax=amax)
  assert _check_same(x, amax, rule, ours, (theirs.codes, theirs.scales)) <= 2
  codes = np.asarray(unpack(ours[0]))
  assert (factor > 1 or (codes & 7 == 7).sum() > 500) and np.asarray(ours[1]).any()


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", ["normal", "decades", "zero rows, -0.0"])
def test_jnp_reference(name, rule):
  x, amax = INPUTS[name], _largest(INPUTS[name])
  ours = _interpreted(quantise_rows, x, amax, rule)
  theirs = jax.jit(reference.quantise_rows, static_argnums=2)(x, amax, rule)
  _check_same(x, amax, rule, ours, theirs)
  values = _interpreted(fake_quantise_rows, x, amax, rule)
  others = jax.jit(reference.fake_quantise_rows, static_argnums=2)(x, amax, rule)
  same = (np.asarray(ours[1]) == np.asarray(theirs[1])).repeat(16, 1)
  bits = [np.asarray(each).view(np.uint16)[same] for each in (values, others)]
  np.testing.assert_array_equal(*bits)  # signs of zeros too


@pytest.mark.parametrize("name", ["normal", "decades", "zero rows, -0.0", "zeros"])
def test_fake_values_are_the_codes_dequantised(name):
  x, amax, rule = INPUTS[name], _largest(INPUTS[name]), RULES["mse"]
  codes, scales = _interpreted(quantise_rows, x, amax, rule)
  packed = dataclasses.replace(_quantised(x, Spec("mse"), amax=amax), codes=codes, scales=scales)
  values = _interpreted(fake_quantise_rows, x, amax, rule)
  bits = [np.asarray(each).view(np.uint16) for each in (values, scale_free(packed))]
  np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_a_few_blocks_by_hand(rule):
  """Fewer blocks than threads, against a loop over elements in numpy."""
  x = INPUTS["normal"][:3, :48]
  amax = _largest(x)
  codes, scales = _interpreted(quantise_rows, x, amax, rule, steps=8)
  wanted, wanted_scales, _ = naive.quantise(np.asarray(x, np.float32), rule.name)
  np.testing.assert_array_equal(unpack(codes), wanted)
  np.testing.assert_array_equal(np.asarray(scales, np.float32), wanted_scales)


@pytest.mark.parametrize("fused", [True, False])
def test_a_sixth_is_correctly_rounded(fused):
  """With products fused into sums, as compilers may, and without."""
  x = np.exp(np.random.default_rng(5).uniform(-30, 30, 2**18)).astype(np.float32)
  ours = (jax.jit(sixth) if fused else sixth)(jnp.asarray(x))
  assert np.sum(np.asarray(ours) != x / np.float32(6)) <= 1


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.error])
@pytest.mark.parametrize("amax", [3.0, 7.0, 13.0])
def test_two_exact_candidates_keep_six(rule, amax):
  """Rounding noise must not decide: both candidates represent these blocks."""
  scales = [m * 2.0**e for m in (8, 10, 12) for e in range(-7, 5)]
  columns = np.repeat(np.asarray(scales) * amax / 256, 16)
  x = jnp.asarray(columns[None] * np.ones((3, 1)), jnp.bfloat16)
  _, ours = _interpreted(quantise_rows, x, amax, rule)
  np.testing.assert_array_equal(np.asarray(ours, np.float32)[0], scales)


@pytest.mark.parametrize("name", ["static_6", "mse"])
@pytest.mark.parametrize("amax", [3.0625, 3.5])
def test_round_amax(name, amax):
  """Then scales are ties of E4M3, and the last bit of a sixth decides."""
  x = jnp.clip(INPUTS["normal"], -amax, amax)
  ours = _interpreted(quantise_rows, x, amax, RULES[name])
  theirs = _quantised(x, Spec(name, exact=True), amax=np.float32(amax))
  assert _check_same(x, amax, RULES[name], ours, (theirs.codes, theirs.scales)) <= 1


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (26, 1), (51, 2), (52, 2), (77, 3)])
def test_ragged_rows(rows, steps):
  """5, 130, 255, 260 and 385 blocks: less than a step, and tiles that overlap."""
  x, rule = INPUTS["normal"][:rows], RULES["static_6"]
  ours = _interpreted(quantise_rows, x, 4.0, rule, steps)
  theirs = _quantised(x, Spec("static_6", exact=True), amax=np.float32(4))
  assert _check_same(x, 4.0, rule, ours, (theirs.codes, theirs.scales)) == 0


def test_a_tensor_that_is_too_small_becomes_zero():
  x = INPUTS["normal"] * jnp.bfloat16(2.0**-110)
  codes, scales = _interpreted(quantise_rows, x, _largest(x), RULES["mse"])
  assert not np.asarray(codes).any() and not np.asarray(scales, np.float32).any()
  x = INPUTS["normal"] * jnp.bfloat16(2.0**-90)
  ours = _interpreted(quantise_rows, x, _largest(x), RULES["mse"])
  theirs = _interpreted(quantise_rows, INPUTS["normal"], _largest(INPUTS["normal"]), RULES["mse"])
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
  ("x", "amax", "said"),
  [
    (jnp.zeros((4, 32)), jnp.float32(1), "x is float32"),
    (jnp.zeros((2, 4, 32), jnp.bfloat16), jnp.float32(1), r"x is bfloat16 \(2, 4, 32\)"),
    (jnp.zeros((4, 40), jnp.bfloat16), jnp.float32(1), "columns=40 must be .* use 32 or 48"),
    (jnp.zeros((4, 32), jnp.bfloat16), jnp.ones(4), r"amax has shape \(4,\)"),
  ],
)
def test_what_it_refuses(x, amax, said):
  with pytest.raises(ValueError, match=said):
    quantise_rows(x, amax, RULES["mse"])


def test_more_elements_than_an_index_counts():
  x = jax.ShapeDtypeStruct((2**20, 2048), jnp.bfloat16)
  amax = jax.ShapeDtypeStruct((), jnp.float32)
  with pytest.raises(ValueError, match="fewer than 2"):
    jax.eval_shape(lambda *args: quantise_rows(*args, RULES["mse"]), x, amax)


def _lowered(function, shape, rule, steps=8) -> str:
  """StableHLO for CUDA; raises where Mosaic GPU refuses the kernel."""
  device = jax.sharding.AbstractDevice(device_kind="a GPU", platform="gpu", num_cores=132)
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  x, amax = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)

  def run(x, amax):
    return function(x, amax, rule, Tuning(steps=steps))

  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(run).trace(x, amax).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [quantise_rows, fake_quantise_rows])
def test_lowers_for_a_gpu(function, shape):
  rules = RULES.values() if shape == SHAPES[0] else [RULES["mse"]]
  for rule in rules:
    text = _lowered(function, shape, rule)
    assert text.count("@mosaic_gpu") == 1, "one kernel, and nothing else reads x"
    assert "stablehlo.slice" not in text or shape == SHAPES[-1]


@pytest.fixture(scope="module")
def real():
  """The input of the larger product of a layer at 5B, and its amax."""
  x = jax.random.normal(jax.random.key(0), SHAPES[0], jnp.bfloat16)
  return x, _largest(x)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_on_a_gpu(real, rule):
  x, amax = real
  ours = jax.jit(quantise_rows, static_argnums=2)(x, amax, rule)
  theirs = jax.jit(lambda x, amax: quantise(x, Spec(rule.name), amax=amax))(x, amax)
  assert _check_same(x, amax, rule, ours, (theirs.codes, theirs.scales)) < 1e-3 * x.size / 16
  values = jax.jit(fake_quantise_rows, static_argnums=2)(x, amax, rule)
  packed = dataclasses.replace(theirs, codes=ours[0], scales=ours[1])
  assert jnp.array_equal(values, jax.jit(scale_free)(packed))


@pytest.mark.gpu
def test_faster_than_jnp(real):
  x, amax = real
  kernel = jax.jit(lambda x, amax: quantise_rows(x, amax, RULES["mse"]))
  plain = jax.jit(lambda x, amax: quantise(x, Spec("mse"), amax=amax))
  seconds = alternated_seconds({"kernel": kernel, "plain": plain}, x, amax)
  medians = {name: float(np.median(each)) for name, each in seconds.items()}
  assert medians["plain"] > 3 * medians["kernel"], medians


def test_times_are_of_whole_calls():
  calls = []

  def slow(x):
    calls.append(x)
    return x + 1

  seconds = alternated_seconds({"a": slow, "b": slow}, jnp.zeros(2), repeats=3, warm_seconds=0)
  assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
  assert len(calls) == 8 and all(s > 0 for each in seconds.values() for s in each)
