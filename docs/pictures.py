"""Draws the pictures of these pages from the code they explain: `python docs/pictures.py`.

shapes.png   the world that the tiny model is trained on
cache.png    what each block of a three-shot video attends to, by the sampler's own account
training.png metrics of the two runs that made the shipped weights
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from longlive_jax import load_config
from longlive_jax.config import Experiment
from longlive_jax.data import shapes
from longlive_jax.data.prompts import Script, expand
from longlive_jax.io.contact_sheet import Row, spread_frames, write_contact_sheet
from longlive_jax.sample.schedule import SampleState, Schedule

KINDS = ("not seen", "recent", "sink", "pin", "own block")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COLOURS = ("#f2f2f2", "#9ecae1", "#31a354", "#e6550d", "#3b3b3b")


def draw_shapes(experiment: Experiment, path: Path, columns: int = 6) -> None:
  """A three-shot clip of the training world under its captions."""
  lengths = shapes.shot_frames([3, 3, 3], experiment.model.block_latents)
  clip = shapes.sample_clip(np.random.default_rng(3), lengths, experiment.video)
  rows = [
    Row(
      shot.caption(),
      spread_frames(shapes.render(clip, experiment.video, first, first + shot.frames), columns),
    )
    for first, shot in zip(clip.first_frames, clip.shots, strict=True)
  ]
  write_contact_sheet(path, rows)


def attended(experiment: Experiment, script: Script) -> np.ndarray:
  """Kind (an index of KINDS) of every cached block while each block is denoised, `[P, P]`."""
  schedule = Schedule.of(experiment)
  plan = expand(script, experiment.video.fps, experiment.model.block_latents, "")
  states, kinds = (SampleState(),), np.zeros((len(plan), len(plan)), int)
  for block, entry in enumerate(plan):
    cut = [entry.transition == "cut"]
    states, _ = schedule.enter(states, block, cut)
    slots = states[0].slots
    for seen in slots.blocks:
      kind = "sink" if seen < schedule.window.sink else "pin" if seen == slots.pin else "recent"
      kinds[block, seen] = KINDS.index("own block" if seen == block else kind)
    states, _ = schedule.settle(states, block, cut)
  return kinds


def draw_cache(experiment: Experiment, path: Path) -> None:
  """The table of `attended` for three shots of five blocks."""
  kinds = attended(experiment, Script.of("A", "B", "C", blocks=5))
  figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
  axes.imshow(kinds, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(KINDS) - 1)
  axes.set(xlabel="block in the cache", ylabel="block that is denoised")
  axes.set_xticks(np.arange(-0.5, len(kinds)), minor=True)
  axes.set_yticks(np.arange(-0.5, len(kinds)), minor=True)
  axes.grid(which="minor", color="white", linewidth=1.5)
  axes.tick_params(which="minor", length=0)
  for cut in (4.5, 9.5):
    axes.axhline(cut, color="black", linewidth=1, linestyle=":")
    axes.text(len(kinds) - 0.4, cut, "cut", va="center")
  patches = [Patch(color=c, label=k) for c, k in zip(COLOURS[1:], KINDS[1:], strict=True)]
  axes.legend(handles=patches, loc="upper right", frameon=False)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def draw_training(path: Path) -> None:
  """Quality of the autoencoder and loss of the transformer against minutes of training."""
  figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
  for panel, run, metric, label, colour in (
    (0, "vae_training", "psnr", None, COLOURS[4]),
    (1, "ar_training_off", "loss", "clean context", COLOURS[1]),
    (1, "ar_training", "loss", "errors recycled (shipped)", COLOURS[4]),
  ):
    lines = (RESULTS / f"tiny_{run}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    minutes = [(record["time"] - records[0]["time"]) / 60 for record in records]
    values = [record[metric] for record in records]
    axes[panel].plot(minutes, values, color=colour, linewidth=1, label=label)
  for panel, title in zip(axes, ("autoencoder: PSNR, dB", "transformer: loss"), strict=True):
    panel.set(xlabel="minutes", title=title)
    panel.grid(color=COLOURS[0])
  axes[1].set_yscale("log")
  axes[1].legend(frameon=False)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
  out = parser.parse_args().out
  experiment = load_config("configs/tiny.py")
  draw_shapes(experiment, out / "shapes.png")
  draw_cache(experiment, out / "cache.png")
  draw_training(out / "training.png")


if __name__ == "__main__":
  main()
