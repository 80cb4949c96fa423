"""A session on disk: one folder that appears when it is complete, for any number of devices.

    FOLDER/arrays/000, 001, ...  Orbax: filled slots of the cache, one leaf a layer, as they are
                                 (bfloat16, float32, packed NVFP4); decoder state; latents
    FOLDER/config.json           the resolved configuration
    FOLDER/session.json          everything else, with sizes of files, checksums of leaves, and one
                                 of itself; written last

Leaves are those of one device: what several devices split is put together.
"""

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.checks import check_dtypes, check_shape
from longlive_jax.config import Experiment
from longlive_jax.config.load import read_saved, to_json
from longlive_jax.data.prompts import BlockPrompt, Shot
from longlive_jax.io.atomic import check_writable, replacing
from longlive_jax.io.checkpoint import CONFIG, load_group, save_group, write_json
from longlive_jax.io.leaves import disk_places, flat, path_name
from longlive_jax.model.kv_cache import SlotState
from longlive_jax.quant.kv import regrouped
from longlive_jax.sample.block import Caches
from longlive_jax.sample.latents import block_shape
from longlive_jax.sample.moment import Account, Moment
from longlive_jax.sample.rollout import Engine, RolloutState
from longlive_jax.sample.schedule import SampleState
from longlive_jax.sample.session_settings import check_settings
from longlive_jax.types import SEQ, PyTree

ACCOUNT, ARRAYS = "session.json", "arrays"
FORMAT = 2
GROUP_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Saved:
  """What is saved of a session.

  Attributes:
    seed, index: of the noise.
    moment: on the host.
    first: given first latent `[1, 1, h, w, C]` float32, if there is one.
  """

  seed: int
  index: int
  moment: Moment
  first: np.ndarray | None


def write_session(folder: str | Path, saved: Saved, engine: Engine, experiment: Experiment) -> None:
  """Writes a session; an older one in `folder` is replaced when this one is complete.

  Raises:
    OSError: it cannot be written.
    ValueError: the folder holds something that is not a saved session.
  """
  folder = Path(folder)
  check_writable(folder, folder=True)
  if folder.is_dir() and any(folder.iterdir()) and not (folder / ACCOUNT).is_file():
    raise ValueError(f"'{folder}' holds something that is not a saved session; choose another")
  with replacing(folder) as partial:
    (partial / ARRAYS).mkdir(parents=True)
    sums: dict[str, int] = {}
    group: dict[str, np.ndarray] = {}
    for name, leaf in _leaves(saved, engine):
      group[name] = np.ascontiguousarray(leaf)
      sums[name] = checksum(group[name])
      if sum(a.nbytes for a in group.values()) >= GROUP_BYTES:
        _write_group(partial, group)
        group = {}
    if group:
      _write_group(partial, group)
    (partial / CONFIG).write_text(to_json(experiment))
    account = {**_account(saved), "files": sizes(partial), "checksums": sums}
    write_json(partial / ACCOUNT, {**account, "sha256": digest(account)})


