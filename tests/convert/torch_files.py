"""PyTorch files made by hand: pickles from opcodes, and zips whose every field can lie."""

import dataclasses
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longlive_jax.convert.stored import Stored

PROTO, STOP = b"\x80\x02", b"."
V2, V3 = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
FLOATS = np.arange(6, dtype=np.float32).tobytes()


def text(value: str) -> bytes:
  """BINUNICODE."""
  data = value.encode("utf-8", "surrogatepass")
  return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
  """LONG1 of any integer up to 255 bytes."""
  data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
  return b"\x8a" + bytes([len(data)]) + data


def name(value: str) -> bytes:
  """GLOBAL of "module name"."""
  return b"c" + value.replace(" ", "\n").encode() + b"\n"


def group(*items: bytes) -> bytes:
  """TUPLE of items."""
  return b"(" + b"".join(items) + b"t"


def numbers(values: Sequence[int]) -> bytes:
  """A tuple of integers."""
  return group(*map(number, values))


def call(called: str, *args: bytes) -> bytes:
  """REDUCE of a name."""
  return name(called) + group(*args) + b"R"


def mapping(**items: bytes) -> bytes:
  """A dict."""
  return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(kind: str = "torch FloatStorage", key: str = "0", count: int = 6) -> bytes:
  """The persistent id of a storage."""
  return group(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
  shape: Sequence[int] = (2, 3),
  strides: Sequence[int] = (3, 1),
  offset: int = 0,
  held: bytes | None = None,
  rest: Sequence[bytes] = (),
) -> bytes:
  """A tensor of the six floats of storage 0, or of another storage."""
  hooks = call("collections OrderedDict")
  args = (held or storage(), number(offset), numbers(shape), numbers(strides), b"\x89", hooks)
  return call(V3 if rest else V2, *args, *rest)


def pickled(*values: bytes, proto: bytes = PROTO, stop: bytes = STOP) -> bytes:
  """A whole pickle."""
  return proto + b"".join(values) + stop


@dataclasses.dataclass
class Record:
  """A record of a zip; `central` and `local` replace fields of its two headers."""

  name: str | bytes
  data: bytes = b""
  central: dict = dataclasses.field(default_factory=dict)
  local: dict = dataclasses.field(default_factory=dict)
  extra: bytes = b""
  after: bytes = b""

  @property
  def raw_name(self) -> bytes:
    """The name's bytes."""
    return self.name if isinstance(self.name, bytes) else self.name.encode()

  def fields(self, changes: dict) -> dict:
    """The fields of a header."""
    size = len(self.data)
    honest = {"sign": None, "flags": 0, "method": 0, "crc": zlib.crc32(self.data), "packed": size}
    return honest | {"size": size, "name": self.raw_name, "attr": 0, "disk": 0} | changes

  def header(self) -> bytes:
    """The header before the data."""
    f = self.fields(self.local)
    lengths = (len(f["name"]), f.get("extra_length", len(self.extra)))
    sizes = (f["crc"], f["packed"], f["size"], *lengths)
    sign = f["sign"] or b"PK\3\4"
    return struct.pack("<4s5H3L2H", sign, 20, f["flags"], f["method"], 0, 0, *sizes) + f["name"]

  def entry(self, at: int) -> bytes:
    """The entry of the directory."""
    f = self.fields(self.central)
    extra = f.get("extra", b"")
    lengths = (len(f["name"]), f.get("extra_length", len(extra)), 0)
    sizes = (f["crc"], f["packed"], f["size"], *lengths)
    place = (f["disk"], 0, f["attr"], f.get("offset", at))
    start = (f["sign"] or b"PK\1\2", 20, 20, f["flags"], f["method"], 0, 0)
    return struct.pack("<4s6H3L5H2L", *start, *sizes, *place) + f["name"] + extra


def zipped(records: Sequence[Record], *, gap: bytes = b"", **end: int | bytes) -> bytes:
  """A zip; `gap` stands before its directory, `end` replaces fields of its end."""
  body, directory = b"", b""
  for record in records:
    directory += record.entry(len(body))
    body += record.header() + record.extra + record.data + record.after
  body += gap
  fields = {"count": len(records), "size": len(directory), "begin": len(body), "comment": b""}
  fields |= {"here": len(records), "disk": 0} | end
  counts = (fields["disk"], 0, fields["here"], fields["count"])
  place = (fields["size"], fields["begin"], len(fields["comment"]))
  return body + directory + struct.pack("<4s4H2LH", b"PK\5\6", *counts, *place) + fields["comment"]


def widened(data: bytes, hole: int = 0) -> bytes:
  """A zip with the 64-bit end that `torch.save` always writes; `hole` bytes stand before it."""
  here, count, size, begin = struct.unpack_from("<2H2L", data, len(data) - 14)
  wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, here, count, size, begin + hole)
  locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22 + hole, 1)
  place = 0xFFFFFFFF if hole else begin
  end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, here, count, size, place, 0)
  return data[:-22] + wide + locator + end


def archive(
  pickle: bytes | None = None, *more: Record, data: bytes = FLOATS, folder: str = "a"
) -> list[Record]:
  """The records of a file whose tree is one tensor, or another pickle."""
  return [
    Record(f"{folder}/data.pkl", pickled(tensor()) if pickle is None else pickle),
    Record(f"{folder}/byteorder", b"little"),
    Record(f"{folder}/data/0", data),
    Record(f"{folder}/version", b"3\n"),
    *more,
  ]


def saved(pickle: bytes | None = None, *more: Record, **options) -> bytes:
  """A file as `archive` describes it."""
  return zipped(archive(pickle, *more, **options))


def written(path: Path, data: bytes) -> Path:
  """A file with these bytes."""
  path.write_bytes(data)
  return path


def leaves(tree: object) -> list[Stored]:
  """All tensors of a tree."""
  if isinstance(tree, dict):
    tree = list(tree.values())
  if isinstance(tree, list | tuple):
    return [leaf for item in tree for leaf in leaves(item)]
  return [tree] if isinstance(tree, Stored) else []


def bits(array: np.ndarray) -> bytes:
  """The bytes of an array."""
  return np.ascontiguousarray(array).tobytes()
