"""Batches of training samples from files, read ahead by threads.

Sample number s, counted over the whole run, is a function of the files, `data.seed` and s alone:
the order is a new shuffle in every epoch, and where a sample starts in its files is drawn from
(`data.seed`, s). So a run of any number of processes, each decoding any part of the frames, sees
the same samples, and goes on after any number of them without reading those before.

What cannot be read once the run has started is an error that names the file. To put another sample
in its place would need all processes to know of it, and they decode other parts of the file.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain.python as grain
import numpy as np
from absl import logging

from longlive_jax.config.schema import Experiment
from longlive_jax.data.latent_files import LatentFiles
from longlive_jax.data.video_index import read_index
from longlive_jax.data.video_plan import Rules, check_long_enough, sample_plan
from longlive_jax.data.video_read import read_frames

ENDLESS = 2**62  # samples; a run never ends for want of them

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
Windows = Sequence[tuple[int, int]]


class Sample(NamedTuple):
  """One sample; a batch has a leading axis B in every array.

  Attributes:
    video: [W, T_w, H, W_px, 3] uint8, the frames of every window; None of latents.
    latents: [W, F_w, h, w, C] bfloat16, the latents of every window; None of videos.
    tokens: [P, L] int32, of the prompt of every block.
    masks: [P, L] int32, 1 at real tokens.
    shots: [P] int32, the shot of every block, counted from 0.
    valid: int32, latents that are not padding.
  """

  video: np.ndarray | None
  latents: np.ndarray | None
  tokens: np.ndarray
  masks: np.ndarray
  shots: np.ndarray
  valid: np.ndarray


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
    index = read_index(experiment.data.path)
    self.fingerprint, self.folders = index.fingerprint, []
    lines = []
    for folder in index.folders:
      try:
        check_long_enough(folder, self.rules)
      except ValueError as error:
        logging.warning("skipped %s", error)
        lines.append(str(error))
      else:
        self.folders.append(folder)
    if not self.folders:
      raise ValueError(f"data.path='{experiment.data.path}' has no sample to train on: {lines[0]}")

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

  def __init__(self, experiment: Experiment):
    """Opens `data.path`; see `LatentFiles`."""
    self.files = LatentFiles(experiment)
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


def open_source(experiment: Experiment) -> Source:
  """The samples that `data.source` and `data.path` name.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: nothing in it can be used, or `data.source` is not of files.
  """
  sources: dict[str, Callable[[Experiment], Source]] = {
    "videos": VideoSource,
    "latents": LatentSource,
  }
  name = experiment.data.source
  if name not in sources:
    raise ValueError(f"data.source={name} is not of files; use one of {', '.join(sources)}")
  return sources[name](experiment)


@dataclasses.dataclass(frozen=True)
class Rows:
  """The samples of one process, in the order in which they are read; random access for grain."""

  source: Source
  tokenize: Tokenize
  order: Any  # of the whole run: number of the sample -> item of the source
  seed: int
  batch: int
  rows: range
  windows: Windows
  first_sample: int

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> Sample:
    step, row = divmod(index, len(self.rows))
    number = self.first_sample + step * self.batch + self.rows[row]
    rng = np.random.default_rng((self.seed, number))
    found = self.source.read(int(self.order[number]), rng, self.windows)
    tokens, masks = tokenize_each(self.tokenize, found.prompts)
    pixels = found.windows.dtype == np.uint8
    return Sample(
      video=found.windows if pixels else None,
      latents=None if pixels else found.windows,
      tokens=tokens,
      masks=masks,
      shots=np.asarray(found.shots, np.int32),
      valid=np.asarray(found.valid_latents, np.int32),
    )


def tokenize_each(tokenize: Tokenize, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Ids and masks [P, L] of all prompts; each different one is tokenized once."""
  different = list(dict.fromkeys(prompts))
  which = [different.index(prompt) for prompt in prompts]
  ids, masks = tokenize(different)
  return np.asarray(ids, np.int32)[which], np.asarray(masks, np.int32)[which]


def sample_order(count: int, seed: int) -> Any:
  """The items of a run by sample number: every one once an epoch, each epoch in another order.

  Args:
    count: items of the source.
    seed: `data.seed`.

  Returns:
    Random access: `order[number]` is an item, for any number >= 0.
  """
  return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def batches(
  experiment: Experiment,
  tokenize: Tokenize,
  *,
  rows: range,
  windows: Windows | None = None,
  first_sample: int = 0,
  source: Source | None = None,
) -> Iterator[Sample]:
  """Yields this process's part of every batch, without an end.

  Batch i of the run is made of the samples `first_sample + i * train.batch + r`, 0 <= r <
  `train.batch`. Closing the iterator ends its threads, once they have read what they are at.

  Args:
    experiment: `data`, `video`, `train.batch`.
    tokenize: prompts -> ids [P, L], masks [P, L].
    rows: the r that this process takes, in this order.
    windows: ranges [start, stop) of frames, or of latents of `data.source=latents`, all of one
      length; only these are read. None = one range, the whole sample.
    first_sample: samples that were consumed before.
    source: what `open_source` gave; None opens it.

  Yields:
    Samples with a leading axis B = len(rows).

  Raises:
    FileNotFoundError, ValueError: see `open_source`; while iterating, a file that cannot be read.
  """
  data, batch = experiment.data, experiment.train.batch
  source = open_source(experiment) if source is None else source
  windows = ((0, source.length),) if windows is None else tuple(windows)
  if not rows or not all(0 <= row < batch for row in rows):
    raise ValueError(f"rows={rows} must be some of the rows of a batch, 0 to {batch - 1}")
  lengths = {stop - start for start, stop in windows}
  if len(lengths) != 1 or not all(0 <= a < b <= source.length for a, b in windows):
    raise ValueError(
      f"windows={list(windows)} must be ranges of one length within 0..{source.length}"
    )
  order = sample_order(len(source), data.seed)
  every = Rows(source, tokenize, order, data.seed, batch, rows, windows, first_sample)
  ahead = data.ahead * len(rows)
  options = grain.ReadOptions(min(data.readers, ahead), ahead)
  return stacked(grain.MapDataset.source(every).to_iter_dataset(options), len(rows))


def stacked(samples: Any, count: int) -> Iterator[Sample]:
  """Yields batches of `count` samples of a dataset; closes its threads when it is closed."""
  reading = iter(samples)
  try:
    while True:
      parts = [next(reading) for _ in range(count)]
      yield Sample(*map(stack, zip(*parts, strict=True)))
  finally:
    reading.close()


def stack(arrays: Sequence[Any]) -> Any:
  """Arrays along a new first axis; a single one, which may be large, is not copied."""
  if arrays[0] is None:
    return None
  return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
