"""Where the prompts and first latents of distillation come from: the shapes world, files, scripts.

A feed is called with the number of steps done and gives what the clips of that step are made of.
No pixels are read but those of first frames.
"""

import functools
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.data.prompts import BlockPrompt, expand, script_files
from longlive_jax.io.image import read_image
from longlive_jax.io.processes import whole
from longlive_jax.sample.sampler import Models
from longlive_jax.train.clips import (
  block_prompts,
  encode_clips,
  find_cuts,
  group_of,
  make_clips,
  mesh_encoder,
)
from longlive_jax.train.feed import open_files


class Drawn(NamedTuple):
  """What the clips of a step are made of.

  Attributes:
    tokens, masks: int32 `[B, P, L]`, of the prompt of each block.
    cuts: `[P][B]`, whether a block begins a new shot.
    first: first frames uint8 `[B, H, W, 3]` or first latents `[B, 1, h, w, C]`; None without.
  """

  tokens: np.ndarray
  masks: np.ndarray
  cuts: list[list[bool]]
  first: np.ndarray | None


class DistillFeed(Protocol):
  """Called with the steps done; `fingerprint` changes when its files do."""

  fingerprint: str

  def __call__(self, step: int) -> Drawn: ...

  def start(self, first_sample: int) -> None:
    """Goes to where so many samples have been taken; comes before the first call."""
    ...

  def close(self) -> None:
    """Ends what reads ahead."""
    ...


def open_feed(experiment: Experiment, models: Models, mesh: Mesh) -> DistillFeed:
  """The feed that `data.source` names.

  Raises:
    FileNotFoundError, ValueError: files that are not there, or cannot be used; names them.
  """
  source = experiment.data.source
  if source == "shapes":
    return shapes_feed(experiment, models, mesh)
  return scripts_feed(experiment, models) if source == "scripts" else FileFeed(experiment, models)


class Listed:
  """A list of clips; every step draws its own from (seed, step).

  Args:
    experiment: `train.seed`, `train.batch`.
    tokens, masks: int32 `[N, P, L]`.
    cuts: bool `[N, P]`.
    first: `[N, ...]` as in `Drawn`, or None.
  """

  fingerprint = ""

  def __init__(
    self,
    experiment: Experiment,
    tokens: np.ndarray,
    masks: np.ndarray,
    cuts: np.ndarray,
    first: np.ndarray | None,
  ):
    self.train = experiment.train
    self.tokens, self.masks, self.cuts, self.first = tokens, masks, cuts, first
    logging.info("prompts of %d clips", len(cuts))

  def start(self, first_sample: int) -> None:
    """There is nothing to go to."""

  def close(self) -> None:
    """Nothing reads ahead."""

  def __call__(self, step: int) -> Drawn:
    rng = np.random.default_rng((self.train.seed, step))
    rows = rng.integers(len(self.cuts), size=self.train.batch)
    first = None if self.first is None else self.first[rows]
    return Drawn(self.tokens[rows], self.masks[rows], self.cuts[rows].T.tolist(), first)


def shapes_feed(experiment: Experiment, models: Models, mesh: Mesh) -> Listed:
  """Prompts, cuts and first latents of clips of the shapes world."""
  data, prefix = experiment.data, experiment.sample.cut_prefix
  specs, lengths = make_clips(experiment, data.clips, data.seed)
  prompts: list[str] = []
  found = np.zeros((data.clips, data.blocks), bool)
  for row, (spec, shots) in enumerate(zip(specs, lengths, strict=True)):
    cuts, shot_of = find_cuts(spec, shots), np.repeat(np.arange(len(shots)), shots)
    prompts += block_prompts(spec, shot_of, cuts, prefix)[: data.blocks]
    found[row, [cut for cut in cuts if cut < data.blocks]] = True
  shape = (data.clips, data.blocks, -1)
  tokens, masks = (a.reshape(shape) for a in models.tokenizer(prompts))
  first = None
  if experiment.train.first_latent_share:
    encode = mesh_encoder(models.vae, mesh)
    group = group_of(mesh, data.clips)
    made = encode_clips(experiment, specs, encode, models.params["vae"], group, 1)
    first = np.asarray(whole(made), np.float32)
  return Listed(experiment, tokens, masks, found, first)


def scripts_feed(experiment: Experiment, models: Models) -> Listed:
  """Prompts and cuts of script files, the first `data.blocks` blocks of each.

  A script that is shorter goes on with its last prompt.

  Raises:
    FileNotFoundError, ValueError: see `data.prompts.script_files`; a script re-caches, or has no
      image though first latents are wanted.
  """
  data, sample, model = experiment.data, experiment.sample, experiment.model
  images = experiment.train.first_latent_share > 0
  prompts: list[str] = []
  cuts, first = [], []
  for name, script in script_files(data.path, "data.path"):
    plan = expand(script, experiment.video.fps, model.block_latents, sample.cut_prefix)
    last = BlockPrompt(script.shots[-1].prompt, plan[-1].shot)
    plan = (*plan[: data.blocks], *[last] * (data.blocks - len(plan)))
    if any(entry.transition == "recache" for entry in plan):
      raise ValueError(f"script '{name}' of data.path re-caches, which is for sampling; use keep")
    prompts += [entry.prompt for entry in plan]
    shots = np.asarray([entry.shot for entry in plan])
    cuts.append(np.diff(shots, prepend=0) > 0)
    if images and script.image is None:
      raise ValueError(f"script '{name}' of data.path has no image: use train.first_latent_share=0")
    if images:
      first.append(read_image(str(script.image), experiment.video.height, experiment.video.width))
  tokens, masks = (a.reshape(len(cuts), data.blocks, -1) for a in models.tokenizer(prompts))
  return Listed(experiment, tokens, masks, np.stack(cuts), np.stack(first) if images else None)


class FileFeed:
  """Captions of video files or of latents computed before, and their first frame or latent.

  Each process reads all samples of a batch, for little is read of them.

  Args:
    experiment: checked experiment.
    models: tokenizer, and the autoencoder that latents must come from.
  """

  def __init__(self, experiment: Experiment, models: Models):
    from longlive_jax.data import pipeline  # needs PyAV and grain, which the shapes world does not

    self.images = experiment.train.first_latent_share > 0
    source = open_files(experiment, models, latents=self.images)
    self.fingerprint = source.fingerprint
    self._samples: Any = None
    self._open = functools.partial(
      pipeline.batches,
      experiment,
      models.tokenizer,
      rows=range(experiment.train.batch),
      windows=((0, 1),),
      source=source,
    )

  def start(self, first_sample: int) -> None:
    self.close()
    self._samples = self._open(first_sample=first_sample)

  def close(self) -> None:
    if self._samples is not None:
      self._samples.close()
      self._samples = None

  def __call__(self, step: int) -> Drawn:
    if self._samples is None:
      raise RuntimeError("start() comes before the first step")
    sample = next(self._samples)
    cuts = np.diff(sample.shots, axis=1, prepend=sample.shots[:, :1]) > 0
    first = None
    if self.images:
      first = sample.latents[:, 0] if sample.video is None else sample.video[:, 0, 0]
    return Drawn(sample.tokens, sample.masks, cuts.T.tolist(), first)
