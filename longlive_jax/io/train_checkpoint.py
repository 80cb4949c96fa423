"""Checkpoints of a training run: the whole state, to the bit, so that a run can go on.

Leaves are stored under their dotted names ("params.layers.ffn.up"), so any pytree will do and the
stored form does not depend on its classes. Random keys are stored as their data.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from longlive_jax.checks import suggest
from longlive_jax.io.atomic import remove
from longlive_jax.io.leaves import flat, path_name
from longlive_jax.io.processes import is_first, of_all, wait_for_all
from longlive_jax.types import PyTree

BESIDE = "beside."  # before the names of arrays that are kept beside the state
UNREADABLE = (ValueError, OSError, KeyError)  # what Orbax raises for damaged files


class TrainCheckpointer:
  """Saves every so many steps and restores the newest; writing goes on in the background.

  A checkpoint that cannot be read, because whoever wrote or copied it was cut short, is set aside
  under the name "STEP.unreadable". All processes of a run make one, and call the same methods in
  the same order; each saves and restores its part of the arrays.

  Args:
    folder: holds one folder a step; of a file system that all processes share.
    every: steps between checkpoints, `io.checkpoint_every_steps`.
    keep: newest checkpoints that are kept, `io.keep_checkpoints`.

  Raises:
    ValueError: the processes see different checkpoints.
  """

  def __init__(self, folder: str | Path, every: int, keep: int):
    self.folder = Path(folder).absolute()
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
    for checkpoint in self._checkpointer.checkpoints:
      path = self.folder / str(checkpoint.step)
      if not self._is_readable(checkpoint.step):
        aside = path.with_suffix(".unreadable")
        remove(aside)
        path.rename(aside)
        logging.warning("checkpoint '%s' cannot be read; it is now '%s'", path, aside.name)

  def _is_readable(self, step: int) -> bool:
    try:
      return self._checkpointer.metadata(step).metadata is not None
    except UNREADABLE:
      return False

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
    leaves = {dotted(name): as_array(leaf) for name, leaf in flat(state).items()}
    leaves |= {BESIDE + dotted(name): array for name, array in (arrays or {}).items()}
    self._checkpointer.save_async(step, leaves, custom_metadata=extra, force=force)
    return True

  def restore_latest(self, template: PyTree) -> PyTree:
    """The newest state, bit for bit, or `template` itself if there is none.

    Args:
      template: a state (or its shapes) whose structure, dtypes and shardings are wanted; it may
        be on another mesh than the one that saved.

    Raises:
      ValueError: the stored state has other leaves or shapes (names one), or is damaged.
    """
    self.wait()
    step = self.latest_step
    if step is None:
      return template
    wanted = {dotted(name): abstract(leaf) for name, leaf in flat(template).items()}
    self._check(step, wanted)
    beside = [n for n in self._checkpointer.metadata(step).metadata if n.startswith(BESIDE)]
    stored = self._load(step, wanted | dict.fromkeys(beside, ...))

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
    found = self._checkpointer.metadata(step).metadata
    beside = {name: leaf for name, leaf in found.items() if name.startswith(BESIDE)}
    wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in beside.items()}
    loaded = self._load(step, wanted | {name: ... for name in found if name not in beside})
    return {name.removeprefix(BESIDE).replace(".", "/"): loaded[name] for name in beside}

  def latest_extra(self) -> dict[str, Any]:
    """The `extra` of the newest checkpoint; empty if there is none."""
    step = self.latest_step
    if step is None:
      return {}
    return dict(self._checkpointer.metadata(step).custom_metadata or {})

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
      return self._checkpointer.load(step, wanted)
    except UNREADABLE as error:
      raise ValueError(
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
