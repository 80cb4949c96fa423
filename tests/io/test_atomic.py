"""Files that appear whole or not at all."""

import errno
import os
import shutil

import pytest

from longlive_jax.io import atomic
from longlive_jax.io.atomic import check_writable, remove, replacing


def test_a_place_that_can_be_written_is_left_alone(tmp_path):
  check_writable(tmp_path / "new" / "folder" / "file.txt")
  assert not list(tmp_path.iterdir())


def test_a_place_below_a_file_or_in_a_locked_folder_is_refused(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError, match=r"'.*/file' is not a folder: '.*/file/a/b'"):
    check_writable(tmp_path / "file" / "a" / "b")
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  with pytest.raises(PermissionError, match=rf"the folder '{tmp_path}' is not writable"):
    check_writable(tmp_path / "a" / "b")


@pytest.mark.parametrize("root", ["/", "//", "/proc/..", "/./"])
def test_the_root_of_the_file_system_is_no_folder_of_results(root):
  with pytest.raises(ValueError, match=r"'/.*' is the root of the file system; name a folder"):
    check_writable(root, folder=True)
  with pytest.raises(IsADirectoryError):
    check_writable(root)


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path, folder):
  target = tmp_path / "target"
  with pytest.raises(OSError) as caught, replacing(target) as partial:
    partial.mkdir() if folder else partial.write_text("half")
    inside = str(partial / "3.png") if folder else str(partial)
    raise OSError(errno.ENOSPC, "No space left on device", inside)
  assert caught.value.filename == str(target / "3.png" if folder else target)
  assert not list(tmp_path.iterdir())


def test_an_error_without_a_file_gets_one(tmp_path):
  with pytest.raises(OSError) as caught, replacing(tmp_path / "target"):
    raise OSError(errno.EFBIG, "File too large")
  assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "target"))


def test_a_folder_is_not_replaced_by_a_file_nor_a_file_by_a_folder(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").write_text("kept")
  with pytest.raises(IsADirectoryError, match="it is a folder"):
    check_writable(tmp_path / "folder")
  with pytest.raises(NotADirectoryError, match="it is a file"):
    check_writable(tmp_path / "file", folder=True)
  with pytest.raises(IsADirectoryError), replacing(tmp_path / "folder") as partial:
    partial.write_text("new")
  with pytest.raises(NotADirectoryError), replacing(tmp_path / "file") as partial:
    partial.mkdir()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
  assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_is_still_written_to_is_removed_in_the_end(tmp_path, monkeypatch):
  folder, rmtree, tries = tmp_path / "folder", shutil.rmtree, []

  def busy(path, **options):
    tries.append(path)
    if len(tries) < 3:
      raise OSError(errno.ENOTEMPTY, "Directory not empty", "d")
    rmtree(path, **options)

  monkeypatch.setattr(shutil, "rmtree", busy)
  monkeypatch.setattr(atomic, "PAUSES", (0.0, 0.0))
  (folder / "d").mkdir(parents=True)
  remove(folder)
  assert len(tries) == 3 and not folder.exists()
  folder.mkdir()
  tries.clear()
  monkeypatch.setattr(atomic, "PAUSES", (0.0,))
  with pytest.raises(OSError, match="Directory not empty"):
    remove(folder)


def test_what_cannot_be_removed_hides_no_error(tmp_path, monkeypatch, caplog):
  def locked(path, **options):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))

  monkeypatch.setattr(shutil, "rmtree", locked)
  with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "target") as partial:
    partial.mkdir()
    raise OSError(errno.ENOSPC, "No space left on device", str(partial))
  (line,) = caplog.messages
  assert line == f"'{partial}' cannot be removed: Permission denied"
