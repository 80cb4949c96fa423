"""Checkpoints of a training run: the whole state, to the bit, so that a run can go on.

Leaves are stored under their dotted names ("params.layers.ffn.up"), so any pytree will do and the
stored form does not depend on its classes. Random keys are stored as their data.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from longlive_jax.checks import suggest
from longlive_jax.io.atomic import check_kind, remove
from longlive_jax.io.leaves import flat, path_name
from longlive_jax.io.left_behind import ignore_never_awaited, watch_closed_loops
from longlive_jax.io.processes import is_first, of_all, wait_for_all
from longlive_jax.types import PyTree

BESIDE = "beside."  # before the names of arrays that are kept beside the state
UNREADABLE = (ValueError, OSError, KeyError)  # what Orbax raises for damaged files


class DamagedError(ValueError):
  """A checkpoint cannot be read."""


class TrainCheckpointer:
  """Saves every so many steps and restores the newest; writing goes on in the background.

  A checkpoint that cannot be read, because whoever wrote or copied it was cut short, is set aside
  under the name "STEP.unreadable". All processes of a run make one, and call the same methods in
  the same order; each saves and restores its part of the arrays.

  Args:
    folder: holds one folder a step; of a file system that all processes share.
    every: steps between checkpoints, `io.checkpoint_every_steps`.
    keep: newest checkpoints that are kept, `io.keep_checkpoints`.
    needs: names that the `extra` of each has; one without them counts as unreadable.

  Raises:
    NotADirectoryError: the folder is a file.
    ValueError: the processes see different checkpoints; or none of those there can be read, which
      then keep their names.
  """

  def __init__(self, folder: str | Path, every: int, keep: int, *, needs: Sequence[str] = ()):
    self.folder, self._needs = Path(folder).absolute(), needs
    self._arrays: dict[str, np.ndarray] | None = None  # of the newest, until asked for
    check_kind(self.folder, folder=True)
    self.folder.mkdir(parents=True, exist_ok=True)
    training = ocp.training
    self._checkpointer = training.Checkpointer(
      self.folder,
      save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(every),
      preservation_policy=training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )
    if is_first():
      self._set_unreadable_aside()
    wait_for_all("checkpoints")
    self._checkpointer.reload()
    steps = of_all(-1 if self.latest_step is None else self.latest_step)
    if len(set(steps)) > 1:
      raise ValueError(
        f"'{self.folder}' must be one folder that all processes share: the newest checkpoint that"
        f" each finds there is of step {', '.join(map(str, steps))} (-1: none)"
      )

  def _set_unreadable_aside(self) -> None:
    steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
    bad = [step for step in steps if not self._is_readable(step)]
    if bad and bad == steps:
      raise self._none_readable(steps)
    for step in bad:
      self._set_aside(step)

  def _set_aside(self, step: int) -> None:
    path = self.folder / str(step)
    aside = path.with_suffix(".unreadable")
    remove(aside)
    path.rename(aside)
    logging.warning("checkpoint '%s' cannot be read; it is now '%s'", path, aside.name)

  def _none_readable(self, steps: Sequence[int]) -> DamagedError:
    return DamagedError(
      f"no checkpoint in '{self.folder}' can be read ({', '.join(map(str, sorted(steps)))} are"
      " there): it is damaged; bring one back, or remove the folder to begin anew"
    )

  def _is_readable(self, step: int) -> bool:
    try:
      found = self._checkpointer.metadata(step)
    except UNREADABLE:
      return False
    extra = found.custom_metadata or {}
    return found.metadata is not None and all(name in extra for name in self._needs)

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def is_due(self, step: int) -> bool:
    """Whether `save` would save this step without being forced to."""
    return step != self.latest_step and self._checkpointer.should_save(step)

  def save(
    self,
    step: int,
    state: PyTree,
    extra: dict[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    *,
    force: bool = False,
  ) -> bool:
    """Saves the state if `step` is due or `force` is set.

    Args:
      step: updates done.
      state: any pytree of arrays and random keys; it may be donated as soon as this returns.
      extra: JSON kept beside it, such as the position in the data.
      arrays: kept beside it too, of the host, the same in every process and of any shape.
      force: save although the step is not due.

    Returns:
      Whether it is saved; a step that is saved already is not saved again.
    """
    if step == self.latest_step or not (force or self.is_due(step)):
      return False
    self._arrays = None
    leaves = {dotted(name): as_array(leaf) for name, leaf in flat(state).items()}
    leaves |= {BESIDE + dotted(name): array for name, array in (arrays or {}).items()}
    self._checkpointer.save_async(step, leaves, custom_metadata=extra, force=force)
    return True

  def restore_latest(self, template: PyTree) -> PyTree:
    """The newest state, bit for bit, or `template` itself if there is none.

    Newer ones whose arrays are damaged are set aside once an older one is read. Of several
    processes, which may not all see the damage, none does this: it is an error.

    Args:
      template: a state (or its shapes) whose structure, dtypes and shardings are wanted; it may
        be on another mesh than the one that saved.

    Raises:
      ValueError: the stored state has other leaves or shapes (names one), or all are damaged.
    """
    self.wait()
    steps = sorted((found.step for found in self._checkpointer.checkpoints), reverse=True)
    for number, step in enumerate(steps):
      try:
        state = self._restore(step, template)
      except DamagedError:
        if len(steps) == 1 or jax.process_count() > 1:
          raise
        continue
      for damaged in steps[:number]:
        self._set_aside(damaged)
      if number:
        self._checkpointer.reload()
        logging.warning("the run goes on from step %d", step)
      return state
    if steps:
      raise self._none_readable(steps)
    return template

  def _restore(self, step: int, template: PyTree) -> PyTree:
    """The state of a checkpoint; keeps the arrays beside it for `latest_arrays`."""
    wanted = {dotted(name): abstract(leaf) for name, leaf in flat(template).items()}
    self._check(step, wanted)
    beside = self._beside(step)
    stored = self._load(step, wanted | beside)
    self._arrays = without_prefix(stored, beside)

    def take(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
      value = stored[dotted(path_name(path))]
      return (
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if is_key(leaf) else value
      )

    return jax.tree_util.tree_map_with_path(take, template)

  def latest_arrays(self) -> dict[str, np.ndarray]:
    """The `arrays` of the newest checkpoint; empty if there are none."""
    step = self.latest_step
    if step is None:
      return {}
    arrays, self._arrays = self._arrays, None
    if arrays is None:
      beside, found = self._beside(step), self._checkpointer.metadata(step).metadata
      loaded = self._load(step, beside | {name: ... for name in found if name not in beside})
      arrays = without_prefix(loaded, beside)
    return arrays

  def _beside(self, step: int) -> dict[str, np.ndarray]:
    """Room for the arrays beside the state of a checkpoint, by their stored names."""
    found = self._checkpointer.metadata(step).metadata
    beside = {name: leaf for name, leaf in found.items() if name.startswith(BESIDE)}
    return {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in beside.items()}

  def latest_extra(self) -> dict[str, Any]:
    """The `extra` of the newest checkpoint; empty if there is none."""
    step = self.latest_step
    if step is None:
      return {}
    return dict(self._checkpointer.metadata(step).custom_metadata or {})

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    watch_closed_loops()
    try:
      return self._checkpointer.load(step, wanted)
    except UNREADABLE as error:
      ignore_never_awaited()
      raise DamagedError(
        f"checkpoint '{self.folder / str(step)}' is damaged: it cannot be read;"
        " remove it to go on from the one before"
      ) from error

  def _check(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    found = self._checkpointer.metadata(step).metadata
    stored = {n: tuple(leaf.shape) for n, leaf in found.items() if not n.startswith(BESIDE)}
    for name in (*wanted, *stored):
      here, there = wanted.get(name), stored.get(name)
      if here is None or there is None or here.shape != there:
        hint = suggest(name, stored) if there is None else ""
        raise ValueError(
          f"checkpoint '{self.folder / str(step)}' does not fit this run: '{name}' is"
          f" {there or 'absent'} there and {here.shape if here else 'absent'} here{hint};"
          " use the same configuration or another workdir"
        )

  def wait(self) -> None:
    """Returns when everything saved so far is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self._checkpointer.close()

  def __enter__(self) -> "TrainCheckpointer":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


def dotted(name: str) -> str:
  """A name that is one path component."""
  return name.replace("/", ".")


def without_prefix(stored: Mapping[str, Any], beside: Iterable[str]) -> dict[str, np.ndarray]:
  """The arrays of these stored names by the names that they were given."""
  return {name.removeprefix(BESIDE).replace(".", "/"): stored[name] for name in beside}


def is_key(leaf: Any) -> bool:
  """Whether a leaf holds random keys."""
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_array(leaf: Any) -> Any:
  """A leaf as it is stored."""
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and place of a leaf as it is stored."""
  stored = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
  sharding = getattr(leaf, "sharding", None)
  if sharding is None or is_key(leaf):
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)
