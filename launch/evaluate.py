"""Scores generated videos of the shapes world against their scripts.

  python -m launch.evaluate --config=configs/tiny.py --scripts=128 --out=outputs/score.json

Every script is drawn from its own seed, so two runs (another checkpoint, fewer steps, another
precision) are paired: `--against=other.json` adds the paired difference with its standard error.
`--unquantised` makes each video a second time, from the same noise, without what `quant` asks for.
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from longlive_jax.build import Pipeline, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import (
  define_config_flag,
  from_flags,
  from_json,
  run_main,
  to_json,
)
from longlive_jax.data import shapes
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.eval import shapes_score
from longlive_jax.eval.similarity import psnr
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.sample.latents import split_blocks
from longlive_jax.weights import holds_nvfp4

CONFIG = define_config_flag()
SCRIPTS = flags.DEFINE_integer("scripts", 128, "scripts to generate", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer(
  "first_seed", 1_000_000, "seed of the first script", lower_bound=0, upper_bound=2**31
)
SHOTS = flags.DEFINE_integer("shots", 4, "shots a script", lower_bound=1)
BLOCKS = flags.DEFINE_integer("blocks", 4, "blocks a shot", lower_bound=1)
CHANGES = flags.DEFINE_float(
  "changes",
  0.0,
  "share of borders between shots at which the prompt changes without a cut",
  lower_bound=0.0,
  upper_bound=1.0,
)
BATCH = flags.DEFINE_integer("batch", 1, "scripts generated at a time", lower_bound=1)
SOURCE = flags.DEFINE_enum(
  "source",
  "model",
  ["model", "real", "vae"],
  "what is scored: generated videos, or, as controls, real clips, or those passed through the VAE",
)
OUT = flags.DEFINE_string("out", "outputs/score.json", "file to write")
AGAINST = flags.DEFINE_string("against", None, "score file to compare with, script by script")
UNQUANTISED = flags.DEFINE_bool(
  "unquantised", False, "compare with the same model with quant.linears=none and quant.cache=none"
)
SAME = ("scripts", "first_seed", "shots", "blocks", "changes")  # flags that make the scripts


def draw_clip(experiment: Experiment, seed: int) -> shapes.ClipSpec:
  """The clip whose captions are the script of this seed."""
  lengths = [BLOCKS.value] * SHOTS.value
  frames = shapes.shot_frames(lengths, experiment.model.block_latents)
  rng = np.random.default_rng(seed)
  return shapes.sample_clip(rng, frames, experiment.video, CHANGES.value)


def to_script(clip: shapes.ClipSpec, seed: int) -> Script:
  """One entry of the script for each shot of the clip: a cut, or `keep` where it follows."""
  shots = (
    Shot(shot.caption(), BLOCKS.value, transition="keep" if shot.follows else "cut")
    for shot in clip.shots
  )
  return Script(shots=tuple(shots), seed=seed)


def read_against(path: str) -> list[shapes_score.Result]:
  """The results of another run over the same scripts; old files are of scripts without changes.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a score file, or one of other scripts.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"--against={path}: there is no such file")
  try:
    other = json.loads(Path(path).read_text())
    made = {"changes": 0.0, **other["flags"]}
    theirs = {name: made[name] for name in SAME}
    results = [{"changed": [], **result} for result in other["results"]]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"--against={path} is not a file that launch.evaluate wrote") from error
  if not all(
    isinstance(result.get(name), list) for result in results for name in shapes_score.MEASURES
  ):
    raise ValueError(f"--against={path} is not a file that launch.evaluate wrote")
  for name, value in theirs.items():
    if value != flags.FLAGS[name].value:
      raise ValueError(f"--against={path} is of --{name}={value}; only equal scripts can be paired")
  return results


Frames = Callable[[Sequence[shapes.ClipSpec], Sequence[int]], np.ndarray]


def source_of(experiment: Experiment) -> Frames:
  """What makes the videos `[B, T, H, W, 3]` of some clips and their seeds."""
  if SOURCE.value == "real":
    return lambda clips, seeds: np.stack([shapes.render(c, experiment.video) for c in clips])
  pipeline = Pipeline.from_config(experiment)
  if SOURCE.value == "vae":
    return lambda clips, seeds: np.stack([through_vae(pipeline, clip) for clip in clips])
  pipeline.prepare(BATCH.value)

  def generate(clips: Sequence[shapes.ClipSpec], seeds: Sequence[int]) -> np.ndarray:
    scripts = [to_script(clip, seed) for clip, seed in zip(clips, seeds, strict=True)]
    first = seeds[0] - FIRST_SEED.value
    return np.concatenate(list(pipeline.stream_batch(scripts, first_index=first)), 1)

  return generate


