r"""Measures all that the pages say of the 5B model's speed and memory, on the GPUs of one machine.

  python -m launch.bench_all --gpus=0,1 --out=outputs/bench

Each row is a program of its own (`launch.bench`, `bench_rollout`, `bench_serve`, `train`), on one
GPU or two; as many run at a time as there are GPUs. Writes each row's records and log into the
folder. What was measured is not measured again. `--only` picks rows by parts of their names,
`--list` shows them with their commands.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from absl import flags

from launch.lanes import Job, measure
from longlive_jax.config.load import run_main
from longlive_jax.io.atomic import check_writable

SAMPLE = "configs/wan5b_sample.py"
DISTILL = (
  *("--config.train.batch=1", "--config.data.source=shapes", "--config.data.clips=16"),
  *("--config.model.text.tokenizer=bytes", "--config.model.text.parked"),
  *("--config.train.remat=full", "--config.train.steps=6", "--config.io.log_every_steps=1"),
)
LISTED = re.compile(r"^GPU (\d+): .*\(UUID: (\S+)\)", re.MULTILINE)  # by nvidia-smi -L
PARKED, SHARED = "--config.model.text.parked", "--config.parallel.seq=2"
BLOCKS = "bfloat16,fp8 linears,fp8 both,fp8 all"
BY_XLA = "bfloat16 by XLA,fp8 linears by XLA,fp8 both by XLA"
GPUS = flags.DEFINE_list("gpus", [], "GPUs to use, by number or UUID; empty = all")
OUT = flags.DEFINE_string("out", "outputs/bench", "folder of records and logs")
ONLY = flags.DEFINE_list("only", [], "only rows of these names, or with one of these in their name")
LIST = flags.DEFINE_bool("list", False, "show the rows and end")


def rollout(name: str, variant: str, *more: str, gpus: int = 1) -> Job:
  """A sampler; see `launch.bench_rollout`."""
  return Job(name, gpus, (rolled(name, variant, *more, cache="cache"),))


def rolled(name: str, variant: str, *more: str, cache: str) -> tuple[str, ...]:
  """Its command."""
  config = f"--config={SAMPLE}:{variant}" if variant else f"--config={SAMPLE}"
  kept = f"--config.io.compile_cache={OUT.value}/{cache}"
  return "-m", "launch.bench_rollout", config, *more, kept, f"--out={OUT.value}/{name}.jsonl"


def suite(name: str, *more: str, gpus: int = 1) -> Job:
  """A suite; see `launch.bench`."""
  out = f"--out={OUT.value}/{name}.jsonl"
  return Job(name, gpus, (("-m", "launch.bench", *more, "--repeats=20", out),))


def distilled(name: str, config: str, *more: str) -> Job:
  """Steps of distillation; see `launch.train`."""
  program = ("-m", "launch.train", f"--config={config}", *more, *DISTILL)
  return Job(name, 1, ((*program, f"--workdir={OUT.value}/{name}"),))


def rows() -> list[Job]:
  """All rows; those for two GPUs first."""
  cold = rolled("start_cold", "fp8", "--parts=latents", "--blocks=2", cache="start")
  warm = rolled("start_warm", "fp8", "--parts=frames,latents,decode", cache="start")
  narrow, two = "--config.model.vae.decoder_width=64", "--config.sample.decode_latents=2"
  roles = "--config.distill.quantised=('student','teacher','critic')"
  return [
    rollout("two_2steps", "fp8,2steps", SHARED, gpus=2),
    rollout("two_2steps_narrow", "fp8,2steps", SHARED, narrow, gpus=2),
    rollout("two_bfloat16", "", SHARED, two, gpus=2),
    rollout("two_exchange_fp8", "", SHARED, two, "--config.parallel.exchange=fp8", gpus=2),
    suite("sp", "--suite=sp", gpus=2),
    Job("start", 1, (cold, warm)),
    suite("block", "--suite=block", "--steps=4", f"--implementations={BLOCKS},{BY_XLA}"),
    suite("block_2steps", "--suite=block", "--steps=2", f"--implementations={BLOCKS}"),
    rollout("bfloat16", "", PARKED, two),
    rollout("fp8_linears", "fp8", "--config.model.attention=auto", "--config.quant.cache=none"),
    rollout("parked", "fp8", PARKED, "--parts=frames"),
    rollout("nvfp4", "nvfp4", PARKED, "--parts=frames"),
    rollout("low_memory", "low_memory", "--blocks=6"),
    Job(
      "serve",
      1,
      (
        (
          *("-m", "launch.bench_serve", f"--config={SAMPLE}:fp8", "--rounds=2", "--blocks=8"),
          *(f"--config.io.compile_cache={OUT.value}/start", f"--out={OUT.value}/serve.jsonl"),
        ),
      ),
    ),
    distilled("distill_bfloat16", "configs/wan5b_distill.py"),
    distilled("distill_nvfp4", "configs/wan5b_distill.py:nvfp4_training", roles),
    *(suite(name, f"--suite={name}") for name in ("elementwise", "gemm", "attention", "vae")),
  ]


def found_gpus() -> dict[str, str]:
  """UUIDs of the GPUs of this machine, by their numbers.

  Raises:
    ValueError: none can be seen.
  """
  try:
    done = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise ValueError("no GPU can be seen with nvidia-smi; --gpus names what it lists") from error
  found = dict(LISTED.findall(done.stdout))
  if not found:
    raise ValueError("no GPU can be seen with nvidia-smi; --gpus names what it lists")
  return found


def chosen_gpus() -> list[str]:
  """The GPUs that `--gpus` names, or all of this machine.

  Raises:
    ValueError: one is not there, is named twice or without a name; or none can be seen.
  """
  given, said = GPUS.value, f"--gpus={','.join(GPUS.value)}"
  if "" in given:
    raise ValueError(f"{said} leaves one without a name; use such as 0,1")
  if len(set(given)) < len(given):
    raise ValueError(f"{said} names one twice")
  here = found_gpus()
  numbers = {number: number for number in here} | {uuid: number for number, uuid in here.items()}
  for name in given:
    if name not in numbers:
      raise ValueError(
        f"{said} has '{name}', which is no GPU of this machine; use some of {', '.join(here)}, or"
        " their UUIDs as `nvidia-smi -L` lists them"
      )
  if len({numbers[name] for name in given}) < len(given):
    raise ValueError(f"{said} names one twice")
  return given or list(here)


def chosen_rows() -> list[Job]:
  """The rows that `--only` picks.

  Raises:
    ValueError: none.
  """
  known = rows()
  names, chosen = [job.name for job in known], set[str]()
  for part in filter(None, ONLY.value):
    found = [part] if part in names else [name for name in names if part in name]
    if not found:
      raise ValueError(f"--only={part} is in the name of no row; the rows are {', '.join(names)}")
    chosen.update(found)
  return [job for job in known if not chosen or job.name in chosen]


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  if not OUT.value:
    raise ValueError("--out is empty; name a folder for records and logs")
  chosen = chosen_rows()
  if LIST.value:
    for job in chosen:
      for program in job.programs:
        print(f"{job.name:20} {job.gpus} GPU  python {shlex.join(program)}")
    return
  folder = Path(OUT.value)
  check_writable(folder, folder=True)
  gpus = chosen_gpus()
  folder.mkdir(parents=True, exist_ok=True)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that rows under way are ended too
  todo = [job for job in chosen if not (folder / f"{job.name}.done").exists()]
  for job in todo:
    if job.gpus > len(gpus):
      print(f"{job.name:20} left out: it needs {job.gpus} GPUs")
  todo, asked = [job for job in todo if job.gpus <= len(gpus)], bool(todo)
  if asked and not todo:
    raise ValueError(f"--gpus={','.join(gpus)} are too few for any of these rows")
  if any(job.name == "start" for job in todo):
    shutil.rmtree(folder / "start", ignore_errors=True)  # a cold start
  measure(todo, gpus, folder)


if __name__ == "__main__":
  run_main(main)
