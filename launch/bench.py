r"""Times parts of the system on this device, each beside its alternatives and with its error.

  python -m launch.bench --suite=quant --sizes=5b --out=outputs/quant.jsonl

Suites: "quant" (quantising, products, reading the cache) and "block" (a block of a long video).
Writes one JSON record a line, see `longlive_jax/eval/bench.py`, and prints a table. Kernels run
only where the device has the instructions they use; `--only` picks cases by a part of their name.
"""

import json
import math
from collections.abc import Iterator

from absl import flags

from longlive_jax.build import choose_ops, unrolls
from longlive_jax.config.load import load_config, run_main
from longlive_jax.eval import bench_block, bench_quant
from longlive_jax.eval.bench import Case, Record, measure
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.model.dit import cast_params

CONFIGS = {"5b": "configs/wan5b_sample.py", "tiny": "configs/tiny.py"}
SUITE = flags.DEFINE_enum("suite", "quant", ["block", "quant"], "what to time")
SIZES = flags.DEFINE_enum("sizes", "5b", sorted(CONFIGS), "of which model")
ONLY = flags.DEFINE_string("only", "", "run only cases whose name has this in it")
REPEATS = flags.DEFINE_integer("repeats", 30, "timed runs of each implementation", lower_bound=1)
WARM = flags.DEFINE_float(
  "warm_seconds", 20.0, "of runs before the timed ones", lower_bound=0.0, upper_bound=3600.0
)
OUT = flags.DEFINE_string("out", "outputs/bench.jsonl", "file to write")


def line(record: Record) -> str:
  """A record in a line of the table."""
  sizes = " ".join(f"{name}={size}" for name, size in record["sizes"].items())
  rate = record["tflops_per_second"], record["gigabytes_per_second"]
  tflops, gigabytes = ("" if value is None else f"{value:8.1f}" for value in rate)
  return (
    f"{record['case']:30} {sizes:34} {record['implementation']:9} {record['median_us']:11.1f}"
    f" {tflops:>9} {gigabytes:>9} {record['error']:9.2e}"
  )


def jobs() -> Iterator[Case]:
  """What the flags ask for."""
  if SUITE.value == "quant":
    return bench_quant.cases(bench_quant.SIZES[SIZES.value])
  experiment = load_config(CONFIGS[SIZES.value])
  return bench_block.cases(experiment, choose_ops(experiment), cast_params, unrolls)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  check_writable(OUT.value)
  if math.isnan(WARM.value):
    raise ValueError(f"--warm_seconds={WARM.value} must be a number")
  records: list[Record] = []
  print(f"{'case':30} {'sizes':34} {'by':9} {'median us':>11} {'TFLOP/s':>9} {'GB/s':>9} error")
  for case in jobs():
    if ONLY.value not in case.name:
      continue
    for record in measure(case, REPEATS.value, WARM.value):
      records.append({"suite": SUITE.value, **record})
      print(line(record), flush=True)
  if not records:
    raise ValueError(f"--only={ONLY.value} is in the name of no case of --suite={SUITE.value}")
  with replacing(OUT.value) as part:
    part.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
  run_main(main)
