"""Files and folders that appear under their name only when they are complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
  """Gives a hidden sibling of `path` to write to, and renames it to `path` on success.

  Whatever ends the body early, an interrupt included, leaves nothing new behind; an older file
  or folder at `path` then stays as it was.

  Args:
    path: the file or folder to make; its parent folder is created.

  Yields:
    The temporary name, with the suffix of `path`; nothing exists there yet.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
  remove(partial)
  try:
    yield partial
    if path.is_dir():  # only an empty folder can be replaced in one step
      old = path.with_name(f".{path.name}.old-{os.getpid()}")
      path.rename(old)
      partial.rename(path)
      remove(old)
    else:
      os.replace(partial, path)
  finally:
    remove(partial)


def remove(path: Path) -> None:
  """Removes a file or a folder if it exists."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
