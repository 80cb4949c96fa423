"""Where the clips of a step come from: the shapes world, or files.

A feed is called with the number of updates done and gives `Clips`, placed on the mesh. It keeps the
time that it waited for data.
"""

import time
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import Experiment
from longlive_jax.data.latent_files import autoencoder_name
from longlive_jax.io.processes import is_first, of_all, wait_for_all
from longlive_jax.model.rope import temporal_table
from longlive_jax.parallel.halo import Windows, encode, windows_of
from longlive_jax.parallel.mesh import local_part, replicate, split_batch
from longlive_jax.parallel.parked import at_hand
from longlive_jax.sample.sampler import Models
from longlive_jax.train import clips
from longlive_jax.train.step import Clips, keys_of
from longlive_jax.types import SAMPLES, SEQ, Array, PyTree


class Feed(Protocol):
  """Called with the updates done, gives the clips of the next one.

  Attributes:
    waited: seconds that the last call waited for data.
    fingerprint: changes when its files do, and so the order of samples; empty without files.
  """

  waited: float
  fingerprint: str

  def __call__(self, step: int) -> Clips: ...

  def start(self, first_sample: int) -> None:
    """Goes to where so many samples have been taken; comes before the first call."""
    ...

  def close(self) -> None:
    """Ends what reads ahead."""
    ...


def text_dropout(
  experiment: Experiment, models: Models
) -> Callable[[Array, Array, Array, PyTree], Array]:
  """`(key, tokens, masks [B, P, L], text parameters) -> prompts [B * P, L, E]`.

  A share of the samples sees the negative prompt in all blocks.
  """
  share, dtype = experiment.train.prompt_dropout_share, experiment.model.text.dtype
  nothing = models.tokenizer([experiment.sample.negative_prompt])

  def prompts(key: Array, tokens: Array, masks: Array, text: PyTree) -> Array:
    drop = jax.random.bernoulli(key, share, (tokens.shape[0], 1, 1))
    ids, mask = (
      jnp.where(drop, empty, a).reshape(-1, a.shape[-1])
      for a, empty in zip((tokens, masks), nothing, strict=True)
    )
    return models.text.bind(text)(ids, mask, dtype=dtype)

  return prompts


class ShapesFeed:
  """Clips of the shapes world: rendered and encoded once, kept as latents on every device."""

  def __init__(self, experiment: Experiment, models: Models, mesh: Mesh):
    vae, f = models.vae, experiment.model.block_latents
    bank = clips.make_bank(
      experiment,
      clips.mesh_encoder(vae, mesh, f),
      models.params["vae"],
      models.tokenizer,
      clips.group_of(mesh, experiment.data.clips),
    )
    logging.info("bank of %d clips, latents %s", experiment.data.clips, bank.latents.shape)
    self.waited, self.fingerprint = 0.0, ""
    self._bank, self._text = replicate(bank, mesh), models.params["text"]
    if not experiment.model.text.parked:
      self._text = replicate(self._text, mesh)
    self._mesh = mesh
    self._draw = jax.jit(draw_shapes(experiment, models, mesh))

  def start(self, first_sample: int) -> None:
    """Every step draws its own samples, so there is nothing to go to."""

  def close(self) -> None:
    """Nothing reads ahead."""

  def __call__(self, step: int) -> Clips:
    return self._draw(np.int32(step), self._bank, replicate(self._text, self._mesh))


def draw_shapes(
  experiment: Experiment, models: Models, mesh: Mesh
) -> Callable[[Array, clips.Bank, PyTree], Clips]:
  """Draws the samples of a step out of a bank: `(step, bank, text parameters) -> clips`."""
  train, data = experiment.train, experiment.data
  turns, prompts = clips.rotations(experiment), text_dropout(experiment, models)

  def draw(step: Array, bank: clips.Bank, text: PyTree) -> Clips:
    keys = keys_of(train.seed, step)
    clip, blocks = clips.choose(keys.pick, bank, train.batch, data)
    take = clip[:, None], blocks
    clean = bank.latents[take].astype(jnp.float32)
    clean = clean.reshape(train.batch, -1, *clean.shape[3:])
    embeddings = prompts(keys.dropped, bank.tokens[take], bank.masks[take], text)
    cos, sin = turns(bank, take, clean.shape[:2])
    return split_batch(Clips(clean, embeddings, cos, sin), mesh)

  return draw


