"""A moment of one video: all that its next block depends on, on the devices or on the host.

A moment on the host is a parked or a saved session, or a point to go back to. Almost all of a
cache outlives a block, which overwrites one slot; so a point to go back to holds no more than what
the blocks since then overwrote or forgot. Numbers are moved, never computed again: what comes back
is what was there, to the bit.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.data.prompts import BlockPrompt, Shot, first_block
from longlive_jax.sample.aside import bytes_of, to_host
from longlive_jax.sample.block import Caches
from longlive_jax.sample.decoder import Decoder
from longlive_jax.sample.rollout import Engine, RolloutState
from longlive_jax.sample.schedule import Schedule
from longlive_jax.types import PyTree

SLOTS = 2  # axis of every array of a cache


@dataclasses.dataclass(frozen=True)
class Account:
  """What was said to a session.

  Attributes:
    made: what each block was told.
    prompt: in force, without the prefix of a cut; "" = none yet.
    pending: takes effect at the next block.
  """

  made: tuple[BlockPrompt, ...] = ()
  prompt: str = ""
  pending: Shot | None = None

  def enter(self, cut_prefix: str) -> tuple[BlockPrompt, "Account"]:
    """What the next block is told, as in a script, and the account after it.

    Raises:
      ValueError: nothing was said yet.
    """
    before = self.made[-1] if self.made else None
    if self.pending is not None:
      entry = first_block(self.pending, before, cut_prefix)
      return entry, Account((*self.made, entry), self.pending.prompt)
    if before is None:
      raise ValueError("the session has no prompt yet: push one before the first block")
    entry = BlockPrompt(self.prompt, before.shot)
    return entry, Account((*self.made, entry), self.prompt)


@dataclasses.dataclass(frozen=True)
class Moment:
  """One video between two blocks.

  Attributes:
    rollout: its history is on the host; on the host as a whole it has no caches.
    decoder: carried state of the decoder; None before the first block.
    account: what was said.
    slots: None on the devices; on the host slot -> contents, a cache of one slot.
  """

  rollout: RolloutState
  decoder: PyTree
  account: Account
  slots: Mapping[int, Caches] | None = None

  def with_host_history(self) -> "Moment":
    """The moment with the latents of its cached blocks in host memory."""
    history = tuple((block, np.asarray(latents)) for block, latents in self.rollout.history)
    return dataclasses.replace(self, rollout=dataclasses.replace(self.rollout, history=history))

  def delete(self) -> None:
    """Frees what it has on the devices."""
    if self.slots is None:
      for array in jax.tree.leaves((self.rollout.caches, self.decoder)):
        array.delete()


@dataclasses.dataclass(frozen=True)
class Status:
  """Where a session stands.

  Attributes:
    block: index of the next block.
    frames, seconds: made so far.
    prompts: what each block was told, the prefix of a cut included.
    prompt: in force, without it; "" = none yet.
    pending: (prompt, transition) of the next block if something was pushed for it.
    oldest_block: that `rewind` can go back to.
    cache_bytes: of the cache, on all devices together (in host memory while parked).
    restore_bytes: of host memory for restore points; forks share them.
    parked: whether it is in host memory.
  """

  block: int
  frames: int
  seconds: float
  prompts: tuple[BlockPrompt, ...]
  prompt: str
  pending: tuple[str, str] | None
  oldest_block: int
  cache_bytes: int
  restore_bytes: int
  parked: bool


def status(
  moment: Moment, points: Sequence[Moment], caches: Caches, experiment: Experiment
) -> Status:
  """Says where a session stands, from its moment, its restore points and the shapes of a cache."""
  block, account = moment.rollout.block, moment.account
  frames = max(block * experiment.block_frames - 3, 0)
  pending = account.pending
  return Status(
    block=block,
    frames=frames,
    seconds=frames / experiment.video.fps,
    prompts=account.made,
    prompt=account.prompt,
    pending=None if pending is None else (pending.prompt, pending.transition),
    oldest_block=points[0].rollout.block if points else block,
    cache_bytes=bytes_of(caches if moment.slots is None else moment.slots),
    restore_bytes=sum(bytes_of((point.slots, point.decoder)) for point in points),
    parked=moment.slots is not None,
  )


def on_host(moment: Moment, decoder: PyTree, slots: Mapping[int, Caches]) -> Moment:
  """The moment on the host, with a decoder's state and contents of slots that are there."""
  rollout = dataclasses.replace(moment.rollout, caches=())
  return Moment(rollout, decoder, moment.account, slots)


