"""What is checked before a run loads or writes anything."""

from pathlib import Path

from longlive_jax.config import Experiment
from longlive_jax.config.load import from_json, to_json
from longlive_jax.config.walk import differences
from longlive_jax.data.latent_files import INDEX, load_index
from longlive_jax.data.prompts import script_files
from longlive_jax.io.checkpoint import check_replaceable
from longlive_jax.io.processes import texts_of_all

LOCAL = ("io.compile_cache",)  # may be another folder on each machine
RESULTS = ("params", "adapters")


def check_same_settings(experiment: Experiment) -> None:
  """That all processes of a run were started with the same settings.

  Raises:
    ValueError: they were not; names the settings, in every process.
  """
  texts = texts_of_all(to_json(experiment))
  for number, text in enumerate(texts):
    if text == texts[0]:
      continue
    try:
      found = list(differences(from_json(texts[0]), from_json(text)))
    except ValueError as error:
      raise ValueError(f"the processes run different versions of the program: {error}") from error
    lines = [
      f"{name} is {first!r} in process 0 and {other!r} in process {number}"
      for name, first, other in found
      if name not in LOCAL
    ]
    if lines:
      raise ValueError(f"the processes were started with different settings: {'; '.join(lines)}")


def check_files(experiment: Experiment, workdir: Path) -> None:
  """That a run finds what it reads, and may write its result, as far as paths tell.

  Raises:
    FileNotFoundError, ValueError: names the setting, or the folder.
  """
  for name in RESULTS:
    check_replaceable(workdir / name)
  if experiment.train.stage == "vae":
    return  # which has the shapes world, and shows no videos
  check_data(experiment)
  scripts = experiment.io.evaluate_scripts
  if experiment.io.evaluate_every_steps and scripts:
    check_exists(scripts, "io.evaluate_scripts")
    script_files(scripts, "io.evaluate_scripts")


def check_data(experiment: Experiment) -> None:
  """That `data.path` is there and of the kind that `data.source` says; reads no samples."""
  source, path = experiment.data.source, Path(experiment.data.path)
  if source == "shapes":
    return
  check_exists(path, "data.path")
  if source == "scripts":
    script_files(path, "data.path")
  elif source == "latents":
    load_index(path)
  elif (path / INDEX).is_file() and not (path / "video").is_dir():
    raise ValueError(f"data.path='{path}' holds latents, not videos: use data.source=latents")
  elif not (path / "video").is_dir():
    raise FileNotFoundError(
      f"data.path='{path}' has no folder 'video'; it must hold video/<sample>/<clip>.mp4 and"
      " caption/<sample>/<clip>.json"
    )
  elif not any((path / "video").iterdir()):
    raise ValueError(f"data.path='{path}' has no usable sample: its folder 'video' is empty")


def check_exists(path: str | Path, setting: str) -> None:
  """Raises FileNotFoundError, which names the setting, unless there is a file or a folder."""
  if not Path(path).exists():
    raise FileNotFoundError(f"{setting}='{path}' is not a folder or a file: it does not exist")
