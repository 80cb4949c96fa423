"""What happens to each block, decided on the host: slots, positions, pins, cuts.

The device code never branches on the story of a video: it is handed a slot to write, a level to
read, and rotary tables. Everything here is a pure function of small frozen values, one
`SampleState` a sample, so that samples of a batch may be cut at different blocks and a state can
be kept, forked or saved.

Source: spec/inference.md sections 1.5 to 1.7, 2.4 and 2.5.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jax.tree_util import register_dataclass

from longlive_jax.config import Experiment
from longlive_jax.model.kv_cache import SlotState, Window, admit, keep_sink, pin_block
from longlive_jax.model.rope import temporal_table
from longlive_jax.types import ArrayLike


@dataclasses.dataclass(frozen=True)
class SampleState:
  """One sample's cached blocks and the number of cuts so far."""

  slots: SlotState = dataclasses.field(default_factory=SlotState)
  cuts: int = 0


States = tuple[SampleState, ...]


@functools.partial(
  register_dataclass,
  data_fields=["cos", "sin", "slot", "lengths", "window_cos", "window_sin"],
  meta_fields=["level"],
)
@dataclasses.dataclass(frozen=True)
class Tables:
  """What a pass over one block needs to know about the cache.

  Attributes:
    level: slots to read.
    cos, sin: `[B, F, P_t]` temporal rotation of the block (relative positions: of its queries).
    slot: `[B]` int32.
    lengths: `[B]` int32 filled tokens; None for a batch of one.
    window_cos, window_sin: `[B, level * F, P_t]` with relative positions, else None.
  """

  level: int
  cos: ArrayLike
  sin: ArrayLike
  slot: ArrayLike
  lengths: ArrayLike | None = None
  window_cos: ArrayLike | None = None
  window_sin: ArrayLike | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The constants of the policy, from an experiment."""

  window: Window
  block_latents: int
  latent_tokens: int
  head_dim: int
  theta: float
  offset: float
  t_scale: float
  relative: bool
  pin: bool
  recache_cuts: bool

  @classmethod
  def of(cls, experiment: Experiment) -> "Schedule":
    """Reads the policy from a checked experiment."""
    model, sample = experiment.model, experiment.sample
    return cls(
      window=Window(
        sample.window_latents // model.block_latents, sample.sink_latents // model.block_latents
      ),
      block_latents=model.block_latents,
      latent_tokens=experiment.latent_tokens,
      head_dim=model.head_dim,
      theta=model.rope_theta,
      offset=sample.shot_offset_latents,
      t_scale=sample.t_scale,
      relative=sample.relative_rope,
      pin=sample.pin_shots,
      recache_cuts=sample.recache_cuts,
    )

  def enter(self, states: States, block: int, cut: Sequence[bool]) -> tuple[States, Tables]:
    """Gives block number `block` a slot in every sample.

    Args:
      states: one a sample, before the block.
      block: its index in the video.
      cut: per sample, whether the block begins a new shot.

    Returns:
      (states with the block in a slot, tables of its denoising passes).
    """
    entered, slots = [], []
    for state, is_cut in zip(states, cut, strict=True):
      cuts = state.cuts + int(is_cut)
      position = block * self.block_latents + cuts * self.offset
      slot_state, slot = admit(state.slots, block, position, self.window)
      entered.append(SampleState(slot_state, cuts))
      slots.append(slot)
    return tuple(entered), self.tables(tuple(entered), slots)

  def settle(self, states: States, block: int, cut: Sequence[bool]) -> tuple[States, Tables]:
    """Prepares the clean pass of a block that `enter` let in.

    After a cut `recache_cuts` forgets all but the sink before the pass, and `pin` keeps the block
    until the next cut. A cut inside the sink forgets nothing.

    Returns:
      (states after the block, tables of the pass).
    """
    settled, slots = [], []
    for state, is_cut in zip(states, cut, strict=True):
      slot_state, slot = state.slots, state.slots.blocks.index(block)
      if is_cut and self.recache_cuts and block >= self.window.sink:
        position = slot_state.positions[slot]
        slot_state, slot = admit(keep_sink(slot_state, self.window), block, position, self.window)
      if is_cut and self.pin:
        slot_state = pin_block(slot_state, block)
      settled.append(SampleState(slot_state, state.cuts))
      slots.append(slot)
    return tuple(settled), self.tables(tuple(settled), slots)

  def tables(self, states: States, slots: Sequence[int]) -> Tables:
    """Tables of a pass whose block is in slot `slots[b]` of sample b."""
    level = max(state.slots.level for state in states)
    steps = np.arange(self.block_latents)
    block_tokens = self.block_latents * self.latent_tokens
    lengths = np.asarray([s.slots.level * block_tokens for s in states], np.int32)
    window_cos = window_sin = None
    if self.relative:
      ranks = np.zeros((len(states), level))
      for row, state in enumerate(states):
        ranks[row, : state.slots.level] = state.slots.order()
      first = ranks * self.block_latents
      whole = (first[..., None] + steps).reshape(len(states), -1) * self.t_scale
      window_cos, window_sin = temporal_table(whole, self.head_dim, self.theta)
      own = first[np.arange(len(states)), list(slots)]
    else:
      own = np.asarray([s.slots.positions[i] for s, i in zip(states, slots, strict=True)])
    positions = (own[:, None] + steps) * self.t_scale
    cos, sin = temporal_table(positions, self.head_dim, self.theta)
    return Tables(
      level=level,
      cos=cos,
      sin=sin,
      slot=np.asarray(slots, np.int32),
      lengths=lengths if len(states) > 1 else None,
      window_cos=window_cos,
      window_sin=window_sin,
    )
