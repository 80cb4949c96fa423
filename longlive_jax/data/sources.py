"""Where samples come from: video files, or latents computed ahead.

A source opens its folder once, at the start of a run. What would stop the run later on, such as a
caption that is longer than the text encoder takes, is an error then, which names the file.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from absl import logging

from longlive_jax.config.schema import Experiment
from longlive_jax.data.latent_files import LatentFiles
from longlive_jax.data.video_index import VideoIndex, caption_file, read_index
from longlive_jax.data.video_plan import Rules, check_long_enough, sample_plan
from longlive_jax.data.video_read import read_frames

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
Windows = Sequence[tuple[int, int]]
FILES_SHOWN = 3  # of those whose prompts cannot be used


class Content(NamedTuple):
  """What a source gives: windows [W, ...] of frames or latents, and what is known of the blocks."""

  windows: np.ndarray
  prompts: tuple[str, ...]
  shots: np.ndarray
  valid_latents: int


class Source(Protocol):
  """Samples of files.

  Attributes:
    length: frames or latents of a sample.
    fingerprint: changes when the files do.
  """

  length: int
  fingerprint: str

  def __len__(self) -> int:
    """How many there are."""
    ...

  def read(self, item: int, rng: np.random.Generator, windows: Windows) -> Content:
    """Reads parts of one of them; `rng` decides what is left open."""
    ...

  def prompts(self) -> Iterator[tuple[str, str]]:
    """Yields (file, prompt) for all prompts that samples may have."""
    ...


class VideoSource:
  """Samples cut from video files; see `video_index`, `video_plan` and `video_read`."""

  def __init__(self, experiment: Experiment):
    """Finds the files of `data.path`, and leaves out what is too short, with a logged line.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: nothing in it can be used.
    """
    self.rules, self.video = Rules.of(experiment), experiment.video
    self.fit, self.length = experiment.data.fit, self.rules.frames
    long_enough, lines = [], []
    for folder in read_index(experiment.data.path).folders:
      try:
        check_long_enough(folder, self.rules)
      except ValueError as error:
        logging.warning("skipped %s", error)
        lines.append(str(error))
      else:
        long_enough.append(folder)
    if not long_enough:
      raise ValueError(f"data.path='{experiment.data.path}' has no sample to train on: {lines[0]}")
    self.index, self.too_short = VideoIndex(tuple(long_enough)), len(lines)
    self.folders, self.fingerprint = self.index.folders, self.index.fingerprint

  def __len__(self) -> int:
    return len(self.folders)

  def read(self, item: int, rng: np.random.Generator, windows: Windows) -> Content:
    """See `Source`."""
    plan = sample_plan(self.folders[item], self.rules, rng)
    height, width = self.video.height, self.video.width
    spans = [
      (start, read_frames(plan, start, stop, height, width, self.fit))
      for start, stop in joined(windows)
    ]
    if len(windows) == 1:
      pixels = spans[0][1][None]
    else:
      pixels = np.stack([window_of(spans, start, stop) for start, stop in windows])
    return Content(pixels, plan.prompts, plan.shots, plan.valid_latents)

  def prompts(self) -> Iterator[tuple[str, str]]:
    """See `Source`."""
    for folder in self.folders:
      for number, clip in enumerate(folder.clips):
        file = str(Path(folder.root, caption_file(clip.file)))
        if number or self.rules.max_shot_blocks:
          yield file, self.rules.cut_prefix + clip.caption
        yield file, clip.caption


def joined(windows: Windows) -> list[tuple[int, int]]:
  """The ranges that windows cover together, so that no frame is decoded twice.

  >>> joined([(4, 8), (0, 5), (9, 12)])
  [(0, 8), (9, 12)]
  """
  spans: list[tuple[int, int]] = []
  for start, stop in sorted(windows):
    if spans and start <= spans[-1][1]:
      spans[-1] = spans[-1][0], max(stop, spans[-1][1])
    else:
      spans.append((start, stop))
  return spans


def window_of(spans: Sequence[tuple[int, np.ndarray]], start: int, stop: int) -> np.ndarray:
  """A window's part of the span that holds it."""
  first, frames = next(s for s in reversed(spans) if s[0] <= start)
  return frames[start - first : stop - first]


class LatentSource:
  """Samples computed ahead; see `latent_files`."""

  def __init__(self, experiment: Experiment, vae: str | None = None):
    """Opens `data.path`; see `LatentFiles`."""
    self.files = LatentFiles(experiment, vae)
    self.length = experiment.data.blocks * experiment.model.block_latents
    self.fingerprint = self.files.fingerprint

  def __len__(self) -> int:
    return len(self.files)

  def read(self, item: int, rng: np.random.Generator, windows: Windows) -> Content:
    """See `Source`."""
    del rng
    found = self.files[item]
    parts = np.stack([found.latents[start:stop] for start, stop in windows])
    return Content(parts, found.prompts, found.shots, found.valid_latents)

  def prompts(self) -> Iterator[tuple[str, str]]:
    """See `Source`."""
    for item in self.files.items:
      for prompt in item["prompts"][: self.files.blocks]:
        yield str(self.files.path / item["file"]), prompt


def open_source(
  experiment: Experiment, tokenize: Tokenize | None = None, vae: str | None = None
) -> Source:
  """The samples that `data.source` and `data.path` name.

  Args:
    experiment: `data`, and what decides how samples are cut.
    tokenize: tries every prompt, so that none is refused in the middle of a run.
    vae: the autoencoder that latents must come from; None accepts any.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: nothing in it can be used, a prompt cannot be tokenized, or `data.source` is not of
      files.
  """
  name = experiment.data.source
  if name not in ("videos", "latents"):
    raise ValueError(f"data.source={name} is not of files; use one of videos, latents")
  source = VideoSource(experiment) if name == "videos" else LatentSource(experiment, vae)
  if tokenize is not None:
    check_prompts(source, tokenize)
  return source


def check_prompts(source: Source, tokenize: Tokenize) -> None:
  """Tokenizes every different prompt once.

  Raises:
    ValueError: some cannot be; says how many files have such prompts and names the first few.
  """
  trouble = functools.cache(functools.partial(trouble_with, tokenize))
  wrong: dict[str, str] = {}
  for file, prompt in source.prompts():
    if line := trouble(prompt):
      wrong.setdefault(file, f"'{file}': {line}")
  if wrong:
    lines = [*wrong.values()][:FILES_SHOWN]
    count = f"{len(wrong)} files have prompts that cannot be used: " if len(wrong) > 1 else ""
    more = f"; and {len(wrong) - FILES_SHOWN} more" if len(wrong) > FILES_SHOWN else ""
    raise ValueError(count + "; ".join(lines) + more)


def trouble_with(tokenize: Tokenize, prompt: str) -> str:
  """Why a prompt cannot be tokenized; empty if it can be."""
  try:
    tokenize([prompt])
  except ValueError as error:
    return str(error)
  return ""
