"""PyTorch `.pt` and `.pth` files (`torch.save` since PyTorch 1.6), read without PyTorch.

Such a file is a zip of uncompressed records: a pickle, and one record of numbers a storage. The
file is mapped and never extracted. The zip is read strictly: what two readers could understand
differently (a gap at its end, records that overlap, headers that disagree) is refused.
"""

import dataclasses
import functools
import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_pickle import MOST_BYTES, load_pickle
from longlive_jax.convert.torch_tensor import View, read_view, short

END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
FULL_16, FULL = 0xFFFF, 0xFFFFFFFF  # the value stands in a 64-bit field
ENCRYPTED, SIZES_FOLLOW, UTF_8 = 1, 8, 0x800  # flags
LINK, KIND = 0o120000, 0o170000  # of a Unix mode
MOST_ENTRIES = 100_000
MOST_DIRECTORY = 1 << 24  # bytes
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save wrote first before PyTorch 1.6
AGAIN = "load it in PyTorch and save it again with torch.save"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """One record as the directory of the zip gives it; `header` and `start` are positions."""

  name: str
  flags: int
  method: int
  crc: int
  packed: int
  size: int
  header: int
  mode: int
  start: int = 0

  @property
  def end(self) -> int:
    """The position after its bytes."""
    return self.start + self.size


def read_torch(path: str | Path) -> object:
  """Opens a file of `torch.save`; reads the names and shapes, but no tensor.

  Nothing in the file can run: see `torch_pickle`. The bytes of tensors are not compared with
  their checksums.

  Args:
    path: a `.pt`, `.pth` or `.bin` file; it must not change while tensors are read.

  Returns:
    What was saved: nested dicts, lists and tuples of `Stored`, texts, numbers, booleans and None.
    Parameters are tensors. Arrays are read-only views of the file if stored row-major.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, of another format, or holds anything else; names the file.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"PyTorch file '{path}' does not exist")
  try:
    with path.open("rb") as file:
      check_format(file.read(512))
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return read_records(data)
  except ValueError as error:
    raise ValueError(f"'{path}' {error}") from error


def check_format(head: bytes) -> None:
  """Raises ValueError unless a file begins as a zip does."""
  if not head:
    raise ValueError("is empty; copy it again")
  if LEGACY in head[:64]:
    raise ValueError(f"is in the format of PyTorch before 1.6; {AGAIN}")
  if head[257:262] == b"ustar":
    raise ValueError(f"is a tar file, of PyTorch before 0.1.10 or of another program; {AGAIN}")
  if head.startswith(b"\x80"):
    raise ValueError(f"is a bare pickle, which could run anything; {AGAIN}")
  if not head.startswith(b"PK\x03\x04"):
    raise ValueError("is not a file of torch.save: it does not begin as a zip does")


def read_records(data: mmap.mmap) -> object:
  """The tree of a mapped file."""
  entries, prefix = check_entries(data, *directory_span(data))
  order = entries.get(f"{prefix}byteorder")
  if order is not None and (found := data[order.start : order.end][:16]) != b"little":
    raise ValueError(f"has byte order {found!r}; it must be b'little': save it on such a machine")

  def make(view: View) -> Stored:
    key, itemsize = view.storage.key, view.storage.dtype.itemsize
    entry = entries.get(f"{prefix}data/{key}")
    if entry is None:
      raise ValueError(f"has no record for storage {short(key)}")
    if entry.size != view.storage.count * itemsize:
      raise ValueError(
        f"has {entry.size} bytes for storage {short(key)};"
        f" {view.storage.count} numbers of {itemsize} bytes are declared"
      )
    return Stored(view.shape, view.dtype, functools.partial(read_view, data, entry.start, view))

  entry = entries[f"{prefix}data.pkl"]
  if entry.size > MOST_BYTES:
    raise ValueError(f"has a pickle of {entry.size} bytes; at most {MOST_BYTES} are read")
  pickle = data[entry.start : entry.end]
  if zlib.crc32(pickle) != entry.crc:
    raise ValueError("has a pickle that does not agree with its checksum; copy it again")
  return load_pickle(pickle, make)


def directory_span(data: mmap.mmap) -> tuple[int, int, int]:
  """(number of entries, first byte, byte after the last) of the directory at the zip's end."""
  end = len(data) - END.size
  if end < 0 or data[end : end + 4] != b"PK\x05\x06" or data[end + 20 :] != b"\0\0":
    raise ValueError("is cut short, or something follows its end; copy it again")
  _, disk, first_disk, here, count, size, begin, _ = END.unpack_from(data, end)
  locator = end - LOCATOR_64.size
  if locator >= END_64.size and data[locator : locator + 4] == b"PK\x06\x07":
    narrow = (disk, first_disk, here, count, size, begin)
    _, locator_disk, end, disks = LOCATOR_64.unpack_from(data, locator)
    if locator_disk or disks != 1 or end != locator - END_64.size:
      raise ValueError("has a damaged directory: its 64-bit end is not where it must be")
    signature, rest, _, _, *wide = END_64.unpack_from(data, end)
    full = (FULL_16, FULL_16, FULL_16, FULL_16, FULL, FULL)
    agree = all(a in (b, c) for a, b, c in zip(narrow, wide, full, strict=True))
    if signature != b"PK\x06\x06" or rest != END_64.size - 12 or not agree:
      raise ValueError("has a damaged directory: its two ends disagree")
    disk, first_disk, here, count, size, begin = wide
  if disk or first_disk or here != count:
    raise ValueError("is one part of a zip of several parts")
  if count > MOST_ENTRIES or size > MOST_DIRECTORY:
    raise ValueError(f"has {count} records ({size} bytes); at most {MOST_ENTRIES} are read")
  if begin + size != end:
    raise ValueError("has a damaged directory: it is not where its end says")
  return count, begin, end


