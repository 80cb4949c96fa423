"""Checkpoints of weights: one folder, one leaf per layer, checked when it is read.

    FOLDER/config.json        the resolved configuration
    FOLDER/metadata.json      what made it
    FOLDER/dit/000, 001, ...  Orbax, each with leaves of about `GROUP_BYTES` together

In memory the layers of a network are stacked: a leaf below the key "layers" has a leading layer
axis. On disk it is one leaf a layer, "layers/0/ffn/up" and so on, so that no leaf is larger than
a layer and saving or loading needs little more memory than the weights themselves.
"""

import collections
import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from longlive_jax.checks import suggest
from longlive_jax.io.leaves import Index, disk_groups, disk_places, flat, nested, path_name
from longlive_jax.io.processes import is_first, replacing_together
from longlive_jax.io.train_checkpoint import UNREADABLE, TrainCheckpointer
from longlive_jax.types import ArrayLike, PyTree

__all__ = [
  "MismatchError",
  "TrainCheckpointer",
  "load_params",
  "read_config",
  "read_metadata",
  "save_params",
]

CONFIG, METADATA = "config.json", "metadata.json"
PLAN = "plan.json"  # of a conversion that was killed in its last moment
GROUP_BYTES = 2**30
ONE_AT_A_TIME = threading.Lock()  # Orbax: a load beside a save makes it write before its folder is
FINITE_PIECE = 2**18  # numbers that are looked at together: they stay in the cache


class MismatchError(ValueError):
  """The leaves of a checkpoint are not those that are wanted."""


def save_params(
  folder: str | Path,
  trees: Mapping[str, PyTree],
  config: Mapping[str, object],
  metadata: Mapping[str, object],
  *,
  group_bytes: int = GROUP_BYTES,
) -> None:
  """Writes weights with their configuration; the folder appears when it is complete.

  All processes of a run must call it, each writes its part of the arrays.

  Args:
    folder: where to; an older checkpoint there is replaced.
    trees: name of a network -> nested dict of arrays.
    config: the resolved configuration, as JSON.
    metadata: what made the weights, as JSON.
    group_bytes: leaves are written together until they are this large.

  Raises:
    ValueError: the folder holds something that is not a checkpoint.
  """
  folder = Path(folder)
  check_replaceable(folder)
  with replacing_together(folder) as partial:
    for name, tree in trees.items():
      for number, group in enumerate(disk_groups(tree, group_bytes)):
        save_group(partial / name / f"{number:03d}", group)
    if is_first():
      write_json(partial / METADATA, metadata)
      write_json(partial / CONFIG, config)


def save_group(path: Path, leaves: Mapping[str, ArrayLike], *, compress: bool = True) -> None:
  """Writes leaves by their names on disk; the folder appears when it is complete.

  Args:
    path: does not exist.
    leaves: name on disk -> array.
    compress: with zstd, which takes a fifth off bfloat16 weights; without, the writing is several
      times as fast.
  """
  context = ocp.Context()
  context.array.saving.use_compression = compress
  with ONE_AT_A_TIME, context:
    ocp.save(path.absolute(), nested(leaves))


def write_json(path: Path, values: Mapping[str, object]) -> None:
  """Writes one of the JSON files."""
  path.write_text(json.dumps(dict(values), indent=2) + "\n")


def check_replaceable(folder: Path) -> None:
  """Raises ValueError if a folder holds something that is not a checkpoint."""
  if folder.is_dir() and any(folder.iterdir()) and not is_checkpoint(folder):
    raise ValueError(f"'{folder}' holds something that is not a checkpoint; choose another folder")


def is_checkpoint(folder: Path) -> bool:
  """Whether a folder holds weights and nothing else."""
  found = {entry.name for entry in folder.iterdir()}
  described = {CONFIG, METADATA}
  networks = found - described - {PLAN}
  return described <= found and all((folder / n / "000").is_dir() for n in networks)


def read_config(folder: str | Path) -> dict[str, object]:
  """The configuration that was saved with the weights.

  Raises:
    FileNotFoundError: the folder is not a checkpoint.
    ValueError: the file in it is not JSON.
  """
  return read_json(Path(folder), CONFIG)


def read_metadata(folder: str | Path) -> dict[str, object]:
  """What was said about the weights when they were saved; errors as for `read_config`."""
  return read_json(Path(folder), METADATA)


def read_json(folder: Path, name: str) -> dict[str, object]:
  """One of the JSON files of a checkpoint."""
  if not (folder / name).is_file():
    raise FileNotFoundError(f"'{folder}' is not a checkpoint: it has no {name}")
  try:
    found = json.loads((folder / name).read_text())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"'{folder / name}' is damaged: it is not JSON ({error})") from error
  if not isinstance(found, dict):
    raise ValueError(f"'{folder / name}' is damaged: it is not a JSON object")
  return found


