"""Writes a checkpoint leaf by leaf; what was written before an interruption is not written again.

The work is done in a hidden folder beside the result, `.NAME.unfinished`. It holds a plan, which
says what is being made of what, and the finished groups. A run that is started again with the same
plan goes on; with another one it starts afresh. The result appears under its name when it is whole.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.convert.leaves import Leaves
from longlive_jax.convert.stored import Stored
from longlive_jax.io.atomic import check_kind, remove
from longlive_jax.io.checkpoint import (
  CONFIG,
  METADATA,
  PLAN,
  check_replaceable,
  is_finite,
  save_group,
  write_json,
)

GROUP_BYTES = 2**28
HASH_PIECE = 2**22
COMPRESSED_BYTES = 2**26  # a network of at most so many is compressed
REMOVING_SECONDS = 10
Progress = Callable[[int], object]


def write_checkpoint(
  folder: str | Path,
  networks: Mapping[str, Leaves],
  config: Mapping[str, object],
  metadata: Mapping[str, object],
  files: Sequence[Path],
  *,
  inputs: Sequence[Path] = (),
  overwrite: bool = False,
  progress: Progress = lambda size: None,
  group_bytes: int = GROUP_BYTES,
) -> None:
  """Writes the leaves of networks; see `io.checkpoint` for the layout.

  Args:
    folder: where to.
    networks: name of a network -> its leaves.
    config: the resolved configuration, as JSON.
    metadata: what made the weights, as JSON; "sources" with names, bytes and SHA-256 is added.
    files: what the leaves are read from, hashed meanwhile.
    inputs: what else they are read from: if it changes, an interrupted run starts afresh.
    overwrite: an older checkpoint there is replaced; otherwise it is an error.
    progress: called with the bytes of every group that is there.
    group_bytes: leaves are written together until they are this large.

  Raises:
    ValueError: a leaf is not finite, the folder is something else, or another process writes it;
      nothing is left behind then.
    OSError: the place cannot be written.
  """
  folder = Path(folder)
  check_free(folder, overwrite)
  stamps = [stamp(file) for file in (*files, *inputs)]
  plan = {"networks": plan_of(networks), "files": stamps}
  plan |= {"config": dict(config), "metadata": dict(metadata), "group_bytes": group_bytes}
  with unfinished(folder, plan) as partial, ThreadPoolExecutor(1) as pool:
    hashes = [(file, pool.submit(sha256, file)) for file in files]
    try:
      for name, leaves in networks.items():
        write_groups(partial / name, name, leaves, group_bytes, progress)
      sources = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": result.result()}
        for file, result in hashes
      ]
    finally:
      pool.shutdown(cancel_futures=True)
    earlier = metadata.get("sources")
    sources = [*(earlier if isinstance(earlier, list) else []), *sources]
    write_json(partial / METADATA, {**metadata, "sources": sources} if sources else metadata)
    write_json(partial / CONFIG, config)


def check_free(folder: Path, overwrite: bool) -> None:
  """Raises ValueError if something is there that must not be replaced."""
  check_replaceable(folder)
  if not overwrite and folder.is_dir() and any(folder.iterdir()):
    raise ValueError(f"'{folder}' is a checkpoint already; --overwrite replaces it")


def plan_of(networks: Mapping[str, Leaves]) -> dict[str, Any]:
  """Names, shapes and dtypes of all leaves, shortened to a digest a network."""
  described = {
    name: [[key, stored.shape, str(stored.dtype)] for key, stored in leaves.items()]
    for name, leaves in networks.items()
  }
  return {n: hashlib.sha256(json.dumps(d).encode()).hexdigest() for n, d in described.items()}


def stamp(file: Path) -> list[object]:
  """What tells whether a file has changed, without reading it."""
  found = file.stat()
  return [str(file.absolute()), found.st_size, found.st_mtime_ns]


def sha256(file: Path) -> str:
  """The hash of a file's content; mapped, because a copy would cost as much as a third of it."""
  digest = hashlib.sha256()
  if file.stat().st_size:
    with (
      file.open("rb") as opened,
      mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
      memoryview(data) as view,
    ):
      for start in range(0, len(view), HASH_PIECE):
        digest.update(view[start : start + HASH_PIECE])
  return digest.hexdigest()


