r"""Times a sampler in its steady state, and how long its start and its first frames take.

  python -m launch.bench_rollout --config=configs/wan5b_sample.py --config.sample.steps=2 \
      --config.quant.linears=fp8 --config.parallel.seq=2 --out=outputs/rollout.jsonl

Parts: latents (the transformer alone), decode (the autoencoder alone), frames (a script to frames
on the host). With an empty io.checkpoint weights are random, and prompts are read as bytes. Writes
one JSON record a line and prints a table. Compare runs on the same warm device only.
"""

from absl import flags

from longlive_jax.build import Pipeline, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, without_files
from longlive_jax.data.prompts import MOST_BLOCKS
from longlive_jax.eval import bench_rollout
from longlive_jax.eval.bench import Record, check_some, write_records
from longlive_jax.io.atomic import check_writable

CONFIG = define_config_flag()
OUT = flags.DEFINE_string("out", "outputs/bench_rollout.jsonl", "file to write")
PARTS = flags.DEFINE_list("parts", list(bench_rollout.PARTS), "what to time")
BLOCKS = flags.DEFINE_integer("blocks", 20, "timed blocks of each part", lower_bound=2)


def line(record: Record) -> str:
  """A record in a line of the table."""
  peak = (record["peak_bytes_in_use"] or 0) / 1e9
  return (
    f"{record['part']:8} {1e3 * record['median_seconds']:9.1f} {1e3 * record['p10_seconds']:9.1f}"
    f" {1e3 * record['p90_seconds']:9.1f} {record['frames_per_second']:8.2f} {peak:8.1f}"
  )


def check_blocks(experiment: Experiment) -> None:
  """Raises ValueError unless `--blocks` and the window before them fit in one entry of a script."""
  window = experiment.sample.window_latents // experiment.model.block_latents
  if BLOCKS.value > MOST_BLOCKS - window:
    raise ValueError(
      f"--blocks={BLOCKS.value} must be at most {MOST_BLOCKS - window}: with the {window} of the"
      f" window they are one entry of a script, which has at most {MOST_BLOCKS}"
    )


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = without_files(from_flags(CONFIG.value))
  check_some("parts", PARTS.value, bench_rollout.PARTS)
  check_blocks(experiment)
  check_writable(OUT.value)
  enable_compile_cache(experiment)
  records: list[Record] = []
  print("part     median ms    p10 ms    p90 ms  frames/s  peak GB")
  for record in bench_rollout.measure(
    experiment, lambda: Pipeline.from_config(experiment), tuple(PARTS.value), BLOCKS.value
  ):
    records.append(record)
    print(line(record), flush=True)
  first = records[0]
  print(
    f"built in {first['build_seconds']:.1f} s, compiled in {first['compile_seconds']:.1f} s; from a"
    f" prompt to its first frames {first['first_frames_seconds'][-1]:.2f} s"
  )
  write_records(OUT.value, records)


if __name__ == "__main__":
  run_main(main)
