"""PyTorch files are read without PyTorch; those that could do harm, or lie, are refused."""

import io
import os
import pickle
import re
import stat
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.convert import torch_pickle, torch_zip
from longlive_jax.convert.torch_zip import read_torch
from tests.convert.torch_files import (
  FLOATS,
  PROTO,
  V2,
  Record,
  archive,
  bits,
  call,
  group,
  leaves,
  mapping,
  name,
  number,
  numbers,
  pickled,
  saved,
  storage,
  tensor,
  text,
  widened,
  written,
  zipped,
)

MARKER = "executed"  # what a payload would make
PEAK = 64 << 20  # bytes that no refusal may need
RUN = f"touch {MARKER}"


def run(module: str, called: str, argument: str = RUN) -> bytes:
  """A call of any function with one text."""
  return saved(pickled(name(f"{module} {called}"), group(text(argument)), b"R"))


def with_record(**changes) -> bytes:
  """A file whose storage has other fields in both headers."""
  records = archive()
  for key, value in changes.items():
    setattr(records[2], key, value)
  return zipped(records)


def with_end(**changes) -> bytes:
  """A file with other fields at the end of the zip."""
  return zipped(archive(), **changes)


def wide_end(at: int, value: int) -> bytes:
  """A file whose 64-bit end has another number `at` bytes after its start."""
  data = bytearray(widened(saved()))
  struct.pack_into("<Q", data, data.index(b"PK\6\6") + at, value)
  return bytes(data)


def tar() -> bytes:
  """A tar file."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as file:
    file.addfile(tarfile.TarInfo("storages"))
  return out.getvalue()


def deflated() -> bytes:
  """A zip bomb: 200 MB of zeros in 200 kB."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
    file.writestr("a/data.pkl", pickled(tensor()))
    with file.open("a/data/0", "w") as record:
      for _ in range(50):
        record.write(bytes(4 << 20))
  return out.getvalue()


def cut(share: float) -> bytes:
  """A file that ends early."""
  data = saved()
  return data[: int(len(data) * share)]


def view(shape: list[int], strides: list[int], offset: int = 0) -> bytes:
  """A file of one tensor of six floats."""
  return saved(pickled(tensor(shape, strides, offset)))


def held(kind: str = "torch FloatStorage", key: str = "0", count: int = 6) -> bytes:
  """A file of one tensor of another storage."""
  return saved(pickled(tensor(held=storage(kind, key, count))))


def laughs() -> bytes:
  """Lists of ten lists of ten lists: 10^30 values in a few hundred bytes."""
  lists = [b"]q\x00(" + b"N" * 10 + b"e"]
  for index in range(1, 30):
    lists.append(b"]q" + bytes([index]) + b"(" + (b"h" + bytes([index - 1])) * 10 + b"e")
  return saved(pickled(b"(", *lists, b"t"))


