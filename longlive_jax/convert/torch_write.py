"""Writes PyTorch `.pt` files without PyTorch; `torch.load(path, weights_only=True)` reads them."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np

from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_pickle import MOST_BYTES, MOST_DEPTH
from longlive_jax.convert.torch_tensor import DTYPES, MOST_AXES, TYPED_STORAGES, UNTYPED_STORAGE
from longlive_jax.io.atomic import replacing

FOLDER = "archive"
ALIGNMENT = 64  # of every record's bytes
DATE = (1980, 1, 1, 0, 0, 0)  # the same input gives the same bytes
PADDING = 0x4246  # the kind of the extra field that torch.save pads with
HEADER, WIDE_FIELD, FIELD = 30, 20, 4  # bytes of a record's header and of fields after its name
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_torch(path: str | Path, tree: object) -> None:
  """Writes a file that `torch.load` reads, with `mmap=True` as well.

  One tensor is held at a time, and the file appears under its name only when it is complete. The
  same tree gives the same bytes.

  Args:
    path: the file, usually `.pt` or `.pth`; an older one is replaced.
    tree: nested dicts (keys are texts), lists and tuples of tensors (`Stored` or arrays), texts,
      integers of at most 64 bits, floats, booleans and None.

  Raises:
    ValueError: the tree holds anything else or is nested too deep, or a tensor has a dtype that
      PyTorch lacks, or reads as another shape or dtype than it has.
    OSError: the place cannot be written.
  """
  pickled = Pickled()
  pickled.value(tree, "", 0)
  data = b"\x80\x02" + pickled.out.getvalue() + b"."
  if len(data) > MOST_BYTES:
    raise ValueError(f"the names and values take {len(data)} bytes; at most {MOST_BYTES} are read")
  with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
    add(archive, "data.pkl", data)
    add(archive, "byteorder", b"little")
    for index, (where, tensor) in enumerate(pickled.tensors):
      add(archive, f"data/{index}", numbers(where, tensor))
    add(archive, "version", b"3\n")


def numbers(where: str, tensor: Stored) -> memoryview:
  """The bytes of a tensor, row-major."""
  array = np.asarray(tensor.read())
  if array.shape != tensor.shape or array.dtype != tensor.dtype:
    raise ValueError(
      f"{where} reads as {array.dtype} {list(array.shape)};"
      f" it must be {tensor.dtype} {list(tensor.shape)}"
    )
  return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
  """Adds a record, padded before its bytes so that they are aligned."""
  info = zipfile.ZipInfo(f"{FOLDER}/{name}", DATE)
  wide = len(data) > zipfile.ZIP64_LIMIT
  before = archive.start_dir + HEADER + len(info.filename) + WIDE_FIELD * wide + FIELD
  padding = -before % ALIGNMENT
  info.extra = struct.pack("<2H", PADDING, padding) + b"Z" * padding
  with archive.open(info, "w", force_zip64=wide) as record:
    record.write(data)
  info.extra = b""  # the directory needs no padding


class Pickled:
  """The opcodes of a tree (protocol 2), and its tensors in the order of their records."""

  def __init__(self) -> None:
    self.out = io.BytesIO()
    self.tensors: list[tuple[str, Stored]] = []

  def value(self, value: object, where: str, depth: int) -> None:
    """Adds any value; `where` names it in messages."""
    if depth > MOST_DEPTH:
      raise ValueError(f"{where[:100]}... is nested more than {MOST_DEPTH} deep")
    if isinstance(value, np.ndarray):
      value = Stored.of(value)
    if isinstance(value, Stored):
      self.tensor(value, where)
    elif isinstance(value, dict):
      self.out.write(b"}(")
      for key, item in value.items():
        if not isinstance(key, str):
          raise ValueError(f"{where or 'the tree'} has the key {key!r}; it must be a text")
        self.text(key, where)
        self.value(item, f"{where}.{key}" if where else key, depth + 1)
      self.out.write(b"u")
    elif isinstance(value, list | tuple):
      self.out.write(b"](" if isinstance(value, list) else b"(")
      for index, item in enumerate(value):
        self.value(item, f"{where}[{index}]", depth + 1)
      self.out.write(b"e" if isinstance(value, list) else b"t")
    else:
      self.plain(value, where)

  def plain(self, value: object, where: str) -> None:
    """Adds a text, a number, a boolean or None."""
    if value is None or isinstance(value, bool):
      self.out.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif isinstance(value, int):
      self.integer(value, where)
    elif isinstance(value, float):
      self.out.write(b"G" + struct.pack(">d", value))
    elif isinstance(value, str):
      self.text(value, where)
    else:
      raise ValueError(
        f"{where or 'the tree'} is of type {type(value).__name__};"
        " it must be a tensor, a text, a number, a boolean, None, or a dict, list or tuple of them"
      )

  def integer(self, value: int, where: str) -> None:
    """Adds an integer."""
    if 0 <= value < 1 << 8:
      self.out.write(b"K" + bytes([value]))
    elif -(1 << 31) <= value < 1 << 31:
      self.out.write(b"J" + struct.pack("<i", value))
    elif -(1 << 63) <= value < 1 << 64:
      self.out.write(b"\x8a\x09" + int(value).to_bytes(9, "little", signed=True))
    else:
      raise ValueError(f"{where} is an integer of more than 64 bits")

  def text(self, value: str, where: str) -> None:
    """Adds a text."""
    try:
      data = value.encode()
    except UnicodeEncodeError:
      raise ValueError(f"{where or 'the tree'} has the text {value!r}, which is no UTF-8") from None
    self.out.write(b"X" + struct.pack("<I", len(data)) + data)

  def name(self, name: str) -> None:
    """Adds a name such as "torch.float32"."""
    module, _, last = name.rpartition(".")
    self.out.write(f"c{module}\n{last}\n".encode())

  def tensor(self, tensor: Stored, where: str) -> None:
    """Adds a tensor, whose numbers stand in a record of their own."""
    where = where or "the tensor"
    dtype = NAMES.get(tensor.dtype)
    if dtype is None or len(tensor.shape) > MOST_AXES:
      raise ValueError(
        f"{where} is {tensor.dtype} with {len(tensor.shape)} axes; the dtype must be one of"
        f" {', '.join(map(str, NAMES))}, and the axes at most {MOST_AXES}"
      )
    storage = TYPED_STORAGES.get(dtype)
    sizes = [int(size) for size in tensor.shape]
    count = tensor.nbytes // (tensor.dtype.itemsize if storage else 1)
    strides, step = [0] * len(sizes), 1
    for axis in reversed(range(len(sizes))):
      strides[axis] = step
      step *= max(sizes[axis], 1)
    self.name(f"torch._utils._rebuild_tensor_v{2 if storage else 3}")
    self.out.write(b"((")
    self.text("storage", where)
    self.name(storage or UNTYPED_STORAGE)
    self.text(str(len(self.tensors)), where)
    self.text("cpu", where)
    self.integer(count, where)
    self.out.write(b"tQK\x00")  # the end of the storage; the offset
    for group in (sizes, strides):
      self.out.write(b"(")
      for size in group:
        self.integer(size, where)
      self.out.write(b"t")
    self.out.write(b"\x89")  # needs no gradient
    self.name("collections.OrderedDict")
    self.out.write(b")R")  # no hooks
    if not storage:
      self.name(dtype)
    self.out.write(b"tR")
    self.tensors.append((where, tensor))
