"""The autoregressive rollout: block after block against the cache.

A `RolloutState` is a value: the cached keys and values, the host's account of the slots, and the
latents of the blocks that are still cached. `Engine` holds the executables, one `denoise` and one
`commit` a fill level, compiled before the first block: after that a longer video, another prompt
or a cut compiles nothing. The caches of a state are donated to the next call: a state is used
once.

Source: spec/inference.md section 1; re-caching as in design of the first LongLive.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from longlive_jax.config import Experiment
from longlive_jax.kernels.matmul_choice import use_kernels
from longlive_jax.model.dit import TextKV, is_unrolled
from longlive_jax.model.kv_cache import Cache, SlotState, admit, empty_cache, keep_sink
from longlive_jax.parallel.rules import at, home_of
from longlive_jax.parallel.share import LATENTS, island, place_caches
from longlive_jax.quant.kv import empty_quantised_cache
from longlive_jax.sample.block import Caches, Denoiser, Texts, stored_in
from longlive_jax.sample.latents import block_shape
from longlive_jax.sample.schedule import SampleState, Schedule, States
from longlive_jax.sample.together import Lowered, compile_all
from longlive_jax.types import SEQ, Array, ArrayLike, PyTree


@dataclasses.dataclass(frozen=True)
class RolloutState:
  """A video in the making.

  Attributes:
    block: index of the next block.
    states: host account, one a sample.
    caches: one a guidance branch.
    history: (block, latents `[B, F, H, W, C]`) of every block that some sample still caches.
  """

  block: int
  states: States
  caches: Caches
  history: tuple[tuple[int, ArrayLike], ...] = ()


def _shapes(tree: PyTree) -> PyTree:
  """The tree with arrays replaced by their shapes and dtypes, and by where they are placed."""

  def shape(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None))

  return jax.tree.map(shape, tree)


class Engine:
  """Executables for one batch size.

  Args:
    denoiser: network, solver, guidance, ops.
    experiment: checked experiment; gives all sizes and the policy.
    params: parameters or their shapes; everything runs where they are placed.
    batch: B.

  Sharding: latents and text are whole on all devices. If those of `denoiser.ops.mesh` share each
    block, heads of the caches are split over its axis "seq", else caches are whole too.

  Attributes:
    latents: shape and placement of the blocks that come out.
    caches: shapes and placement of the caches.
  """

  def __init__(self, denoiser: Denoiser, experiment: Experiment, params: PyTree, batch: int):
    self.denoiser, self.experiment, self.batch = denoiser, experiment, batch
    self.schedule = Schedule.of(experiment)
    self.branches = 2 if denoiser.guidance != 1.0 else 1
    self.block_shape = block_shape(experiment, batch)
    self._compile(_shapes(params))

  def _compile(self, params: PyTree) -> None:
    home, mesh, specs = home_of(params), self.denoiser.ops.mesh, P()
    caches = at(home, jax.eval_shape(self._empty))
    if mesh is not None:
      caches, specs = place_caches(caches, mesh)
    places = jax.tree.map(lambda a: a.sharding, caches)
    latents = jax.ShapeDtypeStruct(self.block_shape, jnp.float32, sharding=home)
    mask = jax.ShapeDtypeStruct(self.block_shape[:2], jnp.bool_, sharding=home)
    text = self.experiment.model.text
    prompts = jax.ShapeDtypeStruct(
      (self.batch, text.length, text.width), jnp.float32, sharding=home
    )

    def text_kv(params: PyTree, prompts: Array) -> TextKV:
      return self.denoiser.network.bind(params).text_kv(prompts, self.denoiser.ops)

    text_kv = island(text_kv, mesh, (P(), P()), P())
    lowered: dict[Any, Lowered] = {
      "text_kv": jax.jit(text_kv, out_shardings=home).lower(params, prompts)
    }
    texts = (at(home, jax.eval_shape(text_kv, params, prompts)),) * self.branches
    ins = (P(), LATENTS, P(), specs, P(), LATENTS, LATENTS)
    denoise = island(self.denoiser.denoise, mesh, ins, (LATENTS, specs))
    denoise = jax.jit(denoise, donate_argnums=3, out_shardings=(home, places))
    jit = functools.partial(jax.jit, out_shardings=places)  # what returns caches
    commit = jit(island(self.denoiser.commit, mesh, ins[:5], specs), donate_argnums=3)
    levels = range(1, self.schedule.window.slots + 1)
    for level in levels:
      filled = SlotState(tuple(range(level)), (0.0,) * level)
      tables = self.schedule.tables((SampleState(filled),) * self.batch, [0] * self.batch)
      shapes = at(home, tables)
      args = (params, latents, texts, caches, shapes, latents, mask)
      lowered["denoise", level] = denoise.lower(*args)
      lowered["commit", level] = commit.lower(params, latents, texts, caches, shapes)
    self.latents, self.caches = latents, caches
    rows = jax.ShapeDtypeStruct((self.batch,), jnp.bool_, sharding=home)
    lowered |= {
      "empty": jit(self._empty).lower(),
      "copy": jit(functools.partial(jax.tree.map, jnp.copy)).lower(caches),
      "select": jit(_select, donate_argnums=1).lower(rows, caches, caches),
    }
    made = compile_all(lowered, first=("commit", 1))
    self.text_kv, self.empty = made["text_kv"], made["empty"]
    self.copy, self.select = made["copy"], made["select"]
    self.denoise, self.commit = (
      {level: made[kind, level] for level in levels} for kind in ("denoise", "commit")
    )

  def _empty(self) -> Caches:
    model = self.experiment.model
    if is_unrolled(self.denoiser.network):
      return tuple(
        tuple(self._empty_cache(1) for _ in range(model.layers)) for _ in range(self.branches)
      )
    return tuple(self._empty_cache(model.layers) for _ in range(self.branches))

  def _empty_cache(self, layers: int) -> Cache:
    model, quant = self.experiment.model, self.experiment.quant
    tokens = model.block_latents * self.experiment.latent_tokens
    slots = self.schedule.window.slots
    shape = (layers, self.batch, slots, tokens, model.heads, model.head_dim)
    if quant.cache != "nvfp4":
      return empty_cache(*shape, *stored_in(self.experiment))
    axis = SEQ if self.denoiser.ops.mesh else ""
    kernels = use_kernels(quant.kernels, local=bool(axis))
    return empty_quantised_cache(
      shape, model.dtype, quant.cache_rule, quant.cache_smoothing, kernels, axis
    )

  def start(self) -> RolloutState:
    """State before the first block."""
    return RolloutState(0, (SampleState(),) * self.batch, self.empty())

  def next_block(
    self,
    params: PyTree,
    state: RolloutState,
    noise: ArrayLike,
    texts: Texts,
    cut: Sequence[bool],
    known: ArrayLike,
    known_mask: ArrayLike,
  ) -> tuple[Array, RolloutState]:
    """Samples one block and leaves its clean keys and values in the cache.

    Args:
      params: of the network.
      state: before the block; its caches are donated.
      noise: `[B, F, H, W, C]` float32.
      texts: text keys and values of the block's prompts, one a branch.
      cut: per sample, whether the block begins a new shot.
      known, known_mask: given latents, see `Denoiser.denoise`.

    Returns:
      (latents `[B, F, H, W, C]` float32, next state).
    """
    states, tables = self.schedule.enter(state.states, state.block, cut)
    latents, caches = self.denoise[tables.level](
      params, noise, texts, state.caches, tables, known, known_mask
    )
    state = dataclasses.replace(state, states=states, caches=caches)
    return latents, self._settle(params, state, latents, texts, cut)

  def absorb(
    self, params: PyTree, state: RolloutState, latents: ArrayLike, texts: Texts, cut: Sequence[bool]
  ) -> RolloutState:
    """Takes a given block into the cache, as if it had been sampled."""
    states, _ = self.schedule.enter(state.states, state.block, cut)
    state = dataclasses.replace(state, states=states)
    return self._settle(params, state, latents, texts, cut)

  def _settle(
    self, params: PyTree, state: RolloutState, latents: ArrayLike, texts: Texts, cut: Sequence[bool]
  ) -> RolloutState:
    after, tables = self.schedule.settle(state.states, state.block, cut)
    caches = self.commit[tables.level](params, latents, texts, state.caches, tables)
    cached = {block for sample in after for block in sample.slots.blocks}
    history = (*state.history, (state.block, latents))
    history = tuple((block, value) for block, value in history if block in cached)
    return RolloutState(state.block + 1, after, caches, history)

  def recache(
    self, params: PyTree, state: RolloutState, texts: Texts, rows: Sequence[bool]
  ) -> RolloutState:
    """Runs the cached blocks again under new prompts, in the samples that `rows` names.

    The sink stays as it is; the other cached blocks are run in order, clean at timestep 0, each
    seeing the sink and the blocks already redone. Positions and pins stay.
    """
    window, history = self.schedule.window, dict(state.history)
    todo = [
      sorted(b for b in s.slots.blocks if b >= window.sink) if row else []
      for s, row in zip(state.states, rows, strict=True)
    ]
    before, caches = state.states, state.caches
    states = tuple(
      SampleState(keep_sink(s.slots, window), s.cuts) if row else s
      for s, row in zip(before, rows, strict=True)
    )
    for turn in range(max(map(len, todo))):
      active = np.asarray([turn < len(blocks) for blocks in todo])
      states, slots, clean = self._readmit(states, before, todo, turn, history)
      tables = self.schedule.tables(states, slots)
      old = self.copy(caches) if self.batch > 1 else caches
      new = self.commit[tables.level](params, clean, texts, old, tables)
      caches = self.select(active, new, caches) if self.batch > 1 else new
    states = tuple(
      dataclasses.replace(s, slots=dataclasses.replace(s.slots, pin=b.slots.pin))
      for s, b in zip(states, before, strict=True)
    )
    return dataclasses.replace(state, states=states, caches=caches)

  def _readmit(
    self,
    states: States,
    before: States,
    todo: list[list[int]],
    turn: int,
    history: dict[int, ArrayLike],
  ) -> tuple[States, list[int], np.ndarray]:
    """Gives the turn's block of each sample its new slot, and gathers the clean latents."""
    clean = np.zeros(self.block_shape, np.float32)
    slots, entered = [], []
    for row, (state, old, blocks) in enumerate(zip(states, before, todo, strict=True)):
      slot = 0
      if turn < len(blocks):
        block = blocks[turn]
        position = old.slots.positions[old.slots.blocks.index(block)]
        slot_state, slot = admit(state.slots, block, position, self.schedule.window)
        state = SampleState(slot_state, state.cuts)
        clean[row] = np.asarray(history[block])[row]
      entered.append(state)
      slots.append(slot)
    return tuple(entered), slots, clean


def _select(rows: Array, new: Caches, old: Caches) -> Caches:
  """Caches whose samples come from `new` where rows `[B]` is true, else from `old`."""

  def pick(a: Array, b: Array) -> Array:
    return jnp.where(rows.reshape(1, -1, *(1,) * (a.ndim - 2)), a, b)

  return jax.tree.map(pick, new, old)
