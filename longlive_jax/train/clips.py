"""Clips of the shapes world as training data: rendered on the device, kept as latents.

A bank holds long clips. A training sample takes a few blocks of one clip: its first blocks, or
the set of blocks that a late block of a rollout would see (sink, pin, most recent), at their true
positions, so that training and sampling attend over the same distances.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass
from tqdm import tqdm

from longlive_jax.config import Data, Experiment
from longlive_jax.data import shapes
from longlive_jax.data.shapes import random_shots
from longlive_jax.model.kv_cache import SlotState, Window, admit, pin_block
from longlive_jax.model.rope import temporal_table
from longlive_jax.parallel.mesh import split_batch
from longlive_jax.types import Array, PyTree

ENCODED = 16  # clips encoded at a time
LOG_SECONDS = 60  # between lines about a bank, where there is no bar


@functools.partial(
  register_dataclass,
  data_fields=["latents", "tokens", "masks", "visible", "cos", "sin"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Bank:
  """N long clips.

  Attributes:
    latents: `[N, blocks, F_b, H, W, C]` normalised.
    tokens: int32 `[N, blocks, L]`, the prompt of each block.
    masks: int32 `[N, blocks, L]`, 1 at real tokens.
    visible: int32 `[N, blocks, K]`: the blocks a late block attends to, itself last.
    cos, sin: float32 `[N, blocks, F_b, P_t]`, temporal rotation of each block, cuts included.
  """

  latents: Array
  tokens: Array
  masks: Array
  visible: Array
  cos: Array
  sin: Array


def visible_blocks(cuts: Sequence[int], blocks: int, window: Window, pin: bool) -> np.ndarray:
  """Blocks each block attends to, `[blocks, K]` in order of time; rows before K - 1 hold 0.

  Args:
    cuts: first blocks of the shots that are cut to.
    blocks: length of the clip.
    window: of the sampler, in blocks.
    pin: whether the first block after the last cut stays visible.
  """
  state, rows = SlotState(), np.zeros((blocks, window.slots), np.int32)
  for block in range(blocks):
    state, _ = admit(state, block, 0.0, window)
    if state.level == window.slots:
      rows[block] = sorted(state.blocks)
    state = pin_block(state, block) if pin and block in cuts else state
  return rows


def make_clips(
  experiment: Experiment, count: int, seed: int
) -> tuple[list[shapes.ClipSpec], list[list[int]]]:
  """Draws long clips: their specifications and the lengths of their shots in blocks."""
  rng = np.random.default_rng(seed)
  data, block_latents = experiment.data, experiment.model.block_latents
  specs, lengths = [], []
  for _ in range(count):
    shots = random_shots(rng, data.clip_blocks, data.max_shots)
    frames = shapes.shot_frames(shots, block_latents)
    specs.append(shapes.sample_clip(rng, frames, experiment.video, data.change_share))
    lengths.append(shots)
  return specs, lengths


def make_bank(
  experiment: Experiment,
  encode: Callable[[PyTree, Array], Array],
  params: PyTree,
  tokenize: Callable[[list[str]], tuple[np.ndarray, np.ndarray]],
  group: int,
) -> Bank:
  """Renders and encodes `data.clips` clips.

  Args:
    experiment: checked experiment.
    encode: (params, video `[b, T, H, W, 3]` in [-1, 1]) -> normalised latents `[b, F, h, w, C]`.
    params: of the encoder.
    tokenize: prompts -> (ids, mask) `[n, L]`.
    group: clips encoded at a time; a last, smaller group is filled up from the first clips.
  """
  data, sample, f = experiment.data, experiment.sample, experiment.model.block_latents
  specs, lengths = make_clips(experiment, data.clips, data.seed)
  latents = encode_clips(experiment, specs, encode, params, group, data.clip_blocks * f)
  latents = latents.reshape(data.clips, data.clip_blocks, f, *latents.shape[2:])
  prompts: list[str] = []
  visible, positions = [], []
  window = Window(sample.window_latents // f, sample.sink_latents // f)
  for spec, shots in zip(specs, lengths, strict=True):
    cuts = find_cuts(spec, shots)
    shot_of = np.repeat(np.arange(len(shots)), shots)
    prompts += block_prompts(spec, shot_of, cuts, sample.cut_prefix)
    visible.append(visible_blocks(cuts, data.clip_blocks, window, sample.pin_shots))
    cuts_so_far = np.searchsorted(cuts, np.arange(data.clip_blocks), side="right")
    starts = np.arange(data.clip_blocks) * f + cuts_so_far * sample.shot_offset_latents
    positions.append((starts[:, None] + np.arange(f)) * sample.t_scale)
  ids, mask = tokenize(prompts)
  shape, model = (data.clips, data.clip_blocks, -1), experiment.model
  turns = temporal_table(np.concatenate(positions), model.head_dim, model.rope_theta)
  return Bank(
    latents,
    jnp.asarray(ids).reshape(shape),
    jnp.asarray(mask).reshape(shape),
    jnp.asarray(np.stack(visible)),
    *(jnp.asarray(turn).reshape(*shape[:2], *turn.shape[1:]) for turn in turns),
  )


def find_cuts(spec: shapes.ClipSpec, lengths: Sequence[int]) -> list[int]:
  """First blocks of the shots that are cut to; `lengths` of all shots in blocks."""
  starts = np.cumsum(lengths)[:-1].tolist()
  return [b for b, shot in zip(starts, spec.shots[1:], strict=True) if not shot.follows]


def block_prompts(
  spec: shapes.ClipSpec, shot_of: np.ndarray, cuts: list[int], cut_prefix: str
) -> list[str]:
  """The prompt of each block, worded as the sampler words it."""
  captions = [shot.caption() for shot in spec.shots]
  return [
    (cut_prefix if block in cuts else "") + captions[shot] for block, shot in enumerate(shot_of)
  ]


def group_of(mesh: Mesh, count: int) -> int:
  """Clips that `encode_clips` takes at a time: a multiple of the devices of a mesh.

  On CPUs it is one a device: that keeps them busy, and signals are heard sooner.
  """
  most = mesh.size if mesh.devices.flat[0].platform == "cpu" else ENCODED
  return mesh.size * max(1, min(most, count) // mesh.size)


def mesh_encoder(
  vae: Any, mesh: Mesh, chunk: int | None = None
) -> Callable[[PyTree, Array], Array]:
  """An encoder for `encode_clips`: clips are split over a mesh, and each device gets all latents.

  Args:
    vae: the autoencoder.
    mesh: whose devices divide a group.
    chunk: latents encoded at a time; None: as many as the autoencoder says.
  """

  def encode(params: PyTree, video: Array) -> Array:
    latents = split_batch(vae.bind(params).encode(split_batch(video, mesh), chunk), mesh)
    return jax.lax.with_sharding_constraint(latents, NamedSharding(mesh, P()))

  return encode


def encode_clips(
  experiment: Experiment,
  specs: list[shapes.ClipSpec],
  encode: Callable[[PyTree, Array], Array],
  params: PyTree,
  group: int,
  latents: int,
) -> Array:
  """The first latents `[N, latents, h, w, C]` bfloat16 of N clips, made by groups.

  Each group is waited for, so that a signal is heard between two of them. The result lies on the
  devices as the latents of a group do.
  """
  data, video, count = experiment.data, experiment.video, len(specs)
  packed = shapes.pack_many(specs, data.max_shots)
  draw = functools.partial(
    shapes.render_packed,
    frame_indices=jnp.arange(4 * latents - 3),
    height=video.height,
    width=video.width,
  )

  @jax.jit
  def encode_group(params: PyTree, rows: Any) -> Array:
    return encode(params, jax.vmap(draw)(rows)).astype(jnp.bfloat16)

  made = None
  for start in group_starts(count, group):
    chosen = np.arange(start, start + group) % count
    found = encode_group(params, {name: rows[chosen] for name, rows in packed.items()})
    grown = zeros_like_rows(found, count) if made is None else made
    made = put_rows(grown, found, np.int32(start), min(group, count - start))
    made.block_until_ready()
  if made is None:
    raise ValueError("there are no clips to encode")
  return made


def zeros_like_rows(rows: Array, count: int) -> Array:
  """Zeros `[count, ...]` of the kind of some rows, where they lie."""
  fill = functools.partial(jnp.zeros, (count, *rows.shape[1:]), rows.dtype)
  return jax.jit(fill, out_shardings=rows.sharding)()


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def put_rows(array: Array, rows: Array, start: Array, keep: int) -> Array:
  """An array with the first `keep` of some rows put at `start`, in place."""
  return jax.lax.dynamic_update_slice_in_dim(array, rows[:keep], start, 0)


def group_starts(count: int, group: int) -> Iterator[int]:
  """Yields the first clip of each group, and shows how far they are: a bar, or lines of a log."""
  logging.info("encoding %d clips of the shapes world", count)
  told, hidden = time.monotonic(), not sys.stderr.isatty() or jax.process_index() != 0
  with tqdm(total=count, unit="clip", desc="clips", disable=hidden) as bar:
    for start in range(0, count, group):
      yield start
      bar.update(min(group, count - start))
      if hidden and time.monotonic() - told > LOG_SECONDS:
        logging.info("%d of %d clips are encoded", min(start + group, count), count)
        told = time.monotonic()


def choose(key: Array, bank: Bank, batch: int, data: Data) -> tuple[Array, Array]:
  """Draws `batch` samples: clips `[B]` and the blocks `[B, data.blocks]` taken of each."""
  pick, far, late = jax.random.split(key, 3)
  clips, blocks = bank.visible.shape[:2]
  clip = jax.random.randint(pick, (batch,), 0, clips)
  if data.far_share == 0.0:  # then a window of another length than a sample is no matter
    return clip, jnp.tile(jnp.arange(data.blocks), (batch, 1))
  last = jax.random.randint(late, (batch,), data.blocks, blocks)
  is_far = jax.random.uniform(far, (batch, 1)) < data.far_share
  return clip, jnp.where(is_far, bank.visible[clip, last], jnp.arange(data.blocks))


Turns = tuple[Array, Array]


def rotations(experiment: Experiment) -> Callable[[Bank, Any, tuple[int, ...]], Turns]:
  """Temporal rotations (cos, sin) `[B, F, P_t]` of the blocks taken of a bank, as the sampler's.

  With relative positions the blocks that are seen stand side by side, whenever they were.
  """
  model, sample = experiment.model, experiment.sample

  def absolute(bank: Bank, take: Any, shape: tuple[int, ...]) -> Turns:
    return bank.cos[take].reshape(*shape, -1), bank.sin[take].reshape(*shape, -1)

  def relative(bank: Bank, take: Any, shape: tuple[int, ...]) -> Turns:
    positions = np.arange(shape[1])[None] * sample.t_scale
    cos, sin = temporal_table(positions, model.head_dim, model.rope_theta)
    return jnp.tile(cos, (shape[0], 1, 1)), jnp.tile(sin, (shape[0], 1, 1))

  return relative if sample.relative_rope else absolute


def vae_clips(experiment: Experiment, count: int) -> Any:
  """Packed specifications of short clips, half of them with a cut at a latent's border."""
  rng = np.random.default_rng(experiment.data.seed)
  frames = 4 * experiment.data.vae_latents - 3
  specs = []
  for _ in range(count):
    cut = 4 * int(rng.integers(1, experiment.data.vae_latents)) - 3
    shots = [cut, frames - cut] if rng.random() < 0.5 else [frames]
    specs.append(shapes.sample_clip(rng, shots, experiment.video))
  return shapes.pack_many(specs, 2)
