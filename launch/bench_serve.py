r"""Times blocks that a viewer of the server gets, beside those that the library makes alone.

  python -m launch.bench_serve --config=configs/wan5b_sample.py --rounds=3 --blocks=10 \
      --out=outputs/serve.jsonl

Ways: stream (a script to frames, as launch.sample), session (a live session, block by block), api
(a live session behind the server: flow control, encoding, WebSocket). They take turns in one
process. With an empty io.checkpoint weights are random, and prompts are read as bytes. Writes one
JSON record a line and prints a table: `over` is a block's time over that of a bare session.
"""

from absl import flags

from longlive_jax.build import Pipeline, enable_compile_cache
from longlive_jax.config.load import define_config_flag, from_flags, run_main, without_files
from longlive_jax.eval.bench import Record, check_some, write_records
from longlive_jax.io.atomic import check_writable
from longlive_jax.serve import bench
from longlive_jax.serve.frames import FORMATS, Form

CONFIG = define_config_flag()
OUT = flags.DEFINE_string("out", "outputs/bench_serve.jsonl", "file to write")
WAYS = flags.DEFINE_list("ways", list(bench.WAYS), "what to time")
ROUNDS = flags.DEFINE_integer("rounds", 3, "timed rounds of all ways", lower_bound=1)
BLOCKS = flags.DEFINE_integer("blocks", 10, "timed blocks of each way in a round", lower_bound=2)
FORMAT = flags.DEFINE_enum("frame_format", "jpeg", sorted(FORMATS), "of frames sent")
QUALITY = flags.DEFINE_integer("quality", 85, "of frames sent, 1 to 100")
ENCODERS = flags.DEFINE_integer("encoders", 2, "threads that encode frames", lower_bound=1)
REWIND = flags.DEFINE_integer("rewind_blocks", 3, "that a session can go back", lower_bound=0)


def cell(value: float | None, width: int, digits: int) -> str:
  """A number of the table, or as many blanks."""
  return " " * width if value is None else f"{value:{width}.{digits}f}"


def line(record: Record) -> str:
  """A record in a line of the table."""
  first = sorted(record["first_frames_seconds"])
  model, encode = (
    record[name] and 1e3 * record[name] for name in ("model_seconds", "encode_seconds")
  )
  return (
    f"{record['implementation']:8} {1e3 * record['median_seconds']:10.1f}"
    f" {record['frames_per_second']:9.2f} {cell(record['over'].get('session'), 6, 3)}"
    f" {cell(first[len(first) // 2] if first else None, 15, 2)}"
    f" {cell(model, 9, 1)} {cell(encode, 10, 1)}"
  )


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = without_files(from_flags(CONFIG.value))
  form = Form(FORMAT.value, QUALITY.value)
  check_some("ways", WAYS.value, bench.WAYS)
  check_writable(OUT.value)
  enable_compile_cache(experiment)
  records: list[Record] = []
  server = {"form": form, "encoders": ENCODERS.value, "rewind_blocks": REWIND.value}
  for record in bench.measure(
    Pipeline.from_config(experiment),
    ways=tuple(WAYS.value),
    rounds=ROUNDS.value,
    blocks=BLOCKS.value,
    **server,
  ):
    if not records:
      print("way       median ms  frames/s   over  first frames s  model ms  encode ms")
    records.append(record)
    print(line(record), flush=True)
  write_records(OUT.value, records)


if __name__ == "__main__":
  run_main(main)
