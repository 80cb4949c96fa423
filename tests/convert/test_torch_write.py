"""PyTorch files are written without PyTorch, and read as they were."""

import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_tensor import DTYPES
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.convert.torch_zip import read_torch
from tests.convert.torch_files import bits, leaves

TREE = {
  "model": {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": [1, -2, 2**40, -(2**63)],
  },
  "plain": (None, True, False, 0.1, -0.0, "text é\n", "", [], {}, (), 2**64 - 1),
  "empty": np.zeros((0, 3), np.int64),
  "number": np.array(7, np.int32),
}


def test_a_tree_is_read_as_it_was_written(tmp_path):
  write_torch(tmp_path / "f.pt", TREE)
  tree = read_torch(tmp_path / "f.pt")
  assert tree["plain"] == TREE["plain"] and tree["model"]["b"] == TREE["model"]["b"]
  assert [leaf.shape for leaf in leaves(tree)] == [(2, 3), (0, 3), ()]
  assert np.array_equal(tree["model"]["a.weight"].read(), TREE["model"]["a.weight"])
  assert tree["number"].read() == 7 and tree["number"].read().shape == ()
  write_torch(tmp_path / "again.pth", tree)
  assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "f.pt").read_bytes()
  with zipfile.ZipFile(tmp_path / "f.pt") as file:
    assert file.testzip() is None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_a_read_only_view_of_the_file(dtype, tmp_path):
  array = np.random.default_rng(0).integers(0, 2, (5, 8 * dtype.itemsize), np.uint8).view(dtype)
  write_torch(tmp_path / "f.pt", {"x": array, "y": array.T})
  tree = read_torch(tmp_path / "f.pt")
  found = tree["x"].read()
  assert (
    found.dtype == dtype and bits(found) == bits(array) and bits(tree["y"].read()) == bits(array.T)
  )
  assert not found.flags.writeable and not found.flags.owndata and found.ctypes.data % 64 == 0
  assert np.shares_memory(found, tree["x"].read())


def test_large_records_are_written_with_64_bits(tmp_path, monkeypatch):
  monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
  arrays = {"a": np.arange(500), "b": np.arange(3), "c": np.arange(999, dtype=np.int16)}
  write_torch(tmp_path / "f.pt", arrays)
  assert b"PK\6\6" in (tmp_path / "f.pt").read_bytes()
  for key, leaf in read_torch(tmp_path / "f.pt").items():
    assert np.array_equal(leaf.read(), arrays[key]) and leaf.read().ctypes.data % 64 == 0


def test_one_tensor_is_held_at_a_time(tmp_path):
  array = np.zeros(4 << 20, np.uint8)
  fresh = Stored(array.shape, array.dtype, array.copy)
  tracemalloc.start()
  try:
    write_torch(tmp_path / "f.pt", {str(index): fresh for index in range(10)})
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert (tmp_path / "f.pt").stat().st_size > 40 << 20 and peak < 9 << 20


def test_a_failed_write_leaves_the_old_file(tmp_path):
  write_torch(tmp_path / "f.pt", {"a": 1})
  for shape, dtype in (((3,), np.float32), ((2,), np.float64)):
    lies = Stored(shape, np.dtype(dtype), lambda: np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"x\.y reads as float32 \[2\]; it must be"):
      write_torch(tmp_path / "f.pt", {"x": {"y": lies}})
  assert read_torch(tmp_path / "f.pt") == {"a": 1} and os.listdir(tmp_path) == ["f.pt"]


def test_what_cannot_be_written_is_named(tmp_path):
  endless: list = []
  endless.append(endless)
  for tree, message in (
    ({"a": {1: 2}}, "a has the key 1"),
    ({"a": [0, {1, 2}]}, r"a\[1\] is of type set"),
    ({"a": np.zeros(2, np.complex64)}, "a is complex64"),
    ({"a": np.zeros(2, ">f4")}, "a is >f4"),
    ({"a": np.zeros([1] * 33)}, "33 axes"),
    ({"a": 1 << 64}, "a is an integer of more"),
    ({"a": "\ud800"}, "no UTF-8"),
    (np.float32(1), "the tree is of type float32"),
    (endless, "nested more than 100"),
  ):
    with pytest.raises(ValueError, match=message):
      write_torch(tmp_path / "f.pt", tree)
  assert not os.listdir(tmp_path)
