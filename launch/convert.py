"""Weights in and out, without PyTorch.

  python -m launch.convert inspect --source=model_bf16.pt
  python -m launch.convert import --dit=model_bf16.pt --vae=Wan2.2_VAE.pth \
      --text=models_t5_umt5-xxl-enc-bf16.pth --out=weights
  python -m launch.convert import --lora=lora.pt --out=adapters
  python -m launch.convert merge --source=weights --lora=adapters --out=merged
  python -m launch.convert quantize --source=merged --out=packed
  python -m launch.convert cast --source=weights --dtype=bfloat16 --out=narrow
  python -m launch.convert export --source=packed --format=4o6 --out=elsewhere

A conversion that was interrupted goes on where it stopped when the same command is given again.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from tqdm import tqdm

from longlive_jax.build import find_checkpoint
from longlive_jax.checks import check_choice
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main
from longlive_jax.convert.export import FORMATS, Export, make_export
from longlive_jax.convert.inspect import describe
from longlive_jax.convert.jobs import Job, cast_job, import_job, merge_job, quantise_job
from longlive_jax.convert.networks import pipeline_sources, sized
from longlive_jax.convert.sources import open_source
from longlive_jax.io.atomic import check_writable
from longlive_jax.quant.qtensor import ROW_BLOCKS, SQUARE_BLOCKS
from longlive_jax.quant.rules import RULES

CONFIG = define_config_flag()
SOURCE = flags.DEFINE_string("source", "", "checkpoint to read; for inspect, any file or folder")
OUT = flags.DEFINE_string("out", "", "folder to write")
DIT = flags.DEFINE_string("dit", "", "transformer: .safetensors, its index or folder, or .pt")
VAE = flags.DEFINE_string("vae", "", "VAE")
DECODER = flags.DEFINE_string("vae_decoder", "", "take the VAE's decoder from here: a Light VAE")
TEXT = flags.DEFINE_string("text", "", "text encoder")
LORA = flags.DEFINE_string("lora", "", "adapters: a file to import, a checkpoint to merge")
DIFFUSERS = flags.DEFINE_string("diffusers", "", "pipeline folder: its transformer, vae, ...")
ENTRY = flags.DEFINE_string("entry", "", "entry of the .pt file to take, such as generator_ema")
RULE = flags.DEFINE_enum("rule", "", ["", *RULES], "scale rule of NVFP4 weights")
BLOCKS = flags.DEFINE_enum("blocks", "", ["", ROW_BLOCKS, SQUARE_BLOCKS], "of NVFP4 weights")
ALPHA = flags.DEFINE_float("alpha", 0.0, "of the adapters; 0 = as the file says, or their rank")
DTYPE = flags.DEFINE_enum("dtype", "", ["", "bfloat16", "float32"], "convert to it")
FORMAT = flags.DEFINE_enum("format", "safetensors", FORMATS, "of the export")
RUN = {"default_config": "configs/wan5b_sample.py", "arguments": 1}  # of `run_main`
ALL = flags.DEFINE_bool("all", False, "inspect: list all tensors, not only what does not fit")


def needed(flag: flags.FlagHolder[str]) -> Path:
  """The path of a flag that must be given."""
  if not flag.value:
    raise ValueError(f"--{flag.name} is needed")
  return Path(flag.value)


def checkpoint(flag: flags.FlagHolder[str]) -> Path:
  """A checkpoint of ours, or the name of weights that ship."""
  name = str(needed(flag))
  try:
    return find_checkpoint(name)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"--{flag.name}={name} is not a checkpoint; import it first") from error


def importing(experiment: Experiment) -> Job:
  """The job of `import`."""
  named = {"dit": DIT, "vae": VAE, "vae_decoder": DECODER, "text": TEXT, "lora": LORA}
  paths = pipeline_sources(Path(DIFFUSERS.value)) if DIFFUSERS.value else {}
  paths |= {name: Path(flag.value) for name, flag in named.items() if flag.value}
  if not paths:
    raise ValueError("nothing to import: give --dit, --vae, --text, --lora or --diffusers")
  entered = {"lora"} if "dit" not in paths else {"dit"}
  sources = {n: open_source(p, ENTRY.value if n in entered else "") for n, p in paths.items()}
  experiment = from_flags(sized(experiment, sources))
  return import_job(experiment, sources, rule=RULE.value, alpha=ALPHA.value, dtype=DTYPE.value)


def quantising() -> Job:
  """The job of `quantize`."""
  chosen = {"quant.weights": RULE.value, "quant.weight_blocks": BLOCKS.value}
  return quantise_job(checkpoint(SOURCE), {name: v for name, v in chosen.items() if v})


def casting() -> Job:
  """The job of `cast`."""
  if not DTYPE.value:
    raise ValueError("--dtype is needed: bfloat16 or float32")
  return cast_job(checkpoint(SOURCE), DTYPE.value)


def main(argv: list[str]) -> None:
  """Command line."""
  jobs: dict[str, Callable[[], Job | Export]] = {
    "import": lambda: importing(CONFIG.value),
    "merge": lambda: merge_job(checkpoint(SOURCE), checkpoint(LORA)),
    "quantize": quantising,
    "cast": casting,
    "export": lambda: make_export(checkpoint(SOURCE), FORMAT.value, DTYPE.value),
  }
  verbs = [*jobs, "inspect"]
  if len(argv) < 2:
    raise ValueError(f"say what to do: {', '.join(verbs)}")
  check_choice("verb", argv[1], verbs)
  if argv[1] == "inspect":
    text = describe(needed(SOURCE), from_flags(CONFIG.value), ENTRY.value, every=ALL.value)
    sys.stdout.write(text + "\n")
    return
  out = needed(OUT)
  check_writable(out, folder=True)
  job = jobs[argv[1]]()
  with tqdm(total=job.nbytes, unit="B", unit_scale=True, desc=argv[1], disable=None) as bar:
    job.write(out, bar.update)
  size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
  logging.info("%s: %.1f MB", out, size / 1e6)


if __name__ == "__main__":
  run_main(main, **RUN)
