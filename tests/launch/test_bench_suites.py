"""Every suite of the benchmark program, at sizes that take no time: its cases, and their errors."""

import json

import jax
import pytest

from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.eval import bench_block, bench_gemm, bench_sp, bench_vae
from longlive_jax.eval.bench import Case, Record, measure
from longlive_jax.eval.flops import decode_flops
from longlive_jax.model.ops import Ops, attend_with, dense_attention
from longlive_jax.quant.fp8_attention import fp8_attention
from tests.launch.tiny import OVERRIDES

QUICK = ("--sizes=tiny", "--repeats=2", "--warm_seconds=0")
BFLOAT16 = 4e-3  # largest error of a product's result
# suite -> case -> implementation -> largest error; it is more than a hundredth of that, or 0
ATTENTION = {"jnp": BFLOAT16}
GEMM = {
  "bfloat16": BFLOAT16,
  "fp8": 0.05,
  "fp8 product": 0.05,
  "nvfp4": 0.15,
  "nvfp4 weight": 0.12,
}
SUITES = {
  "attention": {
    "self-attention": ATTENTION | {"fp8": 0.1},
    "self-attention to a part": ATTENTION,
    "cross-attention": ATTENTION,
  },
  "elementwise": {
    "copy": {"jnp": 0.0},
    "norm and modulation": {"jnp": BFLOAT16},
    "norm and rotation of q and k": {"jnp": BFLOAT16},
    "GELU": {"jnp": BFLOAT16},
    "quantise rows to fp8": {"jnp": 0.0},
    "GELU, rows to fp8": {"jnp": 0.05},
    "norm and modulation, rows to fp8": {"jnp": 0.05},
  },
  "gemm": {"ffn down": GEMM},
  "sp": {
    "q, k and v from tokens to heads": {"4 devices": 0.0, "4 devices in fp8": 0.04},
    "Ulysses attention": {"one device": 0.0, "4 devices": 0.0, "4 devices in fp8": 0.06},
  },
}


def check_record(record: Record) -> None:
  """What every record has."""
  assert 0 < record["p10_us"] <= record["median_us"] <= record["p90_us"]
  assert record["versions"]["jax"] == jax.__version__ and record["device"]
  assert record["compile_seconds"] > 0 and record["temporary_bytes"] >= 0
  assert record["sizes"] and record["inputs"] and record["reference"]
  for rate, amount in (("tflops_per_second", "flops"), ("gigabytes_per_second", "bytes_moved")):
    assert (record[rate] is None) == (record[amount] is None)
  assert record["flops"] or record["bytes_moved"]


def measured(case: Case, *only: str) -> dict[str, Record]:
  """Records of a case by implementation."""
  records = {record["implementation"]: record for record in measure(case, 2, 0.0, only)}
  for record in records.values():
    check_record(record)
  return records


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_times_its_cases(program, tmp_path, suite):
  out = tmp_path / "x.jsonl"
  only = f"--only={next(iter(SUITES[suite])) if suite == 'gemm' else ''}"
  done = program("bench", *QUICK, f"--suite={suite}", only, f"--out={out}")
  assert done.code == 0, done.stderr
  records = [json.loads(line) for line in out.read_text().splitlines()]
  found = {(record["case"], record["implementation"]) for record in records}
  assert found == {(case, name) for case, names in SUITES[suite].items() for name in names}
  for record in records:
    check_record(record)
    most = SUITES[suite][record["case"]][record["implementation"]]
    assert record["suite"] == suite and most / 100 <= record["error"] <= most, record


def test_rates_of_a_product_are_those_of_its_sizes(program, tmp_path):
  out = tmp_path / "x.jsonl"
  flags = ("--suite=gemm", "--only=ffn up", "--implementations=fp8 product,bfloat16")
  assert program("bench", *QUICK, *flags, f"--out={out}").code == 0
  records = [json.loads(line) for line in out.read_text().splitlines()]
  assert {record["implementation"] for record in records} == {"fp8 product", "bfloat16"}
  assert {record["sizes"]["M"] for record in records} == {64, 120}
  for record in records:
    m, n, k = (record["sizes"][name] for name in "MNK")
    narrow = 1 if record["implementation"] == "fp8 product" else 2
    assert record["flops"] == 2 * m * n * k
    assert record["bytes_moved"] == narrow * k * (n + m) + 2 * m * n


def test_products_are_those_of_the_layers(small):
  found = {case.name: case.sizes for case in bench_gemm.cases(small, 1)}
  assert found == {
    "q, k and v as one": {"M": 2, "N": 192, "K": 64},
    "q, k, v or o": {"M": 2, "N": 64, "K": 64},
    "ffn up": {"M": 2, "N": 96, "K": 64},
    "ffn down": {"M": 2, "N": 64, "K": 96},
  }


@pytest.fixture(scope="module")
def small() -> Experiment:
  """The smallest networks."""
  sizes = {"model.width": 64, "model.ffn_width": 96, "model.heads": 2}
  return load_config("configs/tiny.py", {**OVERRIDES, **sizes})


def choose_ops(variant: Experiment) -> Ops:
  """Attention of a variant on a CPU."""
  dense = fp8_attention if variant.model.attention == "fp8" else dense_attention
  return Ops(attend=attend_with(dense), dense=dense)