def load_params(
  folder: str | Path, abstract: Mapping[str, PyTree], *, check_finite: bool = True
) -> dict[str, PyTree]:
  """Reads weights and stacks their layers.

  Args:
    folder: written by `save_params`.
    abstract: name of a network -> nested dict of `jax.ShapeDtypeStruct`, which gives dtype (stored
      numbers are converted) and, if set, sharding. Networks that it leaves out are not read.
    check_finite: refuse NaN and infinity.

  Returns:
    Trees of `jax.Array` like `abstract`.

  Raises:
    FileNotFoundError: no checkpoint, or it lacks a network.
    MismatchError: a leaf is missing, unknown or of another shape; its name is given.
    ValueError: a leaf is not finite, or a file is damaged; its name is given.
  """
  folder = Path(folder)
  read_config(folder)
  loaded = {}
  for name, tree in abstract.items():
    if not (folder / name).is_dir():
      raise FileNotFoundError(
        f"checkpoint '{folder}' has no weights of '{name}'; it holds {', '.join(held(folder))}"
      )
    loaded[name] = load_network(folder / name, name, tree, check_finite)
  return loaded


def held(folder: Path) -> list[str]:
  """Names of the networks in a checkpoint."""
  return sorted(path.name for path in folder.iterdir() if path.is_dir()) or ["none"]


def load_network(folder: Path, name: str, abstract: PyTree, check_finite: bool) -> PyTree:
  """Reads the groups of one network; a leaf is placed as soon as all its layers are there."""
  leaves = flat(abstract)
  places: dict[str, tuple[str, Index]] = {}
  for key, leaf in leaves.items():
    places |= {place: (key, index) for place, index in disk_places(key, leaf.shape)}
  groups = {path: stored_arrays(path) for path in sorted(folder.iterdir())}
  check_leaves(
    name,
    {key: shape for stored in groups.values() for key, (shape, _) in stored.items()},
    {k: leaves[n].shape if i is ... else leaves[n].shape[1:] for k, (n, i) in places.items()},
  )
  missing = collections.Counter(key for key, _ in places.values())
  stacks: dict[str, np.ndarray] = {}
  placed: dict[str, jax.Array] = {}
  for path in groups:
    group = load_group(path, {key: leaves[places[key][0]].dtype for key in groups[path]})
    while group:
      key, value = group.popitem()
      if check_finite and not is_finite(value):
        raise ValueError(f"weights '{name}/{key}' in '{folder.parent}' are not finite (NaN or inf)")
      target, index = places[key]
      if target not in stacks:
        stacks[target] = value if index is ... else np.empty(leaves[target].shape, value.dtype)
      if index is not ...:
        stacks[target][index] = value
      missing[target] -= 1
      if not missing[target]:
        placed[target] = place(stacks.pop(target), leaves[target].sharding)
  return jax.tree_util.tree_map_with_path(lambda path, _: placed[path_name(path)], abstract)


def place(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """An array on its devices."""
  if sharding is None:
    return jax.device_put(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def load_group(path: Path, dtypes: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
  """The arrays of one Orbax folder by their names on disk, in host memory.

  Args:
    path: of the folder.
    dtypes: to convert to; without, they stay as stored.

  Raises:
    ValueError: it is damaged.
  """
  stored = stored_arrays(path)
  empty = {k: np.empty(shape, (dtypes or {}).get(k, d)) for k, (shape, d) in stored.items()}
  with reading(path):
    return flat(ocp.load(path.absolute(), nested(empty)))


def stored_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Name -> (shape, dtype) of the leaves in one Orbax folder."""
  with reading(path):
    found = ocp.metadata(path.absolute()).metadata
  return {key: (tuple(leaf.shape), leaf.dtype) for key, leaf in flat(found).items()}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
  """What Orbax says about a damaged file becomes one line that names the part."""
  try:
    with ONE_AT_A_TIME:
      yield
  except UNREADABLE as error:
    raise ValueError(f"part '{path}' of the checkpoint is damaged: it cannot be read") from error


def is_finite(value: np.ndarray) -> bool:
  """Whether an array holds no NaN or infinity: no number has all bits of its exponent set."""
  if not jnp.issubdtype(value.dtype, jnp.floating):
    return True
  if value.dtype.itemsize == 1 or not value.flags.c_contiguous:
    return bool(np.isfinite(value).all())
  unsigned = f"u{value.itemsize}"
  full = np.asarray(np.inf, value.dtype).view(unsigned)
  bits = value.reshape(-1).view(unsigned)
  pieces = (bits[i : i + FINITE_PIECE] for i in range(0, bits.size, FINITE_PIECE))
  return not any((piece & full).max() == full for piece in pieces)


def check_leaves(
  name: str, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises MismatchError unless the stored leaves are those that the configuration gives."""
  advice = "; use the configuration saved beside the weights"
  for key, shape in wanted.items():
    if key not in stored:
      raise MismatchError(f"the checkpoint lacks '{name}/{key}'{suggest(key, stored)}{advice}")
    if stored[key] != shape:
      raise MismatchError(
        f"'{name}/{key}' has shape {stored[key]} in the checkpoint"
        f" but {shape} by the configuration{advice}"
      )
  for key in stored:
    if key not in wanted:
      raise MismatchError(
        f"the checkpoint has '{name}/{key}', which the configuration has not"
        f"{suggest(key, wanted)}{advice}"
      )
