"""Times of a whole sampler in its steady state: latents, frames, both, and the way to the first.

Weights are those of the experiment, or random. A script is longer than the window, so that all
blocks that are timed see a full one. Parts: "latents" (the transformer alone), "decode" (the
autoencoder alone), "frames" (a script to frames on the host, as users get them).
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.eval.bench import Record, setting
from longlive_jax.sample.sampler import Sampler

PARTS = ("latents", "decode", "frames")
PROMPT = "one red circle moving right, over snow"


def script_of(experiment: Experiment, blocks: int, name: str = "") -> Script:
  """A script of one prompt that fills the window before `blocks` more."""
  full = experiment.sample.window_latents // experiment.model.block_latents
  return Script((Shot(f"{PROMPT} {name}".strip(), blocks=full + blocks),), seed=1)


def steady(produced: Iterator[Any], blocks: int) -> list[float]:
  """Seconds from one of the last blocks to the next, each awaited."""
  found: list[float] = []
  for item in produced:
    jax.block_until_ready(item)
    found.append(time.perf_counter())
  return np.diff(found)[-blocks:].tolist()


def seconds_of(sampler: Sampler, part: str, blocks: int) -> list[float]:
  """Seconds a block of a part."""
  experiment = sampler.experiment
  script = script_of(experiment, blocks)
  if part == "latents":
    return steady(sampler.latent_blocks([script]), blocks)
  if part == "frames":
    return steady(sampler.stream(script), blocks)
  decoder, state = sampler.prepare().decoder, None
  latents = next(iter(sampler.latent_blocks([script_of(experiment, 1)])))
  found = []
  for _ in range(blocks + 2):
    began = time.perf_counter()
    frames, state = decoder.decode(latents, state)
    jax.block_until_ready(frames)
    found.append(time.perf_counter() - began)
  return found[-blocks:]


def first_frames(sampler: Sampler, name: str) -> float:
  """Seconds from a prompt that was not seen before to its first frames on the host."""
  began = time.perf_counter()
  frames = sampler.stream(script_of(sampler.experiment, 1, name))
  next(frames)
  seconds = time.perf_counter() - began
  for _ in frames:  # what is on its way would be waited for by whoever comes next
    pass
  return seconds


def measure(
  experiment: Experiment, make: Callable[[], Sampler], parts: tuple[str, ...], blocks: int
) -> Iterator[Record]:
  """Builds a sampler and times it.

  Args:
    experiment: checked experiment.
    make: builds the sampler.
    parts: of `PARTS`.
    blocks: that are timed, at least 2.

  Yields:
    A record for each part, seconds a block; the first has what starting took too.
  """
  began = time.perf_counter()
  sampler = make()
  jax.block_until_ready(sampler.models.params)
  built = time.perf_counter()
  sampler.prepare()
  prepared = time.perf_counter()
  start = {
    "build_seconds": built - began,
    "compile_seconds": prepared - built,
    "first_frames_seconds": [first_frames(sampler, name) for name in ("once", "again")],
  }
  for part in parts:
    low, median, high = np.percentile(seconds_of(sampler, part, blocks), [10, 50, 90])
    stats = jax.local_devices()[0].memory_stats() or {}
    yield {
      "case": "rollout",
      "part": part,
      "sizes": sizes_of(experiment),
      "median_seconds": median,
      "p10_seconds": low,
      "p90_seconds": high,
      "repeats": blocks,
      "frames_per_second": experiment.block_frames / median,
      "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
      **start,
      **setting(),
    }


def sizes_of(experiment: Experiment) -> dict[str, Any]:
  """What a record says of sizes and precision."""
  model, sample, quant = experiment.model, experiment.sample, experiment.quant
  return {
    "name": experiment.name,
    "layers": model.layers,
    "width": model.width,
    "steps": sample.steps,
    "guidance": sample.guidance,
    "window": sample.window_latents,
    "linears": quant.linears,
    "cache": quant.cache,
    "attention": model.attention,
    "decode_latents": sample.decode_latents,
    "decode_tiles": sample.decode_tiles,
    "decoder_width": model.vae.decoder_width,
    "seq": experiment.parallel.seq,
    "height": experiment.video.height,
    "width_pixels": experiment.video.width,
  }
