"""Videos made with the averaged weights during training: the sampler, as everywhere else.

They change nothing of the run: weights are copied, and randomness is the scripts' own.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import logging

from longlive_jax.config import Experiment
from longlive_jax.data import shapes
from longlive_jax.data.prompts import Script, Shot, script_files
from longlive_jax.io.processes import is_first, wait_for_all, whole
from longlive_jax.model.dit import cast_params
from longlive_jax.sample.sampler import Models, Sampler
from longlive_jax.types import PyTree

FOLDER = "videos"
SHOWN = 2  # scripts of the shapes world, where none are given


class Rollouts:
  """Writes `WORKDIR/videos/STEP/NAME.mp4` for every script.

  Args:
    experiment: checked experiment; `io.evaluate_scripts` names a script or a folder of them.
    models: networks, with the weights of the VAE and the text encoder.
    workdir: of the run.

  Raises:
    FileNotFoundError, ValueError: there are no scripts, or one cannot be read.
  """

  def __init__(self, experiment: Experiment, models: Models, workdir: str | Path):
    self.folder = Path(workdir) / FOLDER
    self.scripts = find_scripts(experiment)
    self.experiment, self.models = experiment, models
    self.sampler: Sampler | None = None

  def __call__(self, step: int, params: PyTree) -> None:
    """Makes the videos of a step; in one process, while the others wait."""
    narrow = cast_params(params, self.experiment.model.dtype)
    host = {name: whole(tree) for name, tree in {**self.models.params, "dit": narrow}.items()}
    if is_first():
      self._write(step, jax.device_put(host, jax.local_devices()[0]))
    wait_for_all("rollouts")

  def _write(self, step: int, params: PyTree) -> None:
    from longlive_jax.io.video import write_video  # needs PyAV, which training does not

    models = dataclasses.replace(self.models, params=params)
    self.sampler = self.sampler or Sampler(models)
    self.sampler.models = models
    for name, script in self.scripts.items():
      path = self.folder / f"{step:06d}" / f"{name}.mp4"
      write_video(path, self.sampler.stream(script), self.experiment.video.fps)
    logging.info("step %d: videos in '%s'", step, self.folder / f"{step:06d}")


def find_scripts(experiment: Experiment) -> dict[str, Script]:
  """Name -> script of the evaluation."""
  if not experiment.io.evaluate_scripts:
    return {f"{number:02d}": of_shapes(experiment, number) for number in range(SHOWN)}
  return dict(script_files(experiment.io.evaluate_scripts, "io.evaluate_scripts"))


def of_shapes(experiment: Experiment, number: int) -> Script:
  """Script of an unseen clip of two shots, as long as a training sample."""
  blocks = experiment.data.blocks
  lengths = [blocks - blocks // 2, blocks // 2] if blocks > 1 else [1]
  frames = shapes.shot_frames(lengths, experiment.model.block_latents)
  rng = np.random.default_rng((experiment.data.seed, number, 1))
  clip = shapes.sample_clip(rng, frames, experiment.video)
  shots = [Shot(shot.caption(), blocks=n) for shot, n in zip(clip.shots, lengths, strict=True)]
  return Script(shots=tuple(shots), seed=number)