def through_vae(pipeline: Pipeline, clip: shapes.ClipSpec) -> np.ndarray:
  """The frames of a clip, encoded and decoded."""
  latents = pipeline.encode_video(shapes.render(clip, pipeline.experiment.video))
  decoder, parts, state = pipeline.prepare().decoder, [], None
  for block in split_blocks(latents[None], decoder.block_shape):
    frames, state = decoder.decode(block, state)
    parts.append(np.asarray(frames)[0])
  return np.concatenate(parts)


@dataclasses.dataclass
class Run:
  """The videos of one model: how they are made, what they show, and how long they took."""

  make: Frames
  readings: list[shapes_score.ClipReading] = dataclasses.field(default_factory=list)
  seconds: float = 0.0
  frames: int = 0

  def add(self, clips: Sequence[shapes.ClipSpec], seeds: Sequence[int]) -> np.ndarray:
    """Makes and reads the videos of some clips."""
    began = time.perf_counter()
    videos = self.make(clips, seeds)
    self.seconds += time.perf_counter() - began
    self.frames += videos.shape[0] * videos.shape[1]
    pairs = zip(videos, clips, strict=True)
    self.readings += [shapes_score.read_clip(video, clip) for video, clip in pairs]
    return videos

  def results(self, clips: Sequence[shapes.ClipSpec]) -> list[shapes_score.Result]:
    """Comparison of each video with its script."""
    pairs = zip(self.readings, clips, strict=True)
    return [shapes_score.compare_clip(reading, clip) for reading, clip in pairs]


def unquantised(experiment: Experiment) -> Experiment:
  """The experiment without low precision."""
  plain = from_json(to_json(experiment))
  plain.quant.linears = plain.quant.cache = "none"
  return from_flags(plain)


def evaluate(experiment: Experiment) -> dict[str, object]:
  """Makes and scores all videos."""
  other = read_against(AGAINST.value) if AGAINST.value else None
  runs = [Run(source_of(experiment))]
  if UNQUANTISED.value:
    runs.append(Run(source_of(unquantised(experiment))))
  seeds = range(FIRST_SEED.value, FIRST_SEED.value + SCRIPTS.value)
  specs: list[shapes.ClipSpec] = []
  alike: list[float] = []
  for start in tqdm(range(0, SCRIPTS.value, BATCH.value), unit="batch"):
    group = seeds[start : start + BATCH.value]
    clips = [draw_clip(experiment, seed) for seed in group]
    made = [run.add(clips, group) for run in runs]
    if UNQUANTISED.value:
      alike += [psnr(*pair) for pair in zip(*made, strict=True)]
    specs += clips
  report = describe(experiment, runs[0], specs)
  results = runs[0].results(specs)
  if other is not None:
    report["against"] = AGAINST.value
    report["difference"] = shapes_score.paired(results, other)
  if UNQUANTISED.value:
    plain = runs[1].results(specs)
    report["unquantised"] = {
      "score": shapes_score.score(plain),
      "difference": shapes_score.paired(results, plain),
      "psnr": float(np.mean(alike)),
      "psnr_error": float(np.std(alike) / np.sqrt(len(alike))),
      "frames_per_second": runs[1].frames / runs[1].seconds,
    }
  return report


def describe(
  experiment: Experiment, run: Run, specs: Sequence[shapes.ClipSpec]
) -> dict[str, object]:
  """The report on one run."""
  results = run.results(specs)
  report: dict[str, object] = {
    "command": shlex.join(["python", "-m", "launch.evaluate", *sys.argv[1:]]),
    "flags": {name: flags.FLAGS[name].value for name in (*SAME, "source")},
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "frames_per_second": run.frames / run.seconds,
    "score": shapes_score.score(results),
    "by_shot": np.mean([result["score"] for result in results], axis=0).tolist(),
    "chance": shapes_score.chance(),
    "config": json.loads(to_json(experiment)),
    "results": results,
  }
  if len(specs) > 1:
    report["permuted"] = shapes_score.score(shapes_score.permuted(run.readings, specs))
  return report


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if UNQUANTISED.value and (experiment.quant.linears, experiment.quant.cache) == ("none", "none"):
    raise ValueError("--unquantised compares with nothing: set quant.linears or quant.cache")
  if UNQUANTISED.value and holds_nvfp4(experiment):
    raise ValueError(
      f"--unquantised needs wide weights; io.checkpoint={experiment.io.checkpoint!r} holds NVFP4"
    )
  if UNQUANTISED.value and SOURCE.value != "model":
    raise ValueError(f"--unquantised needs --source=model, not {SOURCE.value}")
  if SCRIPTS.value % BATCH.value:
    raise ValueError(f"--scripts={SCRIPTS.value} must be a multiple of --batch={BATCH.value}")
  check_writable(OUT.value)
  enable_compile_cache(experiment)
  report = evaluate(experiment)
  with replacing(OUT.value) as part:
    part.write_text(json.dumps(report, indent=1))
  for name, value in report["score"].items():  # type: ignore[attr-defined]
    print(name, value)


if __name__ == "__main__":
  run_main(main)