def unrolls(variant: Experiment) -> bool:
  """As on a GPU."""
  return variant.quant.linears == "none"


def test_a_block_is_timed_in_every_precision(small):
  (case,) = bench_block.cases(small, choose_ops, unrolls, [2])
  records = measured(case)
  assert set(records) == set(bench_block.VARIANTS)
  errors = {name: record["error"] for name, record in records.items()}
  assert errors.pop("bfloat16") == 0 and min(errors.values()) > 1e-4
  assert max(errors.values()) < 0.5
  assert max(errors["fp8 linears"], errors["fp8 both"]) < 0.1
  assert errors["fp8 linears"] != errors["fp8 both"]
  held = {name: record["argument_bytes"] for name, record in records.items()}
  assert {name for name, record in records.items() if record["unrolled"]} == {
    "bfloat16",
    "nvfp4 cache",
  }
  ratio = records["nvfp4 cache"]["cache_bytes"] / records["bfloat16"]["cache_bytes"]
  assert ratio == pytest.approx(9 / 64, rel=0.06)  # of float32, and an amax a small slot
  assert held["nvfp4 both"] < min(held["nvfp4 linears"], held["nvfp4 cache"]) < held["bfloat16"]
  assert records["fp8 linears"]["layer_bytes"] < 0.5 * records["bfloat16"]["layer_bytes"]


def test_passes_are_timed_one_by_one(small):
  denoise, clean = bench_block.passes(small, choose_ops, unrolls)
  assert (denoise.name, clean.name) == ("denoising pass", "clean pass")
  for case in (denoise, clean):
    records = measured(case, "fp8 linears", "nvfp4 cache")
    assert set(records) == {"fp8 linears", "nvfp4 cache"}
    assert all(1e-4 < record["error"] < 0.15 for record in records.values())


def test_numbers_of_steps_are_cases_of_their_own(small):
  four, two = bench_block.cases(small, choose_ops, unrolls, [4, 2])
  assert (four.sizes["steps"], two.sizes["steps"]) == (4, 2)
  assert four.flops / two.flops == pytest.approx(5 / 3)


def test_known_figures_of_a_block():
  each = bench_block.pass_flops(load_config("configs/wan5b_sample.py"))
  assert 5 * each == pytest.approx(680.8e12, rel=5e-3)
  assert 3 * each == pytest.approx(408.5e12, rel=5e-3)


def test_one_implementation_of_a_case_may_be_timed_alone(program, tmp_path):
  out = tmp_path / "x.jsonl"
  flags = ("--suite=step", "--only=clean", "--implementations=bfloat16")
  done = program("bench", *QUICK, *flags, f"--out={out}")
  assert done.code == 0, done.stderr
  record = json.loads(out.read_text())
  assert record["case"] == "clean pass" and record["error"] == 0


def test_blocks_are_decoded_so_many_latents_a_call(small):
  cases = list(bench_vae.cases(small))
  assert [case.name for case in cases] == [
    "decode a block",
    "decode a block, light",
    "decode a small picture",
    *["convolution"] * 4,
  ]
  records = measured(cases[0])
  assert set(records) == {"1 a call", "2 a call"}
  for record in records.values():
    assert record["error"] < 0.03 and record["dtype"] == "bfloat16"
    whole = decode_flops(small.model.vae, 2, 32, 32, folded=False)
    assert record["flops"] < record["unfolded_flops"] == whole
  assert cases[1].sizes["decoder_width"] == 1 and cases[1].flops < cases[0].flops / 5
  errors = {name: record["error"] for name, record in measured(cases[2]).items()}
  assert errors["float32"] == 0 and 1e-3 < errors["bfloat16"] < 0.05


def test_convolutions_are_those_of_the_stages(small):
  sizes = [case.sizes for case in bench_vae.cases(small) if case.name == "convolution"]
  assert [each["frames"] for each in sizes] == [2, 4, 8, 8]
  assert [each["height"] for each in sizes] == [2, 4, 8, 16]
  last = measured(bench_vae.convolving(4, 4, 8, 8))
  assert set(last) == {"conv2d", "conv3d"} and last["conv3d"]["frames_a_call"] == 4
  assert all(5e-4 < record["error"] < BFLOAT16 for record in last.values())


def test_frames_are_cut_below_the_size_that_libraries_are_slow_with():
  assert bench_vae.most_frames(32, 352 * 640 * 256) == 32
  assert bench_vae.most_frames(32, 3 * 352 * 640 * 256) == 8
  assert bench_vae.most_frames(3, 2**31) == 1
  pieces = bench_vae.cut(jax.numpy.arange(10).reshape(1, 10), 4)
  assert [piece.tolist() for piece in pieces] == [[[0, 1, 2, 3, 4, 5]], [[4, 5, 6, 7, 8, 9]]]


def test_devices_that_share_a_block_divide_it(small):
  assert [bench_sp.sharing(load_config("configs/wan5b_sample.py"), n) for n in (2, 3, 8)] == [
    2,
    2,
    8,
  ]
  with pytest.raises(ValueError, match="--suite=sp needs at least 2 devices .* there are 1"):
    bench_sp.sharing(small, 1)
