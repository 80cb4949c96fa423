"""Distribution matching: what moves the student, and what its critic learns.

With x the student's clip, noised to a level tau of its own, r the clean estimate of the teacher
(guided) and f that of the critic,

    g = (f - r) / mean |x - r|         the mean over a block
    student  1/2 mean (x - stop(x - g))^2                     so that dL/dx = g / N
    critic   mean |v - (noise - x)|^2

The critic's velocity is compared as the network says it: the original goes through a clean estimate
in bfloat16, whose error grows as 1 / sigma.

Source: spec/training.md sections 9.4 and 9.5.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from longlive_jax.model import flow
from longlive_jax.model.attention import TeacherForcing
from longlive_jax.model.module import Network
from longlive_jax.model.ops import REFERENCE, Ops
from longlive_jax.train.self_forcing import stopped
from longlive_jax.types import Array, PyTree

LEAST, MOST = 20.0, 980.0  # timesteps of the scores


def score_timesteps(raw: Array, shift: float) -> Array:
  """Timesteps of the scores: `raw` in 0..999, moved towards noise and clamped; float32."""
  u = raw.astype(jnp.float32) / flow.TIMESTEPS
  shifted = flow.TIMESTEPS * shift * u / (1.0 + (shift - 1.0) * u)
  return jnp.clip(shifted, LEAST, MOST)


class Noised(NamedTuple):
  """A clip at the level of the scores.

  Attributes:
    clean: `[B, F, H, W, C]` float32, without gradient.
    noise: the same shape.
    noisy: the mixture.
    timesteps, sigmas: `[B, F]`; of given latents those of timestep 0.
    mask: `[B, F]` float32, latents that count.
  """

  clean: Array
  noise: Array
  noisy: Array
  timesteps: Array
  sigmas: Array
  mask: Array


def noised(
  clip: Array,
  noise: Array,
  timesteps: Array,
  table: flow.Table,
  first: Array | None = None,
  given: Array | None = None,
) -> Noised:
  """Noises a clip; a given first latent `[B, 1, H, W, C]` stays, at timestep 0, and does not count.

  Args:
    clip: `[B, F, H, W, C]`.
    noise: the same shape.
    timesteps: `[B, F]` from `score_timesteps`.
    table: training table.
    first: image-to-video.
    given: bool `[B]`, the samples that it is given to; None = all.
  """
  clean, sigmas = stopped(clip), flow.sigma_at(table, timesteps)
  noisy, mask = flow.add_noise(clean, noise, sigmas), jnp.ones(timesteps.shape)
  if first is not None:
    there = jnp.broadcast_to(jnp.arange(clip.shape[1]) == 0, timesteps.shape)
    there = there if given is None else there & given[:, None]
    noisy = jnp.where(there[..., None, None, None], first, noisy)
    timesteps, mask = jnp.where(there, 0.0, timesteps), jnp.where(there, 0.0, mask)
    sigmas = jnp.where(there, flow.sigma_at(table, 0.0), sigmas)
  return Noised(clean, noise, noisy, timesteps, sigmas, mask)


@dataclasses.dataclass(frozen=True)
class Score:
  """A network that judges whole clips.

  Attributes:
    network: declared DiT.
    plan: of its attention: block-causal over the noisy clip, or teacher forcing, which shows it the
      clip itself as clean history.
    pieces: prompts a sample.
    ops: matmul, attend, norm.
    remat: see the network.
  """

  network: Network
  plan: Any
  pieces: int
  ops: Ops = REFERENCE
  remat: str = "none"

  def velocity(self, params: PyTree, clip: Noised, prompts: Array) -> Array:
    """`[B, F, H, W, C]` float32 under prompts `[B * pieces, L, E_text]`."""
    model = self.network.bind(params)
    context = clip.clean if isinstance(self.plan, TeacherForcing) else None
    text, ops = model.text_kv(prompts, self.ops), self.ops
    return model(
      clip.noisy,
      clip.timesteps,
      text,
      self.plan,
      context=context,
      pieces=self.pieces,
      remat=self.remat,
      ops=ops,
    )[0]

  def clean(self, params: PyTree, clip: Noised, prompts: Array) -> Array:
    """The clean estimate under prompts."""
    return flow.to_clean(clip.noisy, self.velocity(params, clip, prompts), clip.sigmas)

  def guided(self, params: PyTree, clip: Noised, prompts: Array, nothing: Array, w: float) -> Array:
    """The clean estimate `c + w (c - u)`, u under the prompts `nothing`; w = 0 asks c alone."""
    found = self.clean(params, clip, prompts)
    return found if w == 0.0 else found + w * (found - self.clean(params, clip, nothing))


def direction(clean: Array, teacher: Array, critic: Array, block_latents: int) -> Array:
  """`(f - r) / mean |x - r|`, the mean over each block of each sample; not finite becomes 0.

  All `[B, F, H, W, C]` float32.
  """
  batch, latents, *rest = clean.shape
  blocks = (batch, latents // block_latents, block_latents, *rest)
  size = jnp.mean(jnp.abs(clean - teacher).reshape(blocks), (2, 3, 4, 5), keepdims=True)
  g = (critic - teacher).reshape(blocks) / size
  return jnp.where(jnp.isfinite(g), g, 0.0).reshape(clean.shape)


def masked_mean(x: Array, mask: Array) -> Array:
  """Mean of x `[B, F, H, W, C]` over the latents that a mask `[B, F]` counts."""
  each = jnp.mean(x, (2, 3, 4))
  return jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def student_loss(clip: Array, g: Array, mask: Array) -> Array:
  """`1/2 mean (x - stop(x - g))^2`; its gradient with respect to the clip is g / N."""
  goal = stopped(clip - g)
  return 0.5 * masked_mean((clip - goal) ** 2, mask)


def critic_loss(score: Score, params: PyTree, clip: Noised, prompts: Array) -> Array:
  """Squared error of the critic's velocity on the student's clip."""
  wrong = score.velocity(params, clip, prompts) - flow.velocity_target(clip.clean, clip.noise)
  return masked_mean(wrong**2, clip.mask)


def matching_direction(
  teacher: Score,
  critic: Score,
  params: tuple[PyTree, PyTree],
  clip: Noised,
  prompts: Array,
  nothing: Array,
  guidance: tuple[float, float],
  block_latents: int,
) -> Array:
  """g of the module, without gradient.

  Args:
    teacher, critic: the networks that judge.
    params: theirs.
    clip: the student's, noised.
    prompts: `[B * P, L, E_text]`.
    nothing: the negative prompt, the same shape.
    guidance: of teacher and critic, see `Score.guided`.
    block_latents: latents a block.
  """
  r, f = (
    score.guided(own, clip, prompts, nothing, w)
    for score, own, w in zip((teacher, critic), params, guidance, strict=True)
  )
  return stopped(direction(clip.clean, r, f, block_latents))
