"""Encoding of clips that are split over devices: each encodes its latents and some before them.

The encoder is causal, and a latent depends on a bounded number of frames to its left: 28 latents'
worth in the Wan 2.2 VAE. A device that wants the latents [a, b) of a clip feeds the frames of
[a - halo, b) and drops what comes before a. The first frame of any window is encoded as a latent of
its own; a window that does not start with the clip therefore starts with the last frame of the
latent before, which keeps the groups of four frames aligned and gives one more latent to drop.

    window of device p: frames [max(0, 4 (a - halo - 1)), ...), 4 (halo + F / P) + 1 of them

All windows have one length, that of the longest; devices at the start of the clip, whose halo would
reach beyond it, encode some latents after their own instead, which costs no time and changes
nothing, for nothing looks ahead.

Source: spec/training.md sections 6 and 15.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlive_jax.checks import check_at_least, check_divides
from longlive_jax.config import Experiment
from longlive_jax.model.module import Network
from longlive_jax.model.vae import TIME, from_uint8
from longlive_jax.types import SAMPLES, SEQ, Array, PyTree


@dataclasses.dataclass(frozen=True)
class Windows:
  """What each device of a clip encodes.

  Attributes:
    frames: of a window.
    starts: first frame of each window.
    drops: latents at the start of each that are not its own.
    latents: of a device's own.
  """

  frames: int
  starts: tuple[int, ...]
  drops: tuple[int, ...]
  latents: int

  @property
  def encoded(self) -> int:
    """Latents a device encodes."""
    return 1 + (self.frames - 1) // TIME

  @property
  def spans(self) -> tuple[tuple[int, int], ...]:
    """(first frame, frame after the last) of each window."""
    return tuple((start, start + self.frames) for start in self.starts)


def split_windows(latents: int, ranks: int, halo: int) -> Windows:
  """Windows of a clip.

  Args:
    latents: F, a multiple of `ranks`.
    ranks: devices that share the clip.
    halo: latents encoded to the left of a device's own, see the module.
  """
  check_at_least("parallel.halo_latents", halo, 0)
  check_divides("latents of a clip", latents, "devices of a clip", ranks)
  own = latents // ranks
  firsts = [max(0, rank * own - halo) for rank in range(ranks)]
  starts = tuple(TIME * max(first - 1, 0) for first in firsts)
  drops = tuple(rank * own - first + (1 if first else 0) for rank, first in enumerate(firsts))
  frames = TIME * min(halo + own, latents - 1) + 1
  return Windows(frames, starts, drops, own)


def whole_clip(latents: int, ranks: int) -> Windows:
  """Every device encodes the whole clip and keeps its part."""
  own = latents // ranks
  drops = tuple(rank * own for rank in range(ranks))
  return Windows(TIME * (latents - 1) + 1, (0,) * ranks, drops, own)


def windows_of(experiment: Experiment, ranks: int) -> tuple[Windows, bool]:
  """What each of `ranks` devices encodes of a training clip, and whether they differ in it."""
  latents = experiment.data.blocks * experiment.model.block_latents
  if experiment.parallel.chunk_vae and ranks > 1:
    return split_windows(latents, ranks, experiment.parallel.halo_latents), True
  return whole_clip(latents, ranks), False


def encode(
  vae: Network,
  params: PyTree,
  video: Array,
  windows: Windows,
  mesh: Mesh,
  latents_per_step: int | None = None,
) -> Array:
  """Latents of a clip, each device its own.

  Args:
    vae: declared VAE.
    params: its parameters, on every device.
    video: uint8 `[B, P, T_w, H, W, 3]`, the windows of the devices; `[B, 1, T, H, W, 3]` if all
      encode the same whole clip.
    windows: of the P devices along "seq".
    mesh: see `parallel.mesh`.
    latents_per_step: see `Vae.encode_next`.

  Returns:
    `[B, F, h, w, C]` float32 normalised.

  Sharding: video and latents are split over data and fsdp, and over seq along their second axis; a
  whole clip is on all devices of seq.
  """
  ranks = mesh.shape[SEQ]

  def island(params: PyTree, video: Array) -> Array:
    rank = jax.lax.axis_index(SEQ)
    latents = vae.bind(params).encode(from_uint8(video[:, 0]), latents_per_step)
    first = jnp.asarray(windows.drops)[rank]
    return jax.lax.dynamic_slice_in_dim(latents, first, windows.latents, 1)

  split = P(SAMPLES, SEQ) if video.shape[1] == ranks else P(SAMPLES)
  return jax.shard_map(
    island, mesh=mesh, in_specs=(P(), split), out_specs=P(SAMPLES, SEQ), check_vma=False
  )(params, video)