def overwritten(schedule: Schedule, state: RolloutState, entry: BlockPrompt) -> list[int]:
  """Filled slots that the next block of one video overwrites or forgets.

  Args:
    schedule: policy.
    state: before the block, of a batch of one.
    entry: what the block is told.
  """
  blocks = state.states[0].slots.blocks
  if entry.transition == "recache":
    return [slot for slot, block in enumerate(blocks) if block >= schedule.window.sink]
  cut = [entry.transition == "cut"]
  states, _ = schedule.enter(state.states, state.block, cut)
  states, _ = schedule.settle(states, state.block, cut)
  after = states[0].slots.blocks
  return [slot for slot, block in enumerate(blocks) if after[slot : slot + 1] != (block,)]


class Keeper:
  """Executables that move the state of one video; all are compiled at once.

  Args:
    engine: of a batch of one.
    decoder: likewise.

  Attributes:
    part: shapes and placement of a cache of one slot.
  """

  def __init__(self, engine: Engine, decoder: Decoder):
    self._engine, self._decoder = engine, decoder
    caches, slot = engine.caches, jax.ShapeDtypeStruct((), jnp.int32)

    def take(caches: Caches, slot: Any) -> Caches:
      return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1, SLOTS), caches)

    def put(caches: Caches, slot: Any, part: Caches) -> Caches:
      return jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, slot, SLOTS), caches, part
      )

    def copy(state: PyTree) -> PyTree:
      return jax.tree.map(jnp.copy, state)

    places, rows = (jax.tree.map(lambda a: a.sharding, t) for t in (caches, decoder.state))
    self.part = jax.tree.map(
      lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
      jax.eval_shape(take, caches, slot),
      places,
    )
    jit = jax.jit(put, donate_argnums=0, out_shardings=places)
    self._put = jit.lower(caches, slot, self.part).compile()
    self._take = jax.jit(take, out_shardings=places).lower(caches, slot).compile()
    self._copy = jax.jit(copy, out_shardings=rows).lower(decoder.state).compile()

  def take(self, moment: Moment, slots: Iterable[int]) -> dict[int, Caches]:
    """Copies of the contents of slots, on the devices, or shared on the host."""
    if moment.slots is not None:
      return {slot: moment.slots[slot] for slot in slots}
    return {slot: self._take(moment.rollout.caches, np.int32(slot)) for slot in slots}

  def all_on_host(self, moment: Moment) -> Moment:
    """The moment on the host, with all filled slots, one after the other."""
    if moment.slots is not None:
      return moment
    filled = range(moment.rollout.states[0].slots.level)
    slots = {slot: to_host(self.take(moment, [slot])[slot]) for slot in filled}
    return on_host(moment, to_host(moment.decoder), slots)

  def on_devices(self, moment: Moment, caches: Caches | None = None) -> Moment:
    """A moment of the host, put on the devices.

    Args:
      moment: of the host.
      caches: whose other slots are kept; donated. None = the moment has all its slots.
    """
    caches = self._engine.empty() if caches is None else caches
    places = jax.tree.map(lambda a: a.sharding, self.part)
    for slot, part in (moment.slots or {}).items():
      caches = self._put(caches, np.int32(slot), jax.device_put(part, places))
    rollout = dataclasses.replace(moment.rollout, caches=caches)
    return Moment(rollout, self._place(moment.decoder), moment.account)

  def _place(self, state: PyTree) -> PyTree:
    if state is None:
      return None
    places = jax.tree.map(lambda a: a.sharding, self._decoder.state)
    return jax.device_put(state, places, may_alias=False)

  def copied(self, moment: Moment) -> Moment:
    """A moment that shares nothing which a block overwrites."""
    if moment.slots is not None:
      return moment
    rollout = dataclasses.replace(moment.rollout, caches=self._engine.copy(moment.rollout.caches))
    decoder = None if moment.decoder is None else self._copy(moment.decoder)
    return Moment(rollout, decoder, moment.account)
