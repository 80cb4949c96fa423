"""Draws the pictures of the page on quality: `python docs/quality.py` (minutes, for it samples).

quality.png  the same script and noise in several numbers of steps and precisions
drift.png    scores of the four quarters of 512 latents, from the records of `launch.evaluate`
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from longlive_jax import Pipeline, load_config
from longlive_jax.data.prompts import Script, load_script
from longlive_jax.eval.similarity import psnr
from longlive_jax.io.contact_sheet import Row, write_contact_sheet

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
BFLOAT16 = {"model.dtype": "bfloat16"}
# caption -> (preset, settings); of a pair that shares its adapters the first is compared with
VARIANTS = {
  "50 steps": ("configs/tiny.py:teacher", {**BFLOAT16, "sample.steps": 50}),
  "4 steps": ("configs/tiny.py", BFLOAT16),
  "4 steps in NVFP4": ("configs/tiny.py:nvfp4", {}),
  "2 steps": ("configs/tiny.py:2steps", BFLOAT16),
  "2 steps in NVFP4": ("configs/tiny.py:2steps,nvfp4", {}),
  "2 steps without distillation": ("configs/tiny.py:teacher", {**BFLOAT16, "sample.steps": 2}),
}
DRIFT = {
  "50 steps": "tiny_50steps_512_score",
  "4 steps": "tiny_4steps_512_score",
  "4 steps in NVFP4": "tiny_4steps_nvfp4_512_score",
  "2 steps": "tiny_2steps_512_score",
}


def middles(frames: np.ndarray, count: int) -> np.ndarray:
  """The frames in the middle of `count` equal parts."""
  return frames[((np.arange(count) + 0.5) * len(frames) / count).astype(int)]


def caption(name: str, made: dict[str, np.ndarray]) -> str:
  """What a row of the picture says."""
  plain = name.removesuffix(" in NVFP4")
  if plain == name:
    return f"{name}, bfloat16"
  return f"{name}: {psnr(made[name], made[plain]):.1f} dB to bfloat16"


def draw_frames(script: Script, path: Path, columns: int = 6) -> None:
  """A row of frames for each variant."""
  made = {
    name: Pipeline.from_config(load_config(preset, settings)).generate(script)
    for name, (preset, settings) in VARIANTS.items()
  }
  rows = [Row(caption(name, made), middles(video, columns)) for name, video in made.items()]
  write_contact_sheet(path, rows)


def draw_drift(path: Path) -> None:
  """Score of each quarter with its standard error."""
  figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
  for place, (name, record) in enumerate(DRIFT.items()):
    results = json.loads((RESULTS / f"{record}.json").read_text())
    quarters = np.asarray(results["by_shot"])
    errors = np.sqrt(quarters * (1 - quarters) / results["flags"]["scripts"])
    x = np.arange(1, 5) + 0.06 * (place - 1.5)
    axes.errorbar(x, 100 * quarters, 100 * errors, marker="o", capsize=3, label=name)
  axes.set(xlabel="quarter of 512 latents", ylabel="score, %", xticks=range(1, 5), ylim=(90, 100.5))
  axes.grid(color="#f2f2f2")
  axes.legend(frameon=False, loc="lower left")
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=HERE, help="folder")
  parser.add_argument("--drift", action="store_true", help="only drift.png, which samples nothing")
  flags = parser.parse_args()
  draw_drift(flags.out / "drift.png")
  if not flags.drift:
    draw_frames(load_script("configs/scripts/demo.json"), flags.out / "quality.png")


if __name__ == "__main__":
  main()
