"""What each pass of a training rollout sees, worked out on the host by the sampler's schedule.

The sampler keeps slots; a rollout that is differentiated keeps blocks, one by one. So each pass
has, beside the sampler's tables, the place of each slot's block among the blocks that are kept.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jax.tree_util import register_dataclass

from longlive_jax.sample.schedule import SampleState, Schedule, States, Tables
from longlive_jax.types import ArrayLike


@functools.partial(register_dataclass, data_fields=["tables", "order"], meta_fields=["keeps_slots"])
@dataclasses.dataclass(frozen=True)
class Pass:
  """What a pass over a block sees.

  Attributes:
    tables: the sampler's.
    order: int32 `[B, level]`, for each slot a place among what is kept of earlier blocks, this one
      at the end; None = all in order of time, which needs no gather.
    keeps_slots: of a clean pass: from then on the slots are kept, in their order, and no other
      block.
  """

  tables: Tables
  order: ArrayLike | None = None
  keeps_slots: bool = False


def plan_passes(
  schedule: Schedule, cuts: Sequence[Sequence[bool]], trained: int | None = None
) -> list[tuple[Pass, Pass]]:
  """The denoising passes and the clean pass of each block.

  Args:
    schedule: the sampler's policy.
    cuts: of each block, whether it begins a new shot, one a sample.
    trained: blocks at the end that carry a gradient; None = all.
  """
  states: States = (SampleState(),) * len(cuts[0])
  untrained = 0 if trained is None else len(cuts) - trained
  places: list[dict[int, int]] = [{} for _ in states]  # of each sample: block -> where it is kept
  kept, passes = 0, []
  for block, cut in enumerate(cuts):
    places = [{**known, block: kept} for known in places]
    states, tables = schedule.enter(states, block, cut)
    first = Pass(tables, _order(schedule, states, tables.level, places, block))
    states, tables = schedule.settle(states, block, cut)
    keeps_slots = schedule.window.slots <= block < untrained
    order = _order(schedule, states, tables.level, places, block)
    passes.append((first, Pass(tables, order, keeps_slots)))
    kept += 1
    if keeps_slots:
      kept = tables.level
      places = [{b: place for place, b in enumerate(state.slots.blocks)} for state in states]
  return passes


def _order(
  schedule: Schedule, states: States, level: int, places: list[dict[int, int]], block: int
) -> np.ndarray | None:
  if block < schedule.window.slots and not schedule.recache_cuts:
    return None  # the slots are filled one after the other
  order = np.zeros((len(states), level), np.int32)
  for row, (state, known) in enumerate(zip(states, places, strict=True)):
    order[row, : state.slots.level] = [known[b] for b in state.slots.blocks]
  return order


def last_seen(schedule: Schedule, cuts: Sequence[Sequence[bool]]) -> np.ndarray | None:
  """The blocks that the window shows at the end of a rollout, in order of time.

  Returns:
    int32 `[B, slots]`; None if the rollout is not longer than the window. Where a cut has emptied
    slots, the newest blocks besides.
  """
  slots, blocks = schedule.window.slots, len(cuts)
  if blocks <= slots:
    return None
  states: States = (SampleState(),) * len(cuts[0])
  for block, cut in enumerate(cuts):
    states, _ = schedule.enter(states, block, cut)
    states, _ = schedule.settle(states, block, cut)
  rows = []
  for state in states:
    seen = set(state.slots.blocks)
    others = (b for b in reversed(range(blocks)) if b not in seen)
    rows.append(sorted(seen | {next(others) for _ in range(slots - len(seen))}))
  return np.asarray(rows, np.int32)
