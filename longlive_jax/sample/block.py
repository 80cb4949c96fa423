"""The two passes every rollout is made of, as pure functions.

`denoise` turns the noise of one block into latents, against the cache; `commit` runs the finished
latents once more at timestep 0, so that the cache holds clean keys and values. Sampling compiles
them ahead; training rollouts call the same functions inside their own jit.

Source: spec/inference.md sections 1.3, 1.4 and 3.4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment, Model
from longlive_jax.model import solvers
from longlive_jax.model.attention import Cached
from longlive_jax.model.dit import TextKV
from longlive_jax.model.kv_cache import FP8, Cache
from longlive_jax.model.module import Network
from longlive_jax.model.ops import REFERENCE, Ops
from longlive_jax.model.rope import Rope, expand, spatial_table
from longlive_jax.sample.schedule import Tables
from longlive_jax.types import Array, PyTree

# one entry a guidance branch: (prompt,) or (prompt, negative prompt)
Texts = tuple[TextKV, ...]
# one entry a guidance branch: a cache, or of an unrolled network one a layer
Caches = tuple[Cache | tuple[Cache, ...], ...]


def stored_in(experiment: Experiment) -> tuple[str, str]:
  """Dtype of a cache that is not in NVFP4, and that in which it is read, "" if it is the same."""
  model = experiment.model
  if experiment.quant.cache == "none":
    return model.dtype, ""
  as_it_is = model.attention == "fp8" and not experiment.sample.relative_rope
  return FP8, "" if as_it_is else model.dtype


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A network with its solver: what a block pass needs besides arrays.

  Attributes:
    network: declared DiT.
    cfg: its configuration.
    solver: coefficient tables of all steps.
    guidance: weight g of `v_neg + g (v - v_neg)`; used with two branches.
    ops: matmul, attend, norm.
  """

  network: Network
  cfg: Model
  solver: solvers.SolverPlan
  guidance: float = 1.0
  ops: Ops = REFERENCE

  def ropes(self, tables: Tables, latents: Array) -> tuple[Rope, Rope | None]:
    """Rotations of a block's own tokens and, with relative positions, of all slots."""
    cfg = self.cfg
    height, width = latents.shape[2:4]
    space = spatial_table(height // cfg.patch, width // cfg.patch, cfg.head_dim, cfg.rope_theta)
    window = None
    if tables.window_cos is not None and tables.window_sin is not None:
      window = expand((tables.window_cos, tables.window_sin), space)
    return expand((tables.cos, tables.sin), space), window

  def plan(self, tables: Tables, latents: Array, keep: bool = True) -> Cached:
    """The attention plan of a pass over latents of this size; `keep` as in `Cached`."""
    rope, window = self.ropes(tables, latents)
    lengths = None if tables.lengths is None else jnp.asarray(tables.lengths)
    return Cached(tables.level, rope, jnp.asarray(tables.slot), lengths, window, keep)

  def denoise(
    self,
    params: PyTree,
    noise: Array,
    texts: Texts,
    caches: Caches,
    tables: Tables,
    known: Array,
    known_mask: Array,
  ) -> tuple[Array, Caches]:
    """Samples one block.

    Args:
      params: of the network.
      noise: `[B, F, H, W, C]` float32.
      texts: text keys and values, one a branch.
      caches: one a branch; own slot is rewritten by every step.
      tables: from `Schedule.enter`.
      known: latents that are given, same shape as noise; only rows of the mask count.
      known_mask: bool `[B, F]`: given latents are kept and labelled timestep 0.

    Returns:
      (latents `[B, F, H, W, C]` float32, caches).
    """
    plan = self.plan(tables, noise, keep=False)
    model = self.network.bind(params)
    keep = known_mask[:, :, None, None, None]

    def body(carry: tuple[Any, Caches], inputs: Any) -> tuple[tuple[Any, Caches], None]:
      state, caches = carry
      timestep, row = inputs
      timesteps = jnp.where(known_mask, 0.0, timestep)
      velocities, updated = [], []
      for text, cache in zip(texts, caches, strict=True):
        v, cache = model(state.x, timesteps, text, plan, cache=cache, ops=self.ops)
        velocities.append(v)
        updated.append(cache)
      velocity = velocities[0]
      if len(velocities) > 1:
        velocity = velocities[1] + self.guidance * (velocity - velocities[1])
      state = solvers.step(row, state, velocity)
      state = dataclasses.replace(state, x=jnp.where(keep, known, state.x))
      return (state, tuple(updated)), None

    state = solvers.init(jnp.where(keep, known, noise))
    steps = (jnp.asarray(self.solver.timesteps), self.solver.coefficients)
    (state, caches), _ = jax.lax.scan(body, (state, caches), steps)
    return state.x, caches

  def commit(
    self, params: PyTree, latents: Array, texts: Texts, caches: Caches, tables: Tables
  ) -> Caches:
    """Writes the clean keys and values of finished latents `[B, F, H, W, C]` into the caches."""
    plan = self.plan(tables, latents)
    model = self.network.bind(params)
    timesteps = jnp.zeros(latents.shape[:2], jnp.float32)
    updated = []
    for text, cache in zip(texts, caches, strict=True):
      _, cache = model(latents, timesteps, text, plan, cache=cache, head=False, ops=self.ops)
      updated.append(cache)
    return tuple(updated)