def listed(data: mmap.mmap, count: int, begin: int, end: int) -> Iterator[Entry]:
  """Yields the entries of the directory."""
  at = begin
  for _ in range(count):
    if at + CENTRAL.size > end:
      raise ValueError("has a damaged directory: it ends within an entry")
    signature, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, mode, header = (
      CENTRAL.unpack_from(data, at)
    )
    name_end = at + CENTRAL.size + lengths[0]
    following = name_end + lengths[1] + lengths[2]
    if signature != b"PK\x01\x02" or following > end or disk:
      raise ValueError("has a damaged directory: it holds what is not an entry")
    name = decoded(data[at + CENTRAL.size : name_end])
    extra = data[name_end : name_end + lengths[1]]
    size, packed, header = wide_values(name, (size, packed, header), extra)
    yield Entry(name, flags, method, crc, packed, size, header, mode >> 16)
    at = following
  if at != end:
    raise ValueError("has a damaged directory: it holds more than its entries")


def decoded(name: bytes) -> str:
  """The name of a record."""
  try:
    text = name.decode()
  except UnicodeDecodeError:
    raise ValueError(f"has a record whose name {name[:50]!r} is not UTF-8") from None
  if not text or text[0] == "/" or "\\" in text or "\0" in text or ".." in text.split("/"):
    raise ValueError(f"has a record named {short(text)}, which leads out of the file")
  return text


def wide_values(name: str, values: tuple[int, ...], extra: bytes) -> list[int]:
  """Puts the 64-bit numbers of an extra field where 32 bits were too few."""
  widened, at = list(values), 0
  fields = [index for index, value in enumerate(values) if value == FULL]
  while fields:
    if at + 4 > len(extra):
      raise ValueError(f"has a damaged record {short(name)}: its 64-bit size or place is missing")
    kind, length = struct.unpack_from("<2H", extra, at)
    at += 4
    if kind == 1:
      if min(length, len(extra) - at) < 8 * len(fields):
        raise ValueError(f"has a damaged record {short(name)}: its 64-bit field is too short")
      for place, index in enumerate(fields):
        (widened[index],) = struct.unpack_from("<Q", extra, at + 8 * place)
      break
    at += length
  return widened


def check_entries(
  data: mmap.mmap, count: int, begin: int, end: int
) -> tuple[dict[str, Entry], str]:
  """The records by name, all checked, and the folder that they are in ("archive/")."""
  entries: dict[str, Entry] = {}
  for entry in listed(data, count, begin, end):
    if entry.name in entries:
      raise ValueError(f"has two records named {short(entry.name)}")
    entries[entry.name] = entry
  folders = [name[:-8] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(folders) != 1:
    raise ValueError(f"is a zip with {len(folders)} records 'data.pkl' in a folder; it must have 1")
  folder = folders[0]
  if f"{folder}constants.pkl" in entries or any(
    name.startswith(f"{folder}code/") for name in entries
  ):
    raise ValueError(
      "is a TorchScript archive; load it in PyTorch with torch.jit.load and save its state_dict()"
    )
  entries = {name: located(data, entry, begin) for name, entry in entries.items()}
  last = 0
  for entry in sorted(entries.values(), key=lambda entry: entry.header):
    if entry.header < last:
      raise ValueError(f"has records that overlap: {short(entry.name)} and the one before it")
    last = entry.end
  return entries, folder


def located(data: mmap.mmap, entry: Entry, limit: int) -> Entry:
  """An entry with the place of its bytes, once it and its own header are checked."""
  name = short(entry.name)
  if entry.flags & ENCRYPTED:
    raise ValueError(f"has an encrypted record {name}; {AGAIN}")
  if entry.method or entry.packed != entry.size:
    raise ValueError(f"has a compressed record {name}; torch.save compresses none: {AGAIN}")
  if entry.flags & ~(SIZES_FOLLOW | UTF_8):
    raise ValueError(f"has a record {name} with unknown flags {entry.flags:#x}")
  if entry.mode & KIND == LINK:
    raise ValueError(f"has a record {name} that is a link to another file")
  if entry.header + LOCAL.size > limit:
    raise ValueError(f"has a record {name} outside of the file; copy it again")
  signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = (
    LOCAL.unpack_from(data, entry.header)
  )
  name_at = entry.header + LOCAL.size
  extra_at = name_at + name_length
  start = extra_at + extra_length
  if start + entry.size > limit:
    raise ValueError(f"has a record {name} outside of the file; copy it again")
  size, packed = wide_values(entry.name, (size, packed), data[extra_at:start])
  pairs = ((crc, entry.crc), (packed, entry.packed), (size, entry.size))
  later = bool(flags & SIZES_FOLLOW)  # zeros here then
  if (
    signature != b"PK\x03\x04"
    or (flags, method) != (entry.flags, entry.method)
    or data[name_at:extra_at] != entry.name.encode()
    or any(found != listed and not (later and found == 0) for found, listed in pairs)
  ):
    raise ValueError(f"has a record {name} whose own header disagrees with the directory")
  return dataclasses.replace(entry, start=start)
