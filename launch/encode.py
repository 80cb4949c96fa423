r"""Encodes a video data set ahead of training, with the autoencoder of io.checkpoint.

  python -m launch.encode --config=configs/tiny.py:ar --config.data.path=outputs/shapes_set \
      --out=outputs/latents

The result is for data.source=latents, see docs/data.md. If it is stopped, the same command goes on
with what is missing.
"""

import collections
import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from longlive_jax.build import build_vae, enable_compile_cache
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main
from longlive_jax.data.latent_files import LatentFormat, autoencoder_name
from longlive_jax.data.latent_write import LatentWriter, planned_items, source_of
from longlive_jax.data.sources import VideoSource, check_prompts
from longlive_jax.data.video_index import VideoIndex
from longlive_jax.data.video_plan import Plan
from longlive_jax.data.video_read import read_frames
from longlive_jax.io.atomic import check_writable
from longlive_jax.model.tokenizer import load_tokenizer
from longlive_jax.parallel import halo
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.types import SAMPLES, Array, PyTree

CONFIG = define_config_flag()
OUT = flags.DEFINE_string("out", None, "folder of latents to write, or to go on with")
TAKES = flags.DEFINE_integer("takes", 1, "samples of each folder, from different starts", 1)
UNTRAINED = flags.DEFINE_bool("untrained", False, "go on although io.checkpoint is empty")


class Encoder(NamedTuple):
  """The autoencoder on all devices.

  Attributes:
    name: tells its weights apart.
    batch: samples at a time, one a device.
    encode: uint8 `[b, T, H, W, 3]` -> float32 `[b, F, h, w, C]`, 1 <= b <= batch.
  """

  name: str
  batch: int
  encode: Callable[[np.ndarray], np.ndarray]


def make_encoder(experiment: Experiment) -> Encoder:
  """Loads the autoencoder; every device encodes whole samples, as in training."""
  batch = len(jax.devices())
  mesh = make_mesh(batch)
  vae, params = build_vae(experiment, mesh)
  windows = halo.whole_clip(experiment.data.blocks * experiment.model.block_latents, 1)

  @jax.jit
  def run(params: PyTree, video: Array) -> Array:
    return halo.encode(vae, params, video[:, None], windows, mesh)

  def encode(video: np.ndarray) -> np.ndarray:
    full = np.resize(video, (batch, *video.shape[1:]))  # repeats samples: one shape, one program
    placed = jax.device_put(full, NamedSharding(mesh, P(SAMPLES)))
    return np.asarray(run(params, placed))[: len(video)]

  return Encoder(autoencoder_name(params), batch, encode)


class Item(NamedTuple):
  """A sample that is to be encoded, and its frames."""

  name: str
  plan: Plan
  video: np.ndarray


def decoded(
  items: Iterator[tuple[str, Plan]], experiment: Experiment, ahead: int
) -> Generator[Item | None]:
  """Decodes items in order, at most `ahead` before they are taken.

  Yields:
    Items; None in place of one that cannot be read, with a logged line.
  """
  video, data = experiment.video, experiment.data

  def read(plan: Plan) -> np.ndarray:
    return read_frames(plan, 0, len(plan.frames), video.height, video.width, data.fit)

  pool = ThreadPoolExecutor(data.readers)
  waiting = collections.deque(
    (*item, pool.submit(read, item[1])) for item in itertools.islice(items, ahead)
  )
  try:
    while waiting:
      name, plan, reading = waiting.popleft()
      try:
        item = Item(name, plan, reading.result())
      except ValueError as error:
        logging.warning("skipped item %s of video/%s: %s", name, plan.name, error)
        item = None
      yield item
      waiting.extend((*item, pool.submit(read, item[1])) for item in itertools.islice(items, 1))
  finally:
    pool.shutdown(cancel_futures=True)


class Outcome(NamedTuple):
  """Items that were written, that were there before, and that cannot be read."""

  written: int
  before: int
  unreadable: int


def encode_items(
  experiment: Experiment, index: VideoIndex, writer: LatentWriter, encoder: Encoder, takes: int
) -> Outcome:
  """Writes all items that are missing."""
  place = {folder.name: number for number, folder in enumerate(index.folders, 1)}
  written = before = unreadable = 0

  def missing() -> Iterator[tuple[str, Plan]]:
    nonlocal before
    for name, plan in planned_items(index, experiment, takes):
      if writer.has(name):
        before += 1
      else:
        yield name, plan

  hidden = not sys.stderr.isatty()
  ahead = max(encoder.batch, experiment.data.readers)
  with (
    tqdm(total=len(place), unit="sample", disable=hidden) as bar,
    contextlib.closing(decoded(missing(), experiment, ahead)) as items,
  ):
    for group in itertools.batched(items, encoder.batch):
      found = [item for item in group if item is not None]
      unreadable += len(group) - len(found)
      if not found:
        continue
      latents = encoder.encode(np.stack([item.video for item in found]))
      for (name, plan, _), made in zip(found, latents, strict=True):
        writer.add(name, made, plan.prompts, plan.shots, plan.valid_latents)
      written += len(found)
      bar.update(place[found[-1].plan.name] - bar.n)
  return Outcome(written, before, unreadable)


def of_videos(config: Experiment) -> Experiment:
  """The checked experiment with `data.source=videos`, which is all that can be encoded."""
  if config.data.source == "latents":
    raise ValueError("data.source=latents is encoded already; use data.source=videos")
  config.data.source, config.data.far_share = "videos", 0.0
  return from_flags(config)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = of_videos(CONFIG.value)
  if not OUT.value:
    raise ValueError("--out is needed: the folder of latents")
  if not experiment.io.checkpoint and not UNTRAINED.value:
    raise ValueError(
      "io.checkpoint is empty, and latents of an untrained autoencoder are of no use: name its"
      " weights, or give --untrained"
    )
  out = Path(OUT.value)
  check_writable(out, folder=True)
  source = VideoSource(experiment)
  check_prompts(source, load_tokenizer(experiment.model.text))
  enable_compile_cache(experiment)
  encoder = make_encoder(experiment)
  form = LatentFormat.of(experiment, encoder.name)
  writer = LatentWriter(out, form, source_of(source.index, experiment, TAKES.value))
  done = encode_items(experiment, source.index, writer, encoder, TAKES.value)
  count = writer.finish(done.before + done.written)
  print(
    f"{out}: {count} items of {len(source)} samples; {done.written} are new, {done.before} were"
    f" there, {done.unreadable} could not be read; {source.too_short} samples are too short"
  )


if __name__ == "__main__":
  run_main(main)
