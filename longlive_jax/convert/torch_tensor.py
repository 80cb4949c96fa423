"""Tensors of PyTorch files: their dtypes, and what a view of a storage must fulfil.

All errors are `ValueError`s whose text continues a sentence that starts with the file's name.
"""

import dataclasses
import math
import mmap

import ml_dtypes
import numpy as np

MOST_AXES = 32
MOST_TEXT = 100  # characters of a storage's key, of a device, of a text in a message
MOST_REPEATED = 1 << 26  # bytes of a tensor that repeats numbers of a smaller storage

DTYPES: dict[str, np.dtype] = {
  f"torch.{name}": np.dtype(kind)
  for name, kind in {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
  }.items()
}
TYPED_STORAGES = {  # the dtypes that have a storage of their own; others are stored as bytes
  "torch.float64": "torch.DoubleStorage",
  "torch.float32": "torch.FloatStorage",
  "torch.float16": "torch.HalfStorage",
  "torch.bfloat16": "torch.BFloat16Storage",
  "torch.int64": "torch.LongStorage",
  "torch.int32": "torch.IntStorage",
  "torch.int16": "torch.ShortStorage",
  "torch.int8": "torch.CharStorage",
  "torch.uint8": "torch.ByteStorage",
  "torch.bool": "torch.BoolStorage",
}
UNTYPED_STORAGE = "torch.storage.UntypedStorage"
STORAGES: dict[str, np.dtype] = {name: DTYPES[key] for key, name in TYPED_STORAGES.items()} | {
  UNTYPED_STORAGE: np.dtype(np.uint8),
  "torch.UntypedStorage": np.dtype(np.uint8),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
  """A name that the pickle asks for."""

  text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
  """A record of numbers: its key, how many numbers, and their dtype (uint8 where untyped)."""

  key: str
  count: int
  dtype: np.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class View:
  """A tensor within its storage; offset and strides count numbers of `dtype`."""

  storage: Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def short(value: object) -> str:
  """A text of the file for a message: one line, of bounded length."""
  text = value if isinstance(value, str) else type(value).__name__
  return repr(text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "...")


def is_size(value: object) -> bool:
  """Whether a value is an integer from 0 to 2^63 - 1."""
  return type(value) is int and 0 <= value < 1 << 63


def sizes(value: object, what: str) -> tuple[int, ...]:
  """A tuple of sizes, checked."""
  if not isinstance(value, tuple) or len(value) > MOST_AXES or not all(map(is_size, value)):
    raise ValueError(
      f"has a tensor whose {what} is not a tuple of at most {MOST_AXES} integers from 0 to 2^63 - 1"
    )
  return value


def storage_of(value: object) -> Storage:
  """The storage that a persistent id `("storage", type, key, device, count)` names."""
  if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
    raise ValueError("has a reference that is not to the storage of a tensor")
  _, kind, key, device, count = value
  if not isinstance(kind, Name) or kind.text not in STORAGES:
    raise ValueError("has a storage of no known type")
  if not isinstance(key, str) or len(key) > MOST_TEXT or not isinstance(device, str):
    raise ValueError(f"has a storage whose key is not a text of at most {MOST_TEXT} characters")
  if not is_size(count):
    raise ValueError(f"has a storage {short(key)} whose size is not an integer from 0 to 2^63 - 1")
  return Storage(key, count, STORAGES[kind.text])


def view_of(args: tuple, dtype: Name | None) -> View:
  """The tensor that `(storage, offset, shape, strides)` gives, within its storage."""
  storage, offset, shape, strides = args
  if not isinstance(storage, Storage):
    raise ValueError("has a tensor without a storage")
  if dtype is not None and (not isinstance(dtype, Name) or dtype.text not in DTYPES):
    raise ValueError("has a tensor of no known dtype")
  kind = storage.dtype if dtype is None else DTYPES[dtype.text]
  size = storage.count * storage.dtype.itemsize
  shape, strides = sizes(shape, "shape"), sizes(strides, "stride")
  where = f"has a tensor {list(shape)} of storage {short(storage.key)}"
  if len(shape) != len(strides) or not is_size(offset):
    raise ValueError(f"{where} whose offset or strides are wrong")
  if math.prod(max(axis, 1) for axis in shape) * kind.itemsize >= 1 << 62:
    raise ValueError(f"{where} that is too large")
  last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
  empty = 0 in shape
  if not empty and (last + 1) * kind.itemsize > size:
    raise ValueError(f"{where} that needs {(last + 1) * kind.itemsize} bytes; it has {size}")
  if not empty and math.prod(shape) * kind.itemsize > max(size, MOST_REPEATED):
    raise ValueError(f"{where} ({size} bytes) that repeats it too often; save its contiguous()")
  return View(storage, kind, 0 if empty else offset, shape, strides)


def read_view(data: mmap.mmap, start: int, view: View) -> np.ndarray:
  """The numbers of a tensor, row-major.

  Args:
    data: the file.
    start: where the storage's bytes begin in it.
    view: lies within them.

  Returns:
    A read-only view of the file if the tensor is stored row-major, else a copy.
  """
  if 0 in view.shape:
    return np.empty(view.shape, view.dtype)
  itemsize = view.dtype.itemsize
  expected, row_major = 1, True
  steps = []
  for size, step in zip(reversed(view.shape), reversed(view.strides), strict=True):
    row_major &= size == 1 or step == expected
    expected *= size
    steps.insert(0, 0 if size == 1 else step * itemsize)
  place = start + view.offset * itemsize
  if row_major:  # all of it is wanted: reading it ahead is faster than page by page
    page = place - place % mmap.PAGESIZE
    data.madvise(mmap.MADV_WILLNEED, page, place + math.prod(view.shape) * itemsize - page)
  array = np.ndarray(view.shape, view.dtype, data, place, None if row_major else steps)
  return array if row_major and array.flags.aligned else array.copy(order="C")
