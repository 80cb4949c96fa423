"""PyTorch itself reads what is written, and what it saves is read; bit for bit."""

import collections
import importlib.util
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_tensor import DTYPES
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.convert.torch_zip import read_torch
from tests.convert.torch_files import bits, leaves

if importlib.util.find_spec("torch") is None:
  pytest.skip("PyTorch is not installed: pip install -e .[parity]", allow_module_level=True)

import torch


def torch_bits(tensor: torch.Tensor) -> bytes:
  """The bytes of a tensor, row-major."""
  flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
  return flat.numpy().tobytes()


def check(ours: object, theirs: object) -> None:
  """Fails unless both trees hold the same."""
  if isinstance(theirs, torch.Tensor):
    assert isinstance(ours, Stored) and ours.shape == tuple(theirs.shape)
    assert DTYPES[str(theirs.dtype)] == ours.dtype == ours.read().dtype
    assert ours.read().shape == ours.shape and bits(ours.read()) == torch_bits(theirs)
  elif isinstance(theirs, dict):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
      check(ours[key], value)
  elif isinstance(theirs, list | tuple):
    assert type(ours) is (list if isinstance(theirs, list) else tuple) and len(ours) == len(theirs)
    for mine, value in zip(ours, theirs, strict=True):
      check(mine, value)
  elif isinstance(theirs, torch.dtype | torch.device):
    assert ours == str(theirs)
  else:
    assert type(ours) is type(theirs) and ours == theirs


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
  """Any bits, except in booleans."""
  generator = torch.Generator().manual_seed(0)
  high = 2 if dtype == torch.bool else 256
  size = dtype.itemsize
  raw = torch.randint(0, high, (*shape[:-1], shape[-1] * size), generator=generator)
  return raw.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_goes_both_ways(dtype, tmp_path):
  kind = getattr(torch, dtype.removeprefix("torch."))
  tree = {"a": numbers(kind, 3, 5), "t": numbers(kind, 3, 5).t(), "s": numbers(kind, 9)[2:7:2]}
  tree |= {"scalar": numbers(kind, 1)[0], "empty": torch.zeros((0, 4), dtype=kind)}
  torch.save(tree, tmp_path / "theirs.pt")
  ours = read_torch(tmp_path / "theirs.pt")
  check(ours, tree)
  write_torch(tmp_path / "ours.pt", ours)
  for mapped in (False, True):
    back = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mapped)
    assert {key: value.dtype for key, value in back.items()} == dict.fromkeys(tree, kind)
    check(read_torch(tmp_path / "ours.pt"), back)
    assert all(torch_bits(back[key]) == torch_bits(value) for key, value in tree.items())


def modules() -> torch.nn.Module:
  """A small network with a buffer and shared weights."""
  torch.manual_seed(0)
  net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(3, 4))
  net[2].weight = net[0].weight
  return net


def checkpoints() -> dict[str, object]:
  """What people save."""
  net = modules()
  optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
  torch.nn.functional.linear(torch.ones(2, 3), net[0].weight).sum().backward()
  optimizer.step()
  large = torch.arange(100.0)
  with_state = torch.nn.Parameter(torch.ones(2))
  with_state.tag = 3
  return {
    "state": net.state_dict(),
    "half": {k: v.to(torch.bfloat16) for k, v in net.state_dict().items()},
    "optimizer": optimizer.state_dict(),
    "parameters": [torch.nn.Parameter(torch.ones(2, 2)), with_state],
    "slices": [large[10:20], large[::7], large.view(10, 10)[:, 3], large],
    "expanded": torch.ones(1, 3).expand(5, 3),
    "axes": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "ordered": collections.OrderedDict([("b", torch.ones(1)), ("a", 1)]),
    "plain": {"n": None, "t": True, "i": -(2**40), "f": 0.1, "s": "é", "l": [1, (2, [3])], 7: {}},
    "types": [torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])],
    "shared": [net[0].weight, net[0].weight],
  }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", checkpoints())
def test_what_people_save_is_read(name, protocol, tmp_path):
  tree = checkpoints()[name]
  torch.save(tree, tmp_path / "f.pt", pickle_protocol=protocol)
  check(read_torch(tmp_path / "f.pt"), tree)
  torch.save({"all": tree}, tmp_path / "g.pth", pickle_protocol=protocol)
  check(read_torch(tmp_path / "g.pth"), {"all": tree})


def test_what_is_written_is_read_by_the_safe_loader(tmp_path):
  tree = {
    "model": {
      "w": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
      "h": [np.zeros(0), np.ones(())],
    },
    "f8": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
    "plain": [None, True, False, 0.1, "é", "", [], {}, (), (1, (2,)), 0, 255, 256, -1],
    "large": [2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64 - 1],
  }
  write_torch(tmp_path / "f.pt", tree)
  for mapped in (False, True):
    back = torch.load(tmp_path / "f.pt", weights_only=True, mmap=mapped)
    assert back["plain"] == tree["plain"] and back["large"] == tree["large"]
    check(read_torch(tmp_path / "f.pt"), back)
    assert all(leaf.data_ptr() % 64 == 0 for leaf in (back["model"]["w"], back["f8"]) if mapped)
  net = modules()
  torch.save(net.state_dict(), tmp_path / "net.pt")
  write_torch(tmp_path / "ours.pt", read_torch(tmp_path / "net.pt"))
  modules().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: torch.zeros(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    (lambda: torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
    (lambda: torch.complex(torch.ones(2), torch.ones(2)).conj().imag, "negated"),
    (lambda: torch.nn.Linear(1, 1), "asks for 'torch.nn.modules.linear.Linear'"),
    (lambda: {(1, 2): torch.ones(1)}, "key of type 'tuple'"),
    (lambda: np.float64(3), "asks for 'numpy"),
    (lambda: {1, 2}, "asks for|EMPTY_SET"),
    (lambda: b"bytes", "asks for '_codecs.encode'"),
    (lambda: 1 << 70, "more than 64 bits"),
    (lambda: torch.ones(2).untyped_storage(), "asks for|where a tensor"),
  ],
)
def test_other_objects_are_refused_by_name(make, message, tmp_path):
  torch.save(make(), tmp_path / "f.pt")
  with pytest.raises(ValueError, match=message):
    read_torch(tmp_path / "f.pt")


def test_old_formats_are_refused_with_advice(tmp_path):
  torch.save({"a": torch.ones(1)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
  with pytest.raises(ValueError, match="PyTorch before 1.6; load it in PyTorch and save it again"):
    read_torch(tmp_path / "f.pt")


def test_a_checkpoint_of_pytorch_is_not_copied(tmp_path):
  torch.save({str(index): torch.ones(1 << 20) for index in range(20)}, tmp_path / "f.pt")
  tracemalloc.start()
  try:
    found = [leaf.read() for leaf in leaves(read_torch(tmp_path / "f.pt"))]
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert len(found) == 20 and peak < 1 << 20
  assert all(array.flags.aligned and not array.flags.writeable for array in found)