@contextlib.contextmanager
def unfinished(folder: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
  """The hidden folder of a conversion, renamed to `folder` when the body ends.

  It stays for the next run when the process is killed or interrupted, and goes on any error.
  """
  partial = folder.with_name(f".{folder.name}.unfinished")
  check_ours(partial)
  above = [path for path in folder.parents if not path.exists()]
  partial.mkdir(parents=True, exist_ok=True)
  with locked(partial, folder):
    if not is_of(partial, plan):
      for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == PLAN):  # it last
        remove(entry)
      write_json(partial / PLAN, plan)
    with contextlib.ExitStack() as stack:
      stack.push(functools.partial(forget, partial, above))
      yield partial
      check_kind(folder, folder=True)
      if plan["files"] != [stamp(Path(file)) for file, *_ in plan["files"]]:
        raise ValueError("what is converted has changed meanwhile; start again")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.is_dir():
      folder.rename(old)
    partial.rename(folder)
    remove(folder / PLAN)
    remove(old)


def check_ours(partial: Path) -> None:
  """Raises ValueError if something else has the name of the hidden folder."""
  if partial.is_symlink() or (
    partial.exists()
    and not (partial.is_dir() and ((partial / PLAN).is_file() or not any(partial.iterdir())))
  ):
    raise ValueError(f"'{partial}' is in the way, and not of a conversion; remove it")


def forget(
  partial: Path, above: Sequence[Path], kind: type[BaseException] | None, *details: object
) -> None:
  """Removes an unfinished folder, and folders made for it, after an error; not an interruption.

  Threads that still write make new files meanwhile; they end soon.
  """
  del details
  if kind is None or not issubclass(kind, Exception):
    return
  deadline = time.monotonic() + REMOVING_SECONDS
  while partial.exists() and time.monotonic() < deadline:
    shutil.rmtree(partial, ignore_errors=True)
    time.sleep(0.05)
  for path in above:  # the nearest first
    with contextlib.suppress(OSError):
      path.rmdir()


@contextlib.contextmanager
def locked(partial: Path, folder: Path) -> Iterator[None]:
  """Holds the lock of a folder, which ends with the process."""
  handle = os.open(partial, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"another process is writing '{folder}' at this moment") from error
    yield
  finally:
    os.close(handle)


def is_of(partial: Path, plan: Mapping[str, Any]) -> bool:
  """Whether the folder was begun with this plan."""
  try:
    return json.loads((partial / PLAN).read_text()) == json.loads(json.dumps(plan))
  except (OSError, ValueError):
    return False


def write_groups(
  folder: Path, network: str, leaves: Leaves, group_bytes: int, progress: Progress
) -> None:
  """Writes the groups that are not there; compressed if it is little, which takes no time then."""
  folder.mkdir(exist_ok=True)
  groups = groups_of(leaves, group_bytes)
  little = sum(leaf.nbytes for leaf in leaves.values()) <= COMPRESSED_BYTES
  names = {f"{number:03d}" for number in range(len(groups))}
  for entry in folder.iterdir():
    if entry.name not in names:  # begun and not finished
      remove(entry)
  missing = {folder / f"{n:03d}": group for n, group in enumerate(groups)}
  for path in [path for path in missing if path.is_dir()]:
    progress(sum(leaves[name].nbytes for name in missing.pop(path)))

  def arrays(group: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: finite(network, name, leaves[name]) for name in group}

  for path, made in ahead(arrays, missing):
    save_group(path, made, compress=little)
    progress(sum(array.nbytes for array in made.values()))


def ahead[K, V, R](make: Callable[[V], R], items: Mapping[K, V]) -> Iterator[tuple[K, R]]:
  """Yields (key, made value) in order; the next value is made in a thread meanwhile.

  In one thread: leaves that are made together keep what was made until all of them are read.
  """
  keys = list(items)
  with ThreadPoolExecutor(1) as pool:
    coming = [pool.submit(make, items[key]) for key in keys[:1]]
    for number, key in enumerate(keys):
      value = coming.pop().result()
      coming += [pool.submit(make, items[k]) for k in keys[number + 1 : number + 2]]
      yield key, value


def groups_of(leaves: Leaves, group_bytes: int) -> list[list[str]]:
  """Names of the leaves that are written together."""
  groups: list[list[str]] = []
  size = group_bytes
  for name, stored in leaves.items():
    if size >= group_bytes:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += stored.nbytes
  return groups


def finite(network: str, name: str, stored: Stored) -> np.ndarray:
  """The array of a leaf; ValueError where it is not finite."""
  array = np.asarray(stored.read(), order="C")  # unlike ascontiguousarray, it keeps scalars
  if not is_finite(array):
    raise ValueError(f"'{network}/{name}' is not finite (NaN or inf); nothing was written")
  return array
