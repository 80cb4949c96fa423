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

from longlive_jax.checks import check_choice
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main
from longlive_jax.convert.checkpoints import Checkpoint, open_checkpoint
from longlive_jax.convert.export import FORMATS, Export, make_export
from longlive_jax.convert.importing import import_job
from longlive_jax.convert.inspect import describe
from longlive_jax.convert.jobs import Job, cast_job, merge_job, quantise_job
from longlive_jax.convert.networks import pipeline_sources, sized
from longlive_jax.convert.sources import open_source
from longlive_jax.io.atomic import check_writable
from longlive_jax.quant.qtensor import ROW_BLOCKS, SQUARE_BLOCKS
from longlive_jax.quant.rules import RULES
from longlive_jax.weights import find_checkpoint

CONFIG = define_config_flag()
SOURCE = flags.DEFINE_string("source", "", "checkpoint to read; for inspect, any file or folder")
OUT = flags.DEFINE_string("out", "", "folder to write")
DIT = flags.DEFINE_string("dit", "", "transformer: .safetensors, its index or folder, or .pt")
VAE = flags.DEFINE_string("vae", "", "VAE")
DECODER = flags.DEFINE_string("vae_decoder", "", "take the VAE's decoder from here: a Light VAE")
TEXT = flags.DEFINE_string("text", "", "text encoder")
LORA = flags.DEFINE_string("lora", "", "adapters: a file to import, a checkpoint to merge")
DIFFUSERS = flags.DEFINE_string("diffusers", "", "pipeline folder: its transformer, vae, ...")
REST = flags.DEFINE_string("rest", "", "import: take the other networks from this checkpoint")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a checkpoint at --out")
ENTRY = flags.DEFINE_string("entry", "", "entry of the .pt file to take, such as generator_ema")
RULE = flags.DEFINE_enum("rule", "", ["", *RULES], "scale rule of NVFP4 weights")
BLOCKS = flags.DEFINE_enum("blocks", "", ["", ROW_BLOCKS, SQUARE_BLOCKS], "of NVFP4 weights")
ALPHA = flags.DEFINE_float("alpha", 0.0, "of the adapters; 0 = as the file says, or their rank")
DTYPE = flags.DEFINE_enum("dtype", "", ["", "bfloat16", "float32"], "convert to it")
FORMAT = flags.DEFINE_enum("format", "safetensors", FORMATS, "of the export")
ALL = flags.DEFINE_bool("all", False, "inspect: list all tensors, not only what does not fit")
FILES = ("dit", "vae", "vae_decoder", "text", "lora", "diffusers", "rest")
USED = {  # flags a verb reads; all but inspect read --out and --overwrite as well
  "import": (*FILES, "entry", "rule", "alpha", "dtype"),
  "merge": ("source", "lora"),
  "quantize": ("source", "rule", "blocks"),
  "cast": ("source", "dtype"),
  "export": ("source", "format", "dtype"),
  "inspect": ("source", "entry", "all"),
}
RUN = {"default_config": "configs/wan5b_sample.py", "arguments": 1}  # of `run_main`


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
    wrong = ": there is no such file, folder or shipped checkpoint"
    if Path(name).exists():
      wrong = " is not a checkpoint; import it first"
    raise FileNotFoundError(f"--{flag.name}={name}{wrong}") from error


def opened(flag: flags.FlagHolder[str]) -> Checkpoint:
  """The checkpoint of a flag, checked."""
  return open_checkpoint(checkpoint(flag))


def check_apart(out: Path) -> None:
  """Raises ValueError if the result would be written over what it is made of."""
  for name in ("source", *FILES):
    value = flags.FLAGS[name].value
    if value and Path(value).exists():
      source = Path(value).resolve()
      if source == out or source in out.parents or out in source.parents:
        raise ValueError(f"--out={out} and --{name}={value} are in each other")


