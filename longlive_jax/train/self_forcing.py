"""The rollout of distillation: the student makes a clip as in sampling; its last pass is trained.

Each block starts from noise and takes the solver's steps without gradient, up to an exit step drawn
for the rollout. There the network's clean estimate is the block, with gradient. One more pass at
timestep 0, without gradient, makes the keys and values that later blocks see. Slots, pins, shot
offsets and rotations are the sampler's own (`sample.schedule`), and with an exit at the last step
the clip is the one that sampling makes.

What a block keeps for the backward pass is its own keys and values, see `model.grown`. Before the
blocks that are trained, a rollout longer than the window keeps its slots alone, as the sampler
does.

Two ways of the original are options. `attached`: a later block's gradient reaches the keys of
earlier last passes, although their values are those of the clean pass. `original`: the clean pass
sees a little noise, for the table of levels ends above 0, and the estimate of the last pass takes
its level from that table.

Source: spec/training.md section 9.3.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longlive_jax.model import flow, solvers
from longlive_jax.model.dit import TextKV
from longlive_jax.model.grown import BlockKV, Grown
from longlive_jax.sample.block import Denoiser
from longlive_jax.train.passes import Pass
from longlive_jax.types import Array, ArrayLike, PyTree


@dataclasses.dataclass(frozen=True)
class SelfForcing:
  """A student that makes clips.

  Attributes:
    denoiser: network, solver, ops; its guidance is not used.
    remat: what the backward pass of a layer computes again, see the network.
    attached: the gradient of a later block reaches the keys and values of earlier last passes.
    original: levels of the original: estimates by its table, clean passes with a little noise.
  """

  denoiser: Denoiser
  remat: str = "none"
  attached: bool = False
  original: bool = False

  def rollout(
    self,
    params: PyTree,
    noise: Array,
    texts: Sequence[TextKV],
    passes: Sequence[tuple[Pass, Pass]],
    exits: Array,
    *,
    trained: int,
    first: Array | None = None,
    given: Array | None = None,
    context_noise: Array | None = None,
  ) -> Array:
    """Makes a clip.

    Args:
      params: of the network, differentiated in the last pass of the last blocks.
      noise: `[B, F, H, W, C]` float32, whole blocks.
      texts: keys and values of the prompts of each block.
      passes: from `passes.plan_passes` for as many trained blocks.
      exits: int32 `[blocks]`, the step at which each block ends, from 0.
      trained: blocks at the end that carry a gradient.
      first: image-to-video: the given first latent `[B, 1, H, W, C]`.
      given: bool `[B]`, the samples that `first` is given to; None = all.
      context_noise: like `noise`, of the clean passes; for `original`.

    Returns:
      Latents `[B, F, H, W, C]` float32.
    """
    blocks = len(passes)
    made, kept, left = [], (), ()
    starts = jnp.split(noise, blocks, 1)
    fresh = [None] * blocks if context_noise is None else jnp.split(context_noise, blocks, 1)
    for number, (entering, settling) in enumerate(passes):
      block_params, text = params, texts[number]
      if number < blocks - trained:
        block_params, text, starts[number] = stopped((params, text, starts[number]))
      block = Block(starts[number], text, exits[number], fresh[number])
      if number == 0:
        block = block._replace(first=first, given=given)
      seen, here = self.history(number, kept, left), self._of_block(number)
      clean, keys = here._denoise(block_params, block, entering, seen)
      made.append(clean)
      kept = *kept, stopped(here._commit(params, block, clean, settling, stopped(seen)))
      left = *left, keys
      if settling.keeps_slots:
        kept = left = picked(kept, settling.order)
    return jnp.concatenate(made, 1)

  def history(
    self, number: int, kept: Sequence[BlockKV], left: Sequence[BlockKV]
  ) -> tuple[BlockKV, ...]:
    """What block `number` sees of earlier ones.

    Args:
      number: of the block.
      kept: of each earlier block, keys and values of its clean pass, without gradient.
      left: those of its last denoising pass, with the gradient that it has.
    """
    del number
    if not self.attached:
      return tuple(kept)
    return tuple(with_gradient(k, e) for k, e in zip(kept, left, strict=True))

  def _of_block(self, number: int) -> "SelfForcing":
    """The same with the random numbers of one block."""
    ops = self.denoiser.ops.in_layer(number)
    return dataclasses.replace(self, denoiser=dataclasses.replace(self.denoiser, ops=ops))

  def _denoise(
    self, params: PyTree, block: "Block", there: Pass, seen: tuple[BlockKV, ...]
  ) -> tuple[Array, BlockKV]:
    """The block `[B, F_b, H, W, C]` with its gradient, and its keys and values in the last pass."""
    solver, given = self.denoiser.solver, block.given_mask
    plan = self._plan(there, block.noise)

    def velocity(params: PyTree, x: Array, step: Array, text: TextKV, seen: Any) -> Any:
      times = jnp.where(given, 0.0, jnp.asarray(solver.timesteps)[step])
      model, ops = self.denoiser.network.bind(params), self.denoiser.ops
      return model(x, times, text, plan, cache=seen, remat=self.remat, ops=ops)

    def explore(step: Array, state: solvers.SolverState) -> solvers.SolverState:
      v, _ = velocity(*stopped((params, state.x)), step, *stopped((block.text, seen)))
      row = jax.tree.map(lambda column: jnp.asarray(column)[step], solver.coefficients)
      state = solvers.step(row, state, v)
      return dataclasses.replace(state, x=block.clamp(state.x))

    start = solvers.init(block.clamp(block.noise))
    x = stopped(jax.lax.fori_loop(0, block.exit, explore, stopped(start)).x)
    x = jnp.where(block.exit == 0, start.x, x)
    v, left = velocity(params, x, block.exit, block.text, seen)
    sigma = jnp.asarray(solver.coefficients.sigma)[block.exit]
    if self.original:
      table = flow.training_table(self.denoiser.cfg.shift)
      sigma = flow.sigma_at(table, jnp.asarray(solver.timesteps)[block.exit])
    return block.clamp(x - sigma * v.astype(jnp.float32)), left

  def _commit(
    self, params: PyTree, block: "Block", clean: Array, there: Pass, seen: tuple[BlockKV, ...]
  ) -> BlockKV:
    """Keys and values of the finished block, at timestep 0."""
    params, text, x = stopped((params, block.text, clean))
    if self.original and block.fresh is not None:
      sigma = flow.sigma_at(flow.training_table(self.denoiser.cfg.shift), 0.0)
      x = block.clamp(flow.add_noise(x, block.fresh, sigma))
    model, ops = self.denoiser.network.bind(params), self.denoiser.ops
    times = jnp.zeros(x.shape[:2], jnp.float32)
    return model(x, times, text, self._plan(there, x), cache=seen, head=False, ops=ops)[1]

  def _plan(self, there: Pass, latents: Array) -> Grown:
    """The attention plan of a pass over latents of this size."""
    rope, window = self.denoiser.ropes(there.tables, latents)
    lengths = there.tables.lengths
    lengths, order = (None if a is None else jnp.asarray(a) for a in (lengths, there.order))
    return Grown(rope, order, lengths, window)


class Block(NamedTuple):
  """One block of a rollout: its noise, prompts, exit step, context noise, given first latent."""

  noise: Array
  text: TextKV
  exit: Array
  fresh: Array | None = None
  first: Array | None = None
  given: Array | None = None

  @property
  def given_mask(self) -> Array:
    """bool `[B, F_b]`: latents that are given."""
    batch, latents = self.noise.shape[:2]
    rows = (jnp.arange(latents) == 0) & (self.first is not None)
    whole = jnp.broadcast_to(rows, (batch, latents))
    return whole if self.given is None else whole & self.given[:, None]

  def clamp(self, x: Array) -> Array:
    """x with the given latent in its place."""
    if self.first is None:
      return x
    return jnp.where(self.given_mask[..., None, None, None], self.first, x)


def picked(kept: Sequence[BlockKV], order: ArrayLike | None) -> tuple[BlockKV, ...]:
  """For each slot the keys and values `[layers, B, S_b, N, D]` in the places `order [B, level]`."""
  if order is None:
    return tuple(kept)
  chosen = jnp.asarray(order)[None, :, :, None, None, None]

  def pick(*blocks: Array) -> list[Array]:
    found = jnp.take_along_axis(jnp.stack(blocks, 2), chosen, 2)
    return [found[:, :, slot] for slot in range(found.shape[2])]

  keys, values = (pick(*blocks) for blocks in zip(*kept, strict=True))
  return tuple(map(BlockKV, keys, values))


def with_gradient(values: BlockKV, source: BlockKV) -> BlockKV:
  """The values, with the gradient of a source."""
  return jax.tree.map(lambda k, e: k + (e - stopped(e)), values, source)


def stopped[T](tree: T) -> T:
  """The tree without a gradient."""
  return jax.tree.map(jax.lax.stop_gradient, tree)