ONLY = "only tensors are read from a .pt file"
OPCODE = "uses the pickle opcode"
HEADER = "own header disagrees"
HOSTILE = {
  # what would run
  "os.system": (lambda: run("os", "system"), f"asks for 'os.system'; {ONLY}"),
  "posix.system": (lambda: run("posix", "system"), "'posix.system'"),
  "nt.system": (lambda: run("nt", "system"), "'nt.system'"),
  "subprocess": (lambda: run("subprocess", "getoutput"), "'subprocess.getoutput'"),
  "eval": (lambda: run("builtins", "eval", f"open('{MARKER}', 'w')"), "'builtins.eval'"),
  "exec": (lambda: run("__builtin__", "exec", f"open('{MARKER}', 'w')"), "'__builtin__.exec'"),
  "getattr": (lambda: run("builtins", "getattr"), "'builtins.getattr'"),
  "partial": (lambda: run("functools", "partial"), "'functools.partial'"),
  "open": (lambda: run("io", "open", MARKER), "'io.open'"),
  "hub": (lambda: run("torch.hub", "load"), "'torch.hub.load'"),
  "load": (lambda: run("torch", "load", MARKER), "'torch.load'"),
  "import": (lambda: saved(pickled(name("antigravity x"))), "'antigravity.x'"),
  "dotted": (lambda: run("torch", "_utils.os.system"), "'torch._utils.os.system'"),
  "reduced class": (lambda: saved(pickle.dumps(Payload(), 2)), "'os.system'|'posix.system'"),
  "reduced class 4": (lambda: saved(pickle.dumps(Payload(), 4)), "'os.system'|'posix.system'"),
  "stack global": (
    lambda: saved(pickled(text("os"), text("system"), b"\x93", text(RUN), b"\x85R")),
    "'os.system'",
  ),
  "line break in a name": (
    lambda: saved(pickled(text("a\nb"), text("c\r\nd"), b"\x93")),
    "asks for 'a.nb.c",
  ),
  "long name": (lambda: saved(pickled(text("a" * 10**6), text("b"), b"\x93")), "asks for 'aaa"),
  "stack global of numbers": (lambda: saved(pickled(b"K\x01K\x02\x93")), "a name is not a text"),
  "instance": (lambda: saved(pickled(b"(", text(RUN), b"ios\nsystem\n")), f"{OPCODE} INST"),
  "object": (lambda: saved(pickled(b"(", name("torch Size"), b"o")), f"{OPCODE} OBJ"),
  "new object": (lambda: saved(pickled(name("torch Size"), b")\x81")), f"{OPCODE} NEWOBJ"),
  "new object ex": (lambda: saved(pickled(name("torch Size"), b")}\x92")), f"{OPCODE} NEWOBJ_EX"),
  "extension 1": (lambda: saved(pickled(b"\x82\x01")), f"{OPCODE} EXT1"),
  "extension 4": (lambda: saved(pickled(b"\x84\x01\0\0\0")), f"{OPCODE} EXT4"),
  "text id": (lambda: saved(pickled(b"P0\n")), f"{OPCODE} PERSID"),
  "bytes": (lambda: saved(pickled(b"C\x01a")), f"{OPCODE} SHORT_BINBYTES"),
  "buffer": (lambda: saved(pickled(b"\x97")), f"{OPCODE} NEXT_BUFFER"),
  "state of a tensor": (lambda: saved(pickled(tensor(), b"}b")), "sets the state"),
  "state of a list": (lambda: saved(pickled(b"]}b")), "sets the state"),
  "state of a name": (lambda: saved(pickled(name("torch Size"), b"}b")), "sets the state"),
  "call of a text": (lambda: saved(pickled(text("torch.Size"), b")R")), "calls what has no name"),
  "call of a dtype": (lambda: saved(pickled(name("torch float32"), b")R")), "with 0 arguments"),
  "subclass": (lambda: run("torch._tensor", "_rebuild_from_type_v2"), "_rebuild_from_type_v2"),
  "quantised": (lambda: run("torch._utils", "_rebuild_qtensor"), "_rebuild_qtensor"),
  "sparse": (lambda: run("torch._utils", "_rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
  "complex": (lambda: held("torch ComplexFloatStorage"), "torch.ComplexFloatStorage"),
  # pickles that are damaged or too much
  "empty pickle": (lambda: saved(b""), "damaged or cut short"),
  "no stop": (lambda: saved(PROTO + tensor()), "damaged or cut short"),
  "nothing": (lambda: saved(PROTO + b"."), "a value is missing"),
  "two values": (lambda: saved(pickled(b"NN")), "left at its end"),
  "mark left": (lambda: saved(pickled(b"N(N")), "left at its end"),
  "after the end": (lambda: saved(pickled(b"N") + b"junk"), "left at its end"),
  "two pickles": (lambda: saved(pickled(b"N") * 2), "left at its end"),
  "protocol 9": (lambda: saved(b"\x80\x09N."), "protocol 9"),
  "second protocol": (lambda: saved(pickled(PROTO, b"N")), "at byte 2"),
  "unknown opcode": (lambda: saved(pickled(b"\xff")), "damaged or cut short"),
  "tuple of nothing": (lambda: saved(pickled(b"\x87")), "a value is missing"),
  "below the mark": (lambda: saved(pickled(b"N(\x85")), "a value is missing"),
  "no mark": (lambda: saved(pickled(b"Nt")), "a mark is missing"),
  "unknown memory": (lambda: saved(pickled(b"h\x05")), "no value 5"),
  "huge memory": (lambda: saved(pickled(b"Nr\xff\xff\xff\xff")), "4294967295 is remembered"),
  "memory of nothing": (lambda: saved(pickled(b"\x94")), "a value is missing"),
  "append to a dict": (lambda: saved(pickled(b"}Na")), "not a list"),
  "items of a list": (lambda: saved(pickled(b"]NNs")), "without a dict"),
  "key without value": (lambda: saved(pickled(b"}(Nu")), "without a dict, or a key"),
  "key is a list": (lambda: saved(pickled(b"}]Ns")), "key of type 'list'"),
  "key is a tuple": (lambda: saved(pickled(b"})Ns")), "key of type 'tuple'"),
  "key is a deep tuple": (lambda: saved(pickled(b"})", b"\x85" * 200_000, b"Ns")), "'tuple'"),
  "key is a tensor": (lambda: saved(pickled(b"}", tensor(), b"Ns")), "key of type 'Stored'"),
  "deep tuples": (lambda: saved(pickled(b")", b"\x85" * 200_000)), "more than 100 deep"),
  "deep lists": (lambda: saved(pickled(b"]" * 100_000, b"a" * 99_999)), "more than 100 deep"),
  "list in itself": (lambda: saved(pickled(b"]q\x00h\x00a")), "more than 100 deep"),
  "dict in itself": (lambda: saved(pickled(b"}q\x00Nh\x00s")), "more than 100 deep"),
  "laughs": (laughs, "more than 500000 values"),
  "many opcodes": (lambda: saved(pickled(b"](", b"N" * 1_000_000, b"e")), "1000000 opcodes"),
  "many marks": (lambda: saved(pickled(b"(" * 2_000_000)), "1000000 opcodes"),
  "large pickle": (lambda: saved(pickled(b"N" * 20_000_000)), "a pickle of 20000003 bytes"),
  "huge text": (lambda: saved(pickled(b"\x8d" + b"\xff" * 7 + b"\x7f")), "damaged or cut"),
  "huge text 4": (lambda: saved(pickled(b"X\xff\xff\xff\xff")), "damaged or cut"),
  "huge bytes": (lambda: saved(pickled(b"\x96" + b"\xff" * 7 + b"\x7f")), "damaged or cut"),
  "huge bytes 8": (lambda: saved(pickled(b"\x8e" + b"\xff" * 8)), "damaged or cut"),
  "huge frame": (lambda: saved(pickled(b"\x95", b"\xff" * 7)), "damaged or cut"),
  "huge integer": (lambda: saved(pickled(b"\x8b\xff\xff\xff\x7f")), "damaged or cut"),
  "negative length": (lambda: saved(pickled(b"\x8b\xff\xff\xff\xff")), "damaged or cut"),
  "wide integer": (lambda: saved(pickled(number(1 << 64))), "more than 64 bits"),
  "very wide integer": (
    lambda: saved(pickled(b"\x8b" + struct.pack("<i", 10**6), b"\x7f" * 10**6)),
    "more than 64 bits",
  ),
  "many digits": (lambda: saved(pickled(b"I" + b"9" * 10**5 + b"\n")), "damaged or cut"),
  "wrong float": (lambda: saved(pickled(b"F" + b"x" * 10**5 + b"\n")), "damaged or cut"),
  "text not UTF-8": (lambda: saved(pickled(b"X\x01\0\0\0\xff")), "damaged or cut"),
  "name not ASCII": (lambda: saved(pickled(b"c\xff\nx\n")), "damaged|asks"),
  "long device": (
    lambda: saved(pickled(call("torch device", text("c" * 1000)))),
    "a damaged device",
  ),
  "storage as a value": (lambda: saved(pickled(storage())), "where a tensor or a value belongs"),
  "name as a value": (lambda: saved(pickled(name("torch Size"))), "where a tensor or a value"),
  # tensors outside of their storage
  "reference to nothing": (lambda: saved(pickled(b"NQ")), "not to the storage"),
  "reference to a module": (
    lambda: saved(pickled(group(text("module"), text("os"), b"NNN"), b"Q")),
    "not to the storage",
  ),
  "storage without a type": (
    lambda: saved(
      pickled(group(text("storage"), text("x"), text("0"), text("cpu"), b"K\x06"), b"Q")
    ),
    "no known type",
  ),
  "no storage": (lambda: saved(pickled(tensor(held=b"N"))), "without a storage"),
  "unknown storage": (lambda: held(key="7"), "no record for storage '7'"),
  "storage elsewhere": (lambda: held(key="../data.pkl"), "no record for storage '../data.pkl'"),
  "long key": (lambda: held(key="0" * 10**6), "a text of at most 100"),
  "too few bytes": (lambda: held(count=7), "has 24 bytes for storage '0'; 7 numbers of 4 bytes"),
  "too many bytes": (lambda: held("torch DoubleStorage"), "6 numbers of 8 bytes"),
  "negative count": (lambda: held(count=-6), "not an integer from 0"),
  "huge count": (lambda: held(count=1 << 62), "24 bytes for storage"),
  "count is true": (
    lambda: saved(
      pickled(
        tensor(
          held=group(text("storage"), name("torch FloatStorage"), text("0"), text("cpu"), b"\x88")
          + b"Q"
        )
      )
    ),
    "not an integer from 0",
  ),
  "too many rows": (lambda: view([3, 3], [3, 1]), "needs 36 bytes; it has 24"),
  "offset too far": (lambda: view([2, 3], [3, 1], 1), "needs 28 bytes"),
  "negative offset": (lambda: view([1], [1], -1), "offset or strides are wrong"),
  "huge offset": (lambda: view([1], [1], (1 << 63) - 1), "needs"),
  "offset too wide": (lambda: view([1], [1], 1 << 63), "offset or strides are wrong"),
  "negative stride": (lambda: view([2], [-1], 3), "stride is not a tuple"),
  "huge stride": (lambda: view([2], [(1 << 63) - 1]), "needs"),
  "negative shape": (lambda: view([-1], [1]), "shape is not a tuple"),
  "huge shape": (lambda: view([1 << 62, 1 << 62], [0, 0]), "too large"),
  "huge empty shape": (lambda: view([0, 1 << 62], [0, 0]), "too large"),
  "repeated": (lambda: view([1 << 40], [0]), "repeats it too often"),
  "too many axes": (lambda: view([1] * 33, [0] * 33), "at most 32"),
  "strides missing": (lambda: view([2, 3], [1]), "strides are wrong"),
  "shape is a list": (
    lambda: saved(pickled(call(V2, storage(), b"K\x00", b"]", b")", b"\x89", b"N"))),
    "shape is not a tuple",
  ),
  "unknown dtype": (
    lambda: saved(pickled(tensor(rest=(name("torch Size"),)))),
    "no known dtype",
  ),
  "negated": (
    lambda: saved(
      pickled(
        call(
          V2,
          storage(),
          b"K\x00",
          numbers([6]),
          numbers([1]),
          b"\x89",
          b"N",
          mapping(neg=b"\x88"),
        )
      )
    ),
    "negated",
  ),
  "parameter of a text": (
    lambda: saved(pickled(call("torch._utils _rebuild_parameter", text("x"), b"NN"))),
    "not a tensor",
  ),
  # zips that lie
  "empty": (lambda: b"", "is empty"),
  "random": (
    lambda: bytes(np.random.default_rng(0).integers(0, 256, 4096, np.uint8)),
    "not a file",
  ),
  "cut in the middle": (lambda: cut(0.5), "is cut short"),
  "cut near the start": (lambda: cut(0.03), "is cut short"),
  "cut near the end": (lambda: cut(0.99), "is cut short"),
  "something follows": (lambda: saved() + b"x", "something follows its end"),
  "something before": (lambda: b"#!/bin/sh\n" + saved(), "does not begin as a zip"),
  "zip before": (lambda: saved() + saved(), "not where its end says"),
  "comment": (lambda: with_end(comment=b"hello"), "something follows its end"),
  "compressed": (deflated, "compressed record 'a/data.pkl'"),
  "bomb as stored": (
    lambda: with_record(central={"size": 1 << 31}, local={"size": 1 << 31}),
    "compressed record 'a/data/0'",
  ),
  "bomb of 64 bits": (
    lambda: with_record(
      central={
        "size": 0xFFFFFFFF,
        "packed": 0xFFFFFFFF,
        "extra": struct.pack("<2H2Q", 1, 16, 1 << 62, 1 << 62),
      }
    ),
    "outside of the file",
  ),
  "64-bit field missing": (lambda: with_record(central={"size": 0xFFFFFFFF}), "is missing"),
  "64-bit field short": (
    lambda: with_record(central={"size": 0xFFFFFFFF, "extra": struct.pack("<2HL", 1, 4, 24)}),
    "too short",
  ),
  "encrypted": (lambda: with_record(central={"flags": 1}, local={"flags": 1}), "encrypted record"),
  "other flags": (lambda: with_record(central={"flags": 0x2000}), "unknown flags 0x2000"),
  "link": (lambda: with_record(central={"attr": (stat.S_IFLNK | 0o777) << 16}), "is a link"),
  "second disk": (lambda: with_record(central={"disk": 1}), "not an entry"),
  "name in the header": (lambda: with_record(local={"name": b"a/data/9"}), HEADER),
  "size in the header": (lambda: with_record(local={"size": 20, "packed": 20}), HEADER),
  "method in the header": (lambda: with_record(local={"method": 8}), HEADER),
  "checksum in the header": (lambda: with_record(local={"crc": 1}), HEADER),
  "flags in the header": (lambda: with_record(local={"flags": 8}), HEADER),
  "no header": (lambda: with_record(local={"sign": b"PK\0\0"}), HEADER),
  "header far away": (lambda: with_record(central={"offset": 1 << 31}), "outside of the file"),
  "header of another": (lambda: with_record(central={"offset": 0}), HEADER),
  "size too large": (
    lambda: with_record(central={"size": 999, "packed": 999}, local={"size": 999, "packed": 999}),
    "outside of the file",
  ),
  "extra too long": (lambda: with_record(local={"extra_length": 60_000}), "outside of the file"),
  "overlap": (
    lambda: with_record(central={"size": 40, "packed": 40}, local={"size": 40, "packed": 40}),
    "records that overlap",
  ),
  "no signature": (lambda: with_record(central={"sign": b"PK\0\0"}), "not an entry"),
  "long entry": (lambda: with_record(central={"extra_length": 60_000}), "not an entry"),
  "same name twice": (lambda: saved(None, Record("a/data/0", FLOATS)), "two records named"),
  "two archives": (
    lambda: saved(None, Record("b/data.pkl", pickled(b"N"))),
    "2 records 'data.pkl'",
  ),
  "no pickle": (lambda: zipped(archive()[1:]), "0 records 'data.pkl'"),
  "pickle without a folder": (lambda: zipped([Record("data.pkl", pickled(b"N"))]), "0 records"),
  "pickle changed": (
    lambda: saved().replace(b"torch\nFloatStorage", b"torch\nfloatStorage"),
    "checksum",
  ),
  "path upwards": (lambda: saved(None, Record("a/../../x", b"")), "leads out of the file"),
  "absolute path": (lambda: saved(None, Record("/etc/passwd", b"")), "leads out of the file"),
  "backslashes": (lambda: saved(None, Record("a\\..\\x", b"")), "leads out of the file"),
  "zero in a name": (lambda: saved(None, Record("a/x\0y", b"")), "leads out of the file"),
  "empty name": (lambda: saved(None, Record("", b"")), "leads out of the file"),
  "name not UTF-8": (lambda: saved(None, Record(b"a/\xff", b"")), "is not UTF-8"),
  "big-endian": (
    lambda: zipped([Record("a/byteorder", b"big"), *archive()[:1], *archive()[2:]]),
    "byte order b'big'",
  ),
  "more entries than there are": (lambda: with_end(count=9, here=9), "ends within an entry"),
  "fewer entries": (lambda: with_end(count=3, here=3), "more than its entries"),
  "millions of entries": (lambda: wide_many(), "5000000 records"),
  "parts": (lambda: with_end(here=2), "several parts"),
  "other disk": (lambda: with_end(disk=3), "several parts"),
  "directory elsewhere": (lambda: with_end(begin=0), "not where its end says"),
  "directory too large": (lambda: with_end(size=1 << 31), "records"),
  "gap before the end": (lambda: saved()[:-22] + b"gap" + saved()[-22:], "not where its end says"),
  "two ends disagree": (lambda: wide_end(48, 10), "two ends disagree"),
  "wide count disagrees": (lambda: wide_end(32, 7), "two ends disagree"),
  "wide end too long": (lambda: wide_end(4, 1 << 40), "two ends disagree"),
  "wide end elsewhere": (
    lambda: (
      widened(saved())[:-42] + struct.pack("<4sLQL", b"PK\6\7", 0, 1 << 60, 1) + saved()[-22:]
    ),
    "64-bit end is not where",
  ),
  # other formats
  "legacy": (lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"x" * 99, "PyTorch before 1.6"),
  "bare pickle": (lambda: pickle.dumps(Payload(), 4), "is a bare pickle"),
  "tar": (tar, "is a tar file"),
  "TorchScript": (lambda: saved(None, Record("a/constants.pkl", b"")), "torch.jit.load"),
  "TorchScript code": (lambda: saved(None, Record("a/code/x.py", b"")), "torch.jit.load"),
  "other zip": (lambda: zipped([Record("x.npy", b"1234")]), "0 records 'data.pkl'"),
}


def wide_many() -> bytes:
  """A file that says to have five million entries."""
  data = bytearray(widened(saved()))
  at = data.index(b"PK\6\6")
  struct.pack_into("<2Q", data, at + 24, 5_000_000, 5_000_000)
  struct.pack_into("<2H", data, len(data) - 14, 0xFFFF, 0xFFFF)
  return bytes(data)


class Payload:
  """What runs a command where a pickle is loaded."""

  def __reduce__(self):
    return os.system, (RUN,)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(case, tmp_path, monkeypatch):
  build, message = HOSTILE[case]
  path = written(tmp_path / "f.pt", build())
  monkeypatch.chdir(tmp_path)
  modules = set(sys.modules)
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=message) as caught:
      read_torch(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert str(caught.value).startswith(f"'{path}' ")
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
  assert os.listdir(tmp_path) == ["f.pt"]  # nothing ran, nothing was extracted
  assert set(sys.modules) == modules
  assert peak < PEAK


def test_nothing_that_can_run_a_pickle_is_imported():
  for module in (torch_pickle, torch_zip):
    source = Path(module.__file__).read_text()
    assert not re.search(r"import pickle\b|Unpickler|__import__|importlib|getattr\(", source)


@pytest.mark.parametrize(
  ("shape", "strides", "offset"),
  [
    ((3, 2), (1, 3), 0),
    ((2,), (2,), 3),
    ((2, 2), (3, 1), 1),
    ((), (), 5),
    ((4, 6), (0, 1), 0),
    ((1, 6), (9, 1), 0),
    ((0, 3), (3, 1), 0),
    ((2, 1, 3), (3, 7, 1), 0),
    ((6,), (0,), 2),
  ],
)
@pytest.mark.parametrize("gap", [b"", b"x"], ids=["aligned", "unaligned"])
def test_views_are_read_row_major(shape, strides, offset, gap, tmp_path):
  records = archive(pickled(tensor(shape, strides, offset)))
  records[1].after = gap
  records[2].extra = bytes(-len(zipped(records).split(FLOATS)[0]) % 4)
  if gap:
    records[2].extra += b"x"
  found = read_torch(written(tmp_path / "f.pt", zipped(records))).read()
  data = np.frombuffer(FLOATS, np.float32)
  steps = [step * 4 for step in strides]
  expected = np.lib.stride_tricks.as_strided(data[offset:], shape, steps)
  assert np.array_equal(found, expected) and found.shape == shape
  assert found.flags.c_contiguous and found.flags.aligned


def test_names_that_tensors_need_become_values(tmp_path):
  ordered = call("collections OrderedDict")
  state = ordered + b"(" + text("w") + tensor() + b"q\x00u" + mapping(_metadata=ordered) + b"b"
  values = (
    state,
    b"h\x00",
    name("torch bfloat16"),
    call("torch device", text("cuda"), number(1)),
    call("torch Size", numbers([2, 3])),
    call("torch._utils _rebuild_parameter", tensor(), b"\x88", ordered),
    call("torch._utils _rebuild_parameter_with_state", tensor(), b"\x88", ordered, b"}"),
    call("torch._utils _rebuild_tensor", storage(), b"K\x00", numbers([6]), numbers([1])),
    b"}K\x01" + text("integer key") + b"s",
  )
  path = written(tmp_path / "f.pt", widened(saved(pickled(b"](", *values, b"e"))))
  tree = read_torch(path)
  assert type(tree[0]) is dict and tree[0]["w"] is tree[1]
  assert tree[2:5] == ["torch.bfloat16", "cuda:1", (2, 3)] and tree[8] == {1: "integer key"}
  assert [leaf.read().size for leaf in leaves(tree)] == [6] * 5


def test_later_protocols_are_read(tmp_path):
  for protocol in (2, 3, 4, 5):
    tree = {"a": [1, 2.5, "x" * 300, None, (True, 1 << 40)], 3: {"a": ()}}
    path = written(tmp_path / "f.pt", saved(pickle.dumps(tree, protocol)))
    assert read_torch(path) == tree


def test_sizes_may_stand_after_the_data_only(tmp_path):
  records = archive()
  for record in records:  # as torch.save writes them
    record.central, zeros = {"flags": 0x808}, {"crc": 0, "size": 0, "packed": 0}
    record.local, record.after = {"flags": 0x808} | zeros, bytes(16)
  assert bits(read_torch(written(tmp_path / "f.pt", zipped(records))).read()) == FLOATS


def test_opening_and_reading_take_no_memory(tmp_path):
  size = 5 << 30  # more than 32 bits can say; a hole in the file
  wide = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "crc": 0, "flags": 8}
  wide["extra"] = struct.pack("<2H2Q", 1, 16, size, size)
  held = storage("torch ByteStorage", "0", size)
  records = [Record("a/data.pkl", pickled(tensor((size,), (1,), 0, held)))]
  records.append(Record("a/data/0", b"", wide, {"flags": 8}))
  data = widened(zipped(records), hole=size)
  start = data.index(b"PK\1\2")
  with (tmp_path / "f.pt").open("wb") as file:
    file.write(data[:start])
    file.seek(start + size)
    file.write(data[start:])
  tracemalloc.start()
  try:
    leaf = read_torch(tmp_path / "f.pt")
    for _ in range(100):
      array = leaf.read()
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert array.shape == (size,) and array[-1] == 0 and peak < 1 << 20


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no\.pt' does not exist"):
    read_torch(tmp_path / "no.pt")
