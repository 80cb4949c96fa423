"""Files and folders that appear under their name only when they are complete."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4)  # seconds between tries to remove what is still written to
MOVING = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # what such a try says


def check_writable(path: str | Path, *, folder: bool = False) -> None:
  """Refuses a `path` at which no file could be made; makes nothing itself.

  Folders that are missing above `path` count as possible to make.

  Args:
    path: the file, or, with `folder`, the folder.
    folder: what is to be made. A file never replaces a folder, nor a folder a file.

  Raises:
    OSError: it could not be made; names `path`.
    ValueError: its name is not UTF-8, or the folder is the root of the file system.
  """
  path = Path(path)
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"the name {str(path)!r} is not UTF-8; choose another one") from error
  check_kind(path, folder)
  real = os.path.realpath(path)
  if os.path.dirname(real) == real:
    raise ValueError(f"'{path}' is the root of the file system; name a folder below it")
  above = next(folder for folder in path.absolute().parents if folder.exists())
  if not above.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, f"'{above}' is not a folder", str(path))
  if not os.access(above, os.W_OK | os.X_OK):
    raise PermissionError(errno.EACCES, f"the folder '{above}' is not writable", str(path))


def check_kind(path: Path, folder: bool) -> None:
  """Raises OSError if `path` is a folder where a file is to be, or a file where a folder is."""
  if path.is_dir() and not folder:
    raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file", str(path))
  if path.exists() and not path.is_dir() and folder:
    raise NotADirectoryError(errno.ENOTDIR, "it is a file; give the name of a folder", str(path))


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
  """Gives a hidden sibling of `path` to write to, and renames it to `path` on success.

  Whatever ends the body early, an interrupt included, leaves nothing new behind; an older file
  or folder at `path` then stays as it was.

  Args:
    path: the file or folder to make; its parent folder is created.

  Yields:
    The temporary name, with the suffix of `path`; nothing exists there yet.

  Raises:
    OSError: it cannot be written; names `path`, never the temporary name.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = partial_name(path, os.getpid())
  remove(partial)
  try:
    yield partial
    check_kind(path, partial.is_dir())
    if path.is_dir():  # only an empty folder can be replaced in one step
      old = path.with_name(f".{path.name}.old-{os.getpid()}")
      path.rename(old)
      partial.rename(path)
      discard(old)
    else:
      os.replace(partial, path)
  except OSError as error:
    if error.errno is None:
      raise
    name = str(error.filename or path).replace(str(partial), str(path))
    raise OSError(error.errno, error.strerror, name) from error
  finally:
    discard(partial)


def partial_name(path: str | Path, owner: int) -> Path:
  """The hidden sibling of `path` that the process with the id `owner` writes to."""
  path = Path(path)
  return path.with_name(f".{path.stem}.partial-{owner}{path.suffix}")


def remove(path: Path) -> None:
  """Removes a file or a folder if it exists; tries for a moment if others still write there.

  Raises:
    OSError: it cannot be removed.
  """
  for pause in (*PAUSES, None):
    try:
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
      return
    except OSError as error:
      if pause is None or error.errno not in MOVING:
        raise
      time.sleep(pause)


def discard(path: Path) -> None:
  """Removes what is of no use; if that cannot be, a line in the log says so, and no error."""
  try:
    remove(path)
  except OSError as error:
    logging.warning("'%s' cannot be removed: %s", path, error.strerror or error)
