r"""Times a training step on the devices there are, part by part, in several layouts.

  python -m launch.bench_train --config=configs/wan5b_train.py --config.parallel.seq=2 \
      --config.train.batch=1 --out=outputs/train.jsonl

Parts: vae (pixels to latents), text (prompts), forward, gradients (forward and backward) and update
(all of it). Variants: "balanced" (Balanced Sequence Parallelism), "whole clips" (the same, but each
device encodes the whole clip) and "plain" (half of the devices have contexts, half targets; whole
clips). With --ranks=2,4,8 it times, on one device, what each of so many would have to do of vae and
gradients. Writes one JSON record a line and prints a table. Weights are random.

--parts=data instead reads files of `data.path` as a run does, and needs neither weights nor a GPU.
"""

from collections.abc import Iterator

from absl import flags

from longlive_jax.build import build_models, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main
from longlive_jax.eval.bench import Record, check_some, write_records
from longlive_jax.io.atomic import check_writable
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.train import bench_data, bench_rank, bench_step

CONFIG = define_config_flag()
OUT = flags.DEFINE_string("out", "outputs/bench_train.jsonl", "file to write")
PARTS = flags.DEFINE_list("parts", list(bench_step.PARTS), "what to time")
VARIANTS = flags.DEFINE_list("variants", ["balanced"], "layouts to compare")
RANKS = flags.DEFINE_list("ranks", [], "time one device's work of so many, on one")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed rounds", lower_bound=1)


def line(record: Record) -> str:
  """A record in a line of the table."""
  sizes = record["sizes"]
  start = (
    f"{record['implementation']:12} {record['part']:10} {sizes.get('devices', ''):>7}"
    f" {record['median_seconds']:9.4f}"
  )
  if "compile_seconds" not in record:
    return start + f" {record['tflops_per_second'] or 0:9.1f}"
  mfu = "" if record["mfu"] is None else f"{100 * record['mfu']:6.1f} %"
  memory = (record["temporary_bytes"] or 0) / 2**30
  return (
    f"{start} {record['tflops_per_second_per_device']:9.1f} {mfu:>8} {memory:9.2f}"
    f" {record['compile_seconds']:9.1f}"
  )


def records_of(experiment: Experiment) -> Iterator[Record]:
  """What the flags ask for.

  Raises:
    ValueError: `--parts` has "data" beside others.
  """
  parts, variants = tuple(PARTS.value), tuple(VARIANTS.value)
  if bench_data.PART in parts:
    if len(parts) > 1:
      raise ValueError(f"--parts={','.join(parts)}: data is of the host; time it alone")
    return bench_data.measure(experiment, REPEATS.value)
  models = build_models(experiment, mesh_of(experiment))
  if RANKS.value:
    cases = tuple((int(ranks), name) for ranks in RANKS.value for name in variants)
    return bench_rank.measure(experiment, models, cases, parts, REPEATS.value)
  return bench_step.measure(experiment, models, variants, parts, REPEATS.value)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  parts = *bench_step.PARTS, bench_data.PART
  check_some("parts", PARTS.value, parts)
  check_some("variants", VARIANTS.value, tuple(bench_step.VARIANTS))
  check_writable(OUT.value)
  enable_compile_cache(experiment)
  print(
    f"{'variant':12} {'part':10} {'devices':>7} {'seconds':>9} {'TFLOP/s':>9} {'MFU':>8}"
    f" {'temp GiB':>9} compile s"
  )
  records = []
  for record in records_of(experiment):
    records.append(record)
    print(line(record), flush=True)
  write_records(OUT.value, records)


if __name__ == "__main__":
  run_main(main)