def check_used(verb: str) -> None:
  """Raises ValueError for a flag that this verb does not read."""
  used = {*USED[verb], *(() if verb == "inspect" else ("out", "overwrite"))}
  known = {name for names in USED.values() for name in names} | {"overwrite"}
  for name in sorted(known - used):
    if flags.FLAGS[name].present:
      raise ValueError(
        f"--{name} means nothing to {verb}, which reads --{', --'.join(sorted(used))}"
      )
  given = next((a for a in sys.argv[1:] if a.startswith(("--config", "-config"))), "")
  if given and verb not in ("import", "inspect"):
    raise ValueError(f"{given} means nothing to {verb}: it goes by the checkpoint's configuration")


def importing(experiment: Experiment) -> Job:
  """The job of `import`."""
  named = {"dit": DIT, "vae": VAE, "vae_decoder": DECODER, "text": TEXT, "lora": LORA}
  paths = pipeline_sources(Path(DIFFUSERS.value)) if DIFFUSERS.value else {}
  paths |= {name: Path(flag.value) for name, flag in named.items() if flag.value}
  if not paths:
    raise ValueError("nothing to import: give --dit, --vae, --text, --lora or --diffusers")
  entered = {"lora"} if "dit" not in paths else {"dit"}
  if ENTRY.value and not entered & paths.keys():
    raise ValueError("--entry chooses among the entries of --dit or --lora; neither is given")
  sources = {n: open_source(p, ENTRY.value if n in entered else "") for n, p in paths.items()}
  experiment = from_flags(sized(experiment, sources))
  job = import_job(experiment, sources, rule=RULE.value, alpha=ALPHA.value, dtype=DTYPE.value)
  job = job.with_rest(opened(REST)) if REST.value else job
  logging.info("sizes and settings: configuration '%s'", experiment.name)
  missing = [name for name in ("dit", "vae", "text") if name not in job.networks]
  if missing and "lora" not in job.networks:
    logging.info("without %s; --rest=CHECKPOINT adds it to another import", ", ".join(missing))
  return job


def quantising() -> Job:
  """The job of `quantize`."""
  chosen = {"quant.weights": RULE.value, "quant.weight_blocks": BLOCKS.value}
  return quantise_job(opened(SOURCE), {name: v for name, v in chosen.items() if v})


def casting() -> Job:
  """The job of `cast`."""
  if not DTYPE.value:
    raise ValueError("--dtype is needed: bfloat16 or float32")
  return cast_job(opened(SOURCE), DTYPE.value)


def main(argv: list[str]) -> None:
  """Command line."""
  jobs: dict[str, Callable[[], Job | Export]] = {
    "import": lambda: importing(CONFIG.value),
    "merge": lambda: merge_job(opened(SOURCE), opened(LORA)),
    "quantize": quantising,
    "cast": casting,
    "export": lambda: make_export(opened(SOURCE), FORMAT.value, DTYPE.value),
  }
  verbs = [*jobs, "inspect"]
  if len(argv) < 2:
    raise ValueError(f"say what to do: {', '.join(verbs)}")
  check_choice("the first argument", argv[1], verbs)
  check_used(argv[1])
  if argv[1] == "inspect":
    source = needed(SOURCE)
    source = source if source.exists() else checkpoint(SOURCE)
    text = describe(source, from_flags(CONFIG.value), ENTRY.value, every=ALL.value)
    sys.stdout.write(text + "\n")
    return
  out = needed(OUT).resolve()
  check_writable(out, folder=True)
  check_apart(out)
  job = jobs[argv[1]]()
  with tqdm(total=job.nbytes, unit="B", unit_scale=True, desc=argv[1], disable=None) as bar:
    job.write(out, bar.update, overwrite=OVERWRITE.value)
  size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
  logging.info("%s: %.1f MB, %s", out, size / 1e6, job.contents)


if __name__ == "__main__":
  run_main(main, **RUN)
