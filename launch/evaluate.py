"""Scores generated videos of the shapes world against their scripts.

  python -m launch.evaluate --config=configs/tiny.py --scripts=128 --out=outputs/score.json

Every script is drawn from its own seed, so two runs (another checkpoint, fewer steps, another
precision) are paired: `--against=other.json` adds the paired difference with its standard error.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from longlive_jax.build import Pipeline, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.data import shapes
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.eval import shapes_score
from longlive_jax.io.atomic import check_writable, replacing

CONFIG = define_config_flag()
SCRIPTS = flags.DEFINE_integer("scripts", 128, "scripts to generate", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer(
  "first_seed", 1_000_000, "seed of the first script", lower_bound=0, upper_bound=2**31
)
SHOTS = flags.DEFINE_integer("shots", 4, "shots a script", lower_bound=1)
BLOCKS = flags.DEFINE_integer("blocks", 4, "blocks a shot", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "scripts generated at a time", lower_bound=1)
OUT = flags.DEFINE_string("out", "outputs/score.json", "file to write")
AGAINST = flags.DEFINE_string("against", None, "score file to compare with, script by script")
SAME = ("scripts", "first_seed", "shots", "blocks")  # flags that make the scripts


def draw_clip(experiment: Experiment, seed: int) -> shapes.ClipSpec:
  """The clip whose captions are the script of this seed."""
  lengths = [BLOCKS.value] * SHOTS.value
  frames = shapes.shot_frames(lengths, experiment.model.block_latents)
  return shapes.sample_clip(np.random.default_rng(seed), frames, experiment.video)


def to_script(clip: shapes.ClipSpec, seed: int) -> Script:
  """One shot of the script for each shot of the clip, cut apart."""
  shots = tuple(Shot(prompt=s.caption(), blocks=BLOCKS.value) for s in clip.shots)
  return Script(shots=shots, seed=seed)


def read_against(path: str) -> list[shapes_score.Result]:
  """The results of another run over the same scripts.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a score file, or one of other scripts.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"--against={path}: there is no such file")
  try:
    other = json.loads(Path(path).read_text())
    theirs, results = {name: other["flags"][name] for name in SAME}, other["results"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"--against={path} is not a file that launch.evaluate wrote") from error
  for name, value in theirs.items():
    if value != flags.FLAGS[name].value:
      raise ValueError(f"--against={path} is of --{name}={value}; only equal scripts can be paired")
  return results


def evaluate(experiment: Experiment) -> dict[str, object]:
  """Generates and scores all scripts."""
  other = read_against(AGAINST.value) if AGAINST.value else None
  pipeline = Pipeline.from_config(experiment)
  pipeline.prepare(BATCH.value)
  seeds = range(FIRST_SEED.value, FIRST_SEED.value + SCRIPTS.value)
  results, seconds, frames_made = [], 0.0, 0
  for start in tqdm(range(0, SCRIPTS.value, BATCH.value), unit="batch"):
    group = seeds[start : start + BATCH.value]
    clips = [draw_clip(experiment, seed) for seed in group]
    scripts = [to_script(clip, seed) for clip, seed in zip(clips, group, strict=True)]
    began = time.perf_counter()
    frames = np.concatenate(list(pipeline.stream_batch(scripts, first_index=start)), 1)
    seconds += time.perf_counter() - began
    frames_made += frames.shape[0] * frames.shape[1]
    results += [shapes_score.score_clip(f, c) for f, c in zip(frames, clips, strict=True)]
  report: dict[str, object] = {
    "command": "python -m launch.evaluate",
    "flags": {name: flags.FLAGS[name].value for name in SAME},
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "frames_per_second": frames_made / seconds,
    "score": shapes_score.score(results),
    "config": json.loads(to_json(experiment)),
    "results": results,
  }
  if other is not None:
    report["against"] = AGAINST.value
    report["difference"] = shapes_score.paired(results, other)
  return report


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if SCRIPTS.value % BATCH.value:
    raise ValueError(f"--scripts={SCRIPTS.value} must be a multiple of --batch={BATCH.value}")
  if Path(OUT.value).is_dir():
    raise ValueError(f"--out={OUT.value} is a folder; give the name of a file")
  check_writable(OUT.value)
  enable_compile_cache(experiment)
  report = evaluate(experiment)
  with replacing(OUT.value) as part:
    part.write_text(json.dumps(report, indent=1))
  for name, value in report["score"].items():  # type: ignore[attr-defined]
    print(name, value)


if __name__ == "__main__":
  run_main(main)
