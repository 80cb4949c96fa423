"""Times reading the clips of training steps from files: decoding, resizing, tokens.

What is timed is the reader of a run, `data.readers` threads that read ahead, with nothing else to
do: if a batch takes it less than a step takes the devices, no step waits.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.data.pipeline import batches
from longlive_jax.eval.bench import Record, setting
from longlive_jax.model.tokenizer import load_tokenizer
from longlive_jax.parallel.halo import windows_of

PART = "data"


def measure(experiment: Experiment, repeats: int) -> Iterator[Record]:
  """Reads batches, all windows of a clip that `parallel.seq` devices of one process need.

  Args:
    experiment: checked; `data.source` videos or latents.
    repeats: how often as many batches are timed as threads read, for these end together.

  Yields:
    One record; `median_seconds` is of one batch.

  Raises:
    FileNotFoundError, ValueError: see `data.sources.open_source`.
  """
  data, batch, video = experiment.data, experiment.train.batch, experiment.video
  windows, split = windows_of(experiment, experiment.parallel.seq)
  latents = data.blocks * experiment.model.block_latents
  spans = windows.spans if split else windows.spans[:1]
  if data.source == "latents":
    spans = ((0, latents),)
  tokenize = load_tokenizer(experiment.model.text)
  readers = min(data.readers, data.ahead * batch)
  reading: Any = batches(experiment, tokenize, rows=range(batch), windows=spans)
  with contextlib.closing(reading):
    for _ in range(data.ahead + 1):  # what the threads hold from the start
      next(reading)
    found = [seconds_of(reading, readers) / readers for _ in range(repeats)]
  low, median, high = np.percentile(found, [10, 50, 90])
  yield {
    "case": "training step",
    "implementation": data.source,
    "part": PART,
    "sizes": {
      "latents": latents,
      "batch": batch,
      "seq": experiment.parallel.seq,
      "frames": sum(stop - start for start, stop in spans),
      "height": video.height,
      "width": video.width,
    },
    "inputs": "files of data.path",
    "median_seconds": median,
    "p10_seconds": low,
    "p90_seconds": high,
    "repeats": repeats,
    "readers": readers,
    "cores": os.cpu_count(),
    "tflops_per_second": None,
    **setting(),
  }


def seconds_of(reading: Iterator[Any], count: int) -> float:
  """How long so many batches take."""
  began = time.perf_counter()
  for _ in range(count):
    next(reading)
  return time.perf_counter() - began
