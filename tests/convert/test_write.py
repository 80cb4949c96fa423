"""Checkpoints written leaf by leaf: reading beside writing, and what an error leaves."""

from pathlib import Path

import numpy as np
import pytest

from longlive_jax.convert.leaves import checkpoint_leaves
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.write import write_checkpoint
from longlive_jax.io.checkpoint import read_metadata, save_group


def test_leaves_of_a_checkpoint_are_copied_while_they_are_read(tmp_path: Path):
  """Orbax wrote before its folder was there when another thread loaded meanwhile."""
  arrays = {f"layers/{i}/{n}": np.full((64, 8), i, np.float32) for i in range(40) for n in "ab"}
  for number, start in enumerate(range(0, 80, 2)):
    names = list(arrays)[start : start + 2]
    save_group(tmp_path / "source" / f"{number:03d}", {n: arrays[n] for n in names})
  leaves = checkpoint_leaves(tmp_path / "source")
  done: list[int] = []
  write_checkpoint(
    tmp_path / "copy", {"dit": leaves}, {}, {}, [], progress=done.append, group_bytes=4096
  )
  assert sum(done) == sum(a.nbytes for a in arrays.values())
  copied = checkpoint_leaves(tmp_path / "copy" / "dit")
  assert list(copied) == list(leaves)
  for name, stored in copied.items():
    np.testing.assert_array_equal(stored.read(), arrays[name])


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path):
  def fail() -> np.ndarray:
    raise ValueError("cannot be made")

  good = {f"a{i}": Stored.of(np.zeros((100, 100), np.float32)) for i in range(8)}
  bad = {"z": Stored((2,), np.dtype(np.float32), fail)}
  with pytest.raises(ValueError, match="cannot be made"):
    write_checkpoint(tmp_path / "out", {"dit": good | bad}, {}, {}, [], group_bytes=50_000)
  assert not list(tmp_path.iterdir())


def test_sources_are_hashed(tmp_path: Path):
  file = tmp_path / "source"
  file.write_bytes(b"abc")
  (tmp_path / "empty").touch()
  leaves = {"w": Stored.of(np.ones(2, np.float32))}
  files = [file, tmp_path / "empty"]
  write_checkpoint(tmp_path / "out", {"dit": leaves}, {"a": 1}, {"b": 2}, files)
  sources = read_metadata(tmp_path / "out")["sources"]
  assert [source["bytes"] for source in sources] == [3, 0]
  assert sources[0]["sha256"].startswith(
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f2"
  )
  assert sources[1]["sha256"].startswith(
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7"
  )
