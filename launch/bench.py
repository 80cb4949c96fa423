r"""Times parts of the system on this device, each beside its alternatives and with its error.

  python -m launch.bench --suite=gemm --sizes=5b --out=outputs/gemm.jsonl

Suites:
  attention    a block against a full window, a part of it, and a prompt
  gemm         linear layers in bfloat16, FP8 and NVFP4
  elementwise  a large copy, and the passes of a layer that multiply nothing
  vae          blocks of latents to frames, and single convolutions
  quant        quantising to NVFP4, and reading the packed cache
  step         one denoising pass, and one clean pass, in each precision
  block        a block of a long video: all steps of each of --steps, and the clean pass
  sp           two and more devices: the exchange of tokens and heads, attention with it
The first four are the floor of their shapes: what later figures are compared with.

Writes one JSON record a line, see `longlive_jax/eval/bench.py`, and prints a table; the file is
complete up to the last case that was finished, however a run ends. Kernels run only where the
device has the instructions they use. To cut a suite into shorter runs, `--only` picks cases by a
part of their name, and `--implementations` what is timed of them, names as in the records; what
errors are taken against is computed in any case.

  python -m launch.bench --suite=block --steps=4 --implementations="bfloat16,fp8 linears" \
      --repeats=20 --profile=outputs/traces --out=outputs/block_fp8.jsonl
"""

import math
from collections.abc import Callable, Iterator

from absl import flags

from longlive_jax.build import sampling_ops, unrolls
from longlive_jax.checks import suggest
from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config, run_main
from longlive_jax.eval import (
  bench_attention,
  bench_block,
  bench_elementwise,
  bench_gemm,
  bench_quant,
  bench_sp,
  bench_vae,
)
from longlive_jax.eval.bench import Case, Record, implementations_of, measure, write_records
from longlive_jax.io.atomic import check_writable

CONFIGS = {"5b": "configs/wan5b_sample.py", "tiny": "configs/tiny.py"}
LARGEST = {"5b": 2**29, "tiny": 2**16}  # elements of the array that is copied
CALLS = {"5b": 16, "tiny": 2}  # products in one executable
SUITES: dict[str, Callable[[Experiment], Iterator[Case]]] = {
  "attention": bench_attention.cases,
  "block": lambda e: bench_block.cases(e, sampling_ops, unrolls, steps_of(STEPS.value)),
  "elementwise": lambda e: bench_elementwise.cases(e, LARGEST[SIZES.value]),
  "gemm": lambda e: bench_gemm.cases(e, CALLS[SIZES.value]),
  "quant": lambda _: bench_quant.cases(bench_quant.SIZES[SIZES.value]),
  "sp": bench_sp.cases,
  "step": lambda e: bench_block.passes(e, sampling_ops, unrolls),
  "vae": bench_vae.cases,
}
SUITE = flags.DEFINE_enum("suite", "quant", sorted(SUITES), "what to time")
SIZES = flags.DEFINE_enum("sizes", "5b", sorted(CONFIGS), "of which model")
ONLY = flags.DEFINE_string("only", "", "run only cases whose name has this in it")
IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "time only these; empty = all")
STEPS = flags.DEFINE_list("steps", ["4", "2"], "suite block: numbers of denoising steps")
REPEATS = flags.DEFINE_integer("repeats", 30, "timed runs of each implementation", lower_bound=1)
WARM = flags.DEFINE_float(
  "warm_seconds", 20.0, "of runs before the timed ones", lower_bound=0.0, upper_bound=3600.0
)
PROFILE = flags.DEFINE_string("profile", "", "folder for a trace of each implementation")
OUT = flags.DEFINE_string("out", "outputs/bench.jsonl", "file to write")


def line(record: Record) -> str:
  """A record in a line of the table."""
  sizes = " ".join(f"{name}={size}" for name, size in record["sizes"].items())
  rate = record["tflops_per_second"], record["gigabytes_per_second"]
  tflops, gigabytes = ("" if value is None else f"{value:8.1f}" for value in rate)
  return (
    f"{record['case']:30} {sizes:44} {record['implementation']:13} {record['median_us']:11.1f}"
    f" {tflops:>9} {gigabytes:>9} {record['error']:9.2e}"
  )


def steps_of(given: list[str]) -> list[int]:
  """The numbers of `--steps`."""
  if not given or not all(each.isdecimal() and int(each) for each in given):
    raise ValueError(f"--steps={','.join(given)} must be numbers of at least 1, such as 4,2")
  return [int(each) for each in given]


def check_flags() -> None:
  """Refuses what cannot work before anything is compiled."""
  check_writable(OUT.value)
  if PROFILE.value:
    check_writable(PROFILE.value, folder=True)
  if math.isnan(WARM.value):
    raise ValueError(f"--warm_seconds={WARM.value} must be a number")
  steps_of(STEPS.value)


def check_found(names: set[str]) -> None:
  """Raises ValueError where the flags name something that none of the cases has.

  Args:
    names: of the implementations of all cases that `--only` picks.
  """
  if not names:
    raise ValueError(f"--only={ONLY.value} is in the name of no case of --suite={SUITE.value}")
  for name in IMPLEMENTATIONS.value:
    if name not in names:
      raise ValueError(
        f"--implementations has '{name}'{suggest(name, names)}; here --suite={SUITE.value} has"
        f" {', '.join(sorted(names))}"
      )


def chosen_cases(experiment: Experiment) -> Iterator[Case]:
  """The cases of the suite that `--only` picks."""
  return (case for case in SUITES[SUITE.value](experiment) if ONLY.value in case.name)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  check_flags()
  experiment = load_config(CONFIGS[SIZES.value], {"model.dtype": "bfloat16"})
  if ONLY.value or IMPLEMENTATIONS.value:
    check_found(implementations_of(lambda: chosen_cases(experiment)))
  records: list[Record] = []
  print(f"{'case':30} {'sizes':44} {'by':13} {'median us':>11} {'TFLOP/s':>9} {'GB/s':>9} error")
  for case in chosen_cases(experiment):
    chosen = IMPLEMENTATIONS.value or list(case.functions)
    if not set(chosen) & set(case.functions):
      continue
    for record in measure(case, REPEATS.value, WARM.value, chosen, PROFILE.value):
      records.append({"suite": SUITE.value, **record})
      print(line(records[-1]), flush=True)
    write_records(OUT.value, records)


if __name__ == "__main__":
  run_main(main)
