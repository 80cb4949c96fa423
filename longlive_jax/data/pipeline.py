"""Batches of training samples from files, read ahead by threads.

Sample number s, counted over the whole run, is a function of the files, `data.seed` and s alone:
the order is a new shuffle in every epoch, and where a sample starts in its files is drawn from
(`data.seed`, s). So a run of any number of processes, each decoding any part of the frames, sees
the same samples, and goes on after any number of them without reading those before.

What cannot be read once the run has started is an error that names the file. To put another sample
in its place would need all processes to know of it, and they decode other parts of the file.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np

from longlive_jax.config.schema import Experiment
from longlive_jax.data.sources import Source, Tokenize, Windows, open_source

ENDLESS = 2**62  # samples; a run never ends for want of them


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
    source: what `open_source` gave; None opens it, and tries all prompts.

  Yields:
    Samples with a leading axis B = len(rows).

  Raises:
    FileNotFoundError, ValueError: see `open_source`; while iterating, a file that cannot be read.
  """
  data, batch = experiment.data, experiment.train.batch
  source = open_source(experiment, tokenize) if source is None else source
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