def digest(account: Mapping[str, object]) -> str:
  """SHA-256 of what `session.json` says, in hexadecimal, however it is laid out there."""
  rest = {name: value for name, value in account.items() if name != "sha256"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sizes(folder: Path) -> dict[str, int]:
  """Bytes of each file of arrays."""
  files = sorted(path for path in (folder / ARRAYS).rglob("*") if path.is_file())
  return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _write_group(folder: Path, group: Mapping[str, np.ndarray]) -> None:
  number = len(list((folder / ARRAYS).iterdir()))
  save_group(folder / ARRAYS / f"{number:03d}", group, compress=False)


def checksum(array: np.ndarray) -> int:
  """CRC-32 of the bytes of a contiguous array."""
  return zlib.crc32(array.reshape(-1).view(np.uint8))


def devices_of(engine: Engine) -> int:
  """Devices that split the heads of a cache."""
  mesh = engine.denoiser.ops.mesh
  return 1 if mesh is None else mesh.shape[SEQ]


def _named(part: Caches) -> dict[str, PyTree]:
  """Name -> leaf of a slot; each has a layer axis, whether layers are stacked or not."""
  return flat({str(branch): {"layers": cache} for branch, cache in enumerate(part)})


def _places(name: str, leaf: Any) -> list[tuple[str, int]]:
  """Where the layers of a leaf go on disk: (name there, index into the leaf)."""
  return [(n, 0 if i is ... else i) for n, i in disk_places(name, leaf.shape)]


def _leaves(saved: Saved, engine: Engine) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name on disk, array) of all that is saved in arrays."""
  moment = saved.moment
  heads, ranks = engine.experiment.model.heads, devices_of(engine)
  for slot, block in enumerate(moment.rollout.states[0].slots.blocks):
    part = regrouped((moment.slots or {})[slot], heads, ranks, 1)
    for name, leaf in _named(part).items():
      for place, index in _places(name, leaf):
        yield f"cache/{block}/{place}", leaf[index]
  for name, leaf in flat(moment.decoder).items():
    yield f"decoder/{name}", leaf
  for block, latents in moment.rollout.history:
    yield f"history/{block}", np.asarray(latents)
  if saved.first is not None:
    yield "first", saved.first


def _account(saved: Saved) -> dict[str, object]:
  """All that is saved beside the arrays, as JSON."""
  rollout, account = saved.moment.rollout, saved.moment.account
  return {
    "format": FORMAT,
    "seed": saved.seed,
    "index": saved.index,
    "block": rollout.block,
    "state": dataclasses.asdict(rollout.states[0]),
    "history": [block for block, _ in rollout.history],
    "image": saved.first is not None,
    "prompt": account.prompt,
    "pending": account.pending and dataclasses.asdict(account.pending),
    "made": [dataclasses.astuple(entry) for entry in account.made],
  }


def read_session(
  folder: str | Path, engine: Engine, part: Caches, decoder: PyTree, experiment: Experiment
) -> Saved:
  """Reads a session into host memory, in the form that the engine's devices take.

  Saves of format 1, made before `session.json` had a checksum of itself, are refused.

  Args:
    folder: written by `write_session`.
    engine: of a batch of one.
    part: shapes of a cache of one slot.
    decoder: shapes of the decoder's state.
    experiment: of the engine.

  Raises:
    FileNotFoundError: there is no saved session.
    ValueError: it is damaged, of another format, or of another experiment (names the settings).
  """
  folder = Path(folder)
  if not (folder / ACCOUNT).is_file():
    found = f"it has no {ACCOUNT}" if folder.exists() else "it does not exist"
    raise FileNotFoundError(f"'{folder}' is not a saved session: {found}")
  with understood(folder):
    account = json.loads((folder / ACCOUNT).read_text())
    form = account["format"]
  if form != FORMAT:
    raise ValueError(f"saved session '{folder}' has format {form!r}; this version reads {FORMAT}")
  with understood(folder):
    if account["sha256"] != digest(account):
      raise ValueError(f"what {ACCOUNT} says is not what was written")
    for name in ("seed", "index"):
      if type(account[name]) is not int or not 0 <= account[name] < 2**32:
        raise ValueError(f"{name}={account[name]!r} must be a whole number from 0 to 2**32 - 1")
    there = read_saved(folder / CONFIG)
  check_settings(folder, there, experiment)
  with understood(folder):
    leaves = _read_arrays(folder, account["files"], account["checksums"])
    return _assemble(account, leaves, engine, part, decoder)


def _assemble(
  account: Mapping[str, Any],
  leaves: Mapping[str, np.ndarray],
  engine: Engine,
  part: Caches,
  decoder: PyTree,
) -> Saved:
  """What `_account` and `_leaves` were made from; the rest is as for `read_session`."""
  slots = SlotState(**{k: _tupled(v) for k, v in account["state"]["slots"].items()})
  states = (SampleState(slots, account["state"]["cuts"]),)
  shape = block_shape(engine.experiment, 1)
  history = tuple((b, _take(leaves, f"history/{b}", shape)) for b in account["history"])
  pending = account["pending"]
  said = Account(
    tuple(BlockPrompt(*entry) for entry in account["made"]),
    account["prompt"],
    None if pending is None else Shot(**pending),
  )
  parts = {i: _read_part(leaves, block, part, engine) for i, block in enumerate(slots.blocks)}
  carried = _read_tree(leaves, "decoder", decoder) if account["block"] else None
  first = _take(leaves, "first", (1, 1, *shape[2:])) if account["image"] else None
  moment = Moment(RolloutState(account["block"], states, (), history), carried, said, parts)
  return Saved(account["seed"], account["index"], moment, first)


@contextlib.contextmanager
def understood(folder: Path) -> Iterator[None]:
  """Whatever cannot be understood becomes one line that names the folder."""
  try:
    yield
  except KeyError as error:
    raise ValueError(f"saved session '{folder}' is damaged: it lacks {error}") from error
  except (ValueError, OSError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"saved session '{folder}' is damaged: {error}") from error


def _read_arrays(
  folder: Path, files: Mapping[str, int], sums: Mapping[str, int]
) -> dict[str, np.ndarray]:
  """All leaves by their names on disk, each as it was written."""
  leaves: dict[str, np.ndarray] = {}
  found = sizes(folder)
  for name, expected in files.items():  # Orbax never sees a file that was cut short
    if found.get(name) != expected:
      raise ValueError(f"'{name}' has {found.get(name, 0)} bytes, not {expected}")
  for path in sorted((folder / ARRAYS).iterdir()):
    leaves |= load_group(path)
  for name, expected in sums.items():
    if checksum(leaves[name]) != expected:
      raise ValueError(f"the numbers of '{name}' are not those that were written")
  return leaves


def _take(
  leaves: Mapping[str, np.ndarray], name: str, shape: Sequence[int], dtype: Any = np.float32
) -> np.ndarray:
  """One leaf, of the shape and dtype that it must have."""
  leaf = leaves[name]
  check_shape(name, leaf.shape, shape)
  check_dtypes(**{name: (leaf, dtype)})
  return leaf


def _read_tree(leaves: Mapping[str, np.ndarray], above: str, shapes: PyTree) -> PyTree:
  """A tree whose leaves are stored one by one below a name."""
  return jax.tree_util.tree_map_with_path(
    lambda path, a: _take(leaves, f"{above}/{path_name(path)}", a.shape, a.dtype), shapes
  )


def _read_part(
  leaves: Mapping[str, np.ndarray], block: int, shapes: Caches, engine: Engine
) -> Caches:
  """The contents of the slot of a block."""
  arrays = []
  for name, leaf in _named(shapes).items():
    array = np.empty(leaf.shape, leaf.dtype)
    for place, index in _places(name, leaf):
      array[index] = _take(leaves, f"cache/{block}/{place}", leaf.shape[1:], leaf.dtype)
    arrays.append(array)
  part = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
  return regrouped(part, engine.experiment.model.heads, 1, devices_of(engine))


def _tupled(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value