class FileFeed:
  """Clips of video files or of latents computed before.

  Frames are decoded, moved and encoded by the devices that own them, see `parallel.halo`.

  Args:
    experiment: checked experiment.
    models: VAE and text encoder, placed on the mesh.
    mesh: of the run.
  """

  def __init__(self, experiment: Experiment, models: Models, mesh: Mesh):
    self.experiment, self.models, self.mesh = experiment, models, mesh
    self.waited, self.fingerprint = 0.0, ""
    self._videos = experiment.data.source == "videos"
    windows, self._split = windows_of(experiment, mesh.shape[SEQ])
    self._spans = windows.spans
    if not self._videos:  # latents are cut without a halo
      parts = range(0, windows.latents * mesh.shape[SEQ], windows.latents)
      self._spans, self._split = tuple((p, p + windows.latents) for p in parts), True
    self._encode = jax.jit(encode_files(experiment, models, mesh, windows))
    self._samples: Any = None

  def start(self, first_sample: int) -> None:
    from longlive_jax.data import pipeline  # needs PyAV and grain, which the shapes world does not

    self.close()
    source = open_files(self.experiment, self.models)
    self.fingerprint = source.fingerprint
    rows, ranks = local_part(self.mesh, self.experiment.train.batch)
    spans = [self._spans[rank] for rank in ranks] if self._split else self._spans[:1]
    self._samples = pipeline.batches(
      self.experiment,
      self.models.tokenizer,
      rows=rows,
      windows=spans,
      first_sample=first_sample,
      source=source,
    )

  def close(self) -> None:
    if self._samples is not None:
      self._samples.close()
      self._samples = None

  def __call__(self, step: int) -> Clips:
    if self._samples is None:
      raise RuntimeError("start() comes before the first step")
    started = time.perf_counter()
    sample = next(self._samples)
    self.waited = time.perf_counter() - started
    cos, sin = turns_of(self.experiment, sample.shots)
    data = self._place(
      sample.video if self._videos else sample.latents,
      P(SAMPLES, SEQ) if self._split else P(SAMPLES),
    )
    rows = (sample.tokens, sample.masks, sample.valid, cos, sin)
    params = self.models.params["vae"], at_hand(self.models.params["text"])
    return self._encode(np.int32(step), params, data, *(self._place(a, P(SAMPLES)) for a in rows))

  def _place(self, local: np.ndarray, spec: P) -> Array:
    return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), local)


def open_files(experiment: Experiment, models: Models, *, latents: bool = True) -> Any:
  """The source that `data.source` names, opened by all processes.

  Args:
    experiment: checked experiment.
    models: tokenizer, and the autoencoder that latents must come from.
    latents: whether latents are used, and not their captions alone.

  Raises:
    FileNotFoundError, ValueError: see `data.sources.open_source`; or processes find other files.
  """
  from longlive_jax.data import pipeline  # needs PyAV and grain, which the shapes world does not

  stored = latents and experiment.data.source == "latents"
  vae = autoencoder_name(models.params["vae"]) if stored else None
  if not is_first():
    wait_for_all("index of files")  # which process 0 writes
  source = pipeline.open_source(experiment, models.tokenizer, vae)
  if is_first():
    wait_for_all("index of files")
  if len(set(of_all(zlib.crc32(source.fingerprint.encode()) >> 1))) > 1:
    raise ValueError(
      f"data.path='{experiment.data.path}': the processes find different files there"
    )
  return source


def turns_of(experiment: Experiment, shots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Temporal rotations (cos, sin) `[B, F, P_t]` of clips with these shot numbers `[B, P]`."""
  model, sample, f = experiment.model, experiment.sample, experiment.model.block_latents
  starts = np.arange(shots.shape[1]) * float(f)
  if not sample.relative_rope:
    starts = starts + shots * sample.shot_offset_latents
  starts = np.broadcast_to(starts, shots.shape)
  positions = (starts[..., None] + np.arange(f)).reshape(len(shots), -1) * sample.t_scale
  return temporal_table(positions, model.head_dim, model.rope_theta)


def encode_files(
  experiment: Experiment, models: Models, mesh: Mesh, windows: Windows
) -> Callable[..., Clips]:
  """What a device does with files: pixels to latents, tokens to embeddings."""
  prompts = text_dropout(experiment, models)
  latents = experiment.data.blocks * experiment.model.block_latents

  def run(
    step: Array,
    params: tuple[PyTree, PyTree],
    data: Array,
    tokens: Array,
    masks: Array,
    valid: Array,
    cos: Array,
    sin: Array,
  ) -> Clips:
    vae, text = params
    keys = keys_of(experiment.train.seed, step)
    if data.dtype == jnp.uint8:
      clean = encode(models.vae, vae, data, windows, mesh)
    else:
      clean = data.reshape(data.shape[0], latents, *data.shape[3:]).astype(jnp.float32)
    embeddings = prompts(keys.dropped, tokens, masks, text)
    mask = None
    if experiment.data.pad:
      mask = (jnp.arange(latents) < valid[:, None]).astype(jnp.float32)
    return split_batch(Clips(clean, embeddings, cos, sin, mask), mesh)

  return run
