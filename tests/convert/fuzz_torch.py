"""Reads damaged and invented PyTorch files for a while: `python -m tests.convert.fuzz_torch`.

Each file must be read, and all its tensors too, or be refused by a ValueError of one line. Memory
and time are bounded.
"""

import argparse
import random
import resource
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from longlive_jax.convert.torch_pickle import BUILDERS
from longlive_jax.convert.torch_tensor import DTYPES, STORAGES
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.convert.torch_zip import read_torch
from tests.convert import torch_files as make

MOST_GROWTH = 256 << 20  # bytes of resident memory
MOST_SECONDS = 2.0  # of processor time, for one file
MOST_READ = 64 << 20  # bytes of tensors that are read of one file
ODD = (0, 1, 2, 3, 6, 24, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1)
TEXTS = ("storage", "0", "1", "cpu", "cuda", "weight", "os", "system", "torch", "é", "", "a" * 300)
SIMPLE = (b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"K\x00", b"K\x03", b"G" + b"\x40" * 8)
FINISH = tuple(bytes([code]) for code in b"t\x85\x86\x87aesuRbQ\x93\x94")
STRANGE = [bytes([code]) for code in b"012io\x81\x92\x8f\x91ld"]


def seeds(folder: Path) -> list[bytes]:
  """Valid files."""
  tree = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": [np.zeros((), ml_dtypes.bfloat16), 1, -7, 2**40, None, True, 0.5, "text", (1, 2)],
    "c": {"d": np.ones((2, 2), ml_dtypes.float8_e4m3fn), "e": np.zeros((0, 3), np.int64)},
  }
  write_torch(folder / "seed.pt", tree)
  parts = (make.tensor((3, 2), (1, 3)), make.tensor((2,), (2,), 1), make.tensor((4, 6), (0, 1)))
  memo = make.pickled(b"]q\x00(", *(part + b"q\x01h\x01" for part in parts), b"e")
  return [
    (folder / "seed.pt").read_bytes(),
    make.saved(),
    make.widened(make.saved(make.pickled(make.mapping(x=make.tensor(), y=make.number(5))))),
    make.saved(memo),
    make.saved(make.pickled(make.mapping(x=b"(" + b"".join(parts) + b"t"))),
  ]


def pickles() -> list[bytes]:
  """Valid pickles."""
  parts = [make.tensor(), make.tensor((3, 2), (1, 3)), make.tensor((), ()), make.tensor((0,), (1,))]
  ordered = make.call("collections OrderedDict") + make.mapping(_metadata=b"}") + b"b"
  stack_global = make.text("torch") + make.text("Size") + b"\x93" + make.numbers([2]) + b"\x85R"
  v3 = make.tensor(
    held=make.storage("torch.storage UntypedStorage", "0", 24),
    shape=(24,),
    strides=(1,),
    rest=(make.name("torch float8_e5m2"),),
  )
  return [
    make.pickled(make.mapping(a=parts[0], b=parts[1], c=ordered, d=v3)),
    make.pickled(b"](", *parts, b"K\x01J\x00\x00\x00\x80", make.number(2**40), b"e"),
    make.pickled(make.mapping(size=stack_global, n=b"N", t=b"\x88", f=b"G" + b"\x3f" * 8)),
    make.pickled(b"}q\x00(", make.text("x"), b"q\x01]q\x02(h\x01h\x01e", make.text("y"), b"h\x02u"),
    make.pickled(call_of("_rebuild_parameter", parts[0], b"\x88", ordered)),
    make.pickled(b"\x95" + bytes(8), b"}\x94", proto=b"\x80\x04"),
  ]


def call_of(name: str, *args: bytes) -> bytes:
  """A call of a function of torch._utils."""
  return make.call(f"torch._utils {name}", *args)


def damaged(rng: random.Random, data: bytes, low: int = 0, high: int | None = None) -> bytes:
  """Bytes with a few changes between two positions."""
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
    top = min(len(out), len(out) if high is None else high)
    if top <= low:
      break
    at = rng.randrange(low, top)
    kind = rng.randrange(7)
    if kind == 0:
      out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      out[at] = rng.randrange(256)
    elif kind == 2:
      packed = struct.pack("<Q", rng.choice(ODD))[: rng.choice((1, 2, 4, 8))]
      out[at : at + len(packed)] = packed
    elif kind == 3:
      del out[at : at + rng.choice((1, 2, 4, 30))]
    elif kind == 4:
      start = rng.randrange(len(out))
      out[at:at] = out[start : start + rng.choice((1, 4, 46, 100))]
    elif kind == 5:
      start = rng.randrange(len(out))
      part = out[start : start + rng.choice((1, 4, 46, 100))]
      out[at : at + len(part)] = part
    else:
      out[at:at] = rng.choice((*SIMPLE, *FINISH, *STRANGE))
  return bytes(out)


def invented(rng: random.Random) -> bytes:
  """A pickle of random opcodes, most of them in a plausible order."""
  names = [*BUILDERS, *STORAGES, *DTYPES]
  parts, puts = [], 0
  for _ in range(rng.choice((3, 10, 30, 100, 1000))):
    kind = rng.random()
    if kind < 0.25:
      parts.append(rng.choice(SIMPLE))
    elif kind < 0.5:
      parts.append(rng.choice(FINISH))
    elif kind < 0.6:
      parts.append(make.text(rng.choice(TEXTS)))
    elif kind < 0.68:
      parts.append(make.number(rng.choice((-1, 1)) * rng.choice(ODD)))
    elif kind < 0.76:
      parts.append(make.name(" ".join(rng.choice(names).rsplit(".", 1))))
    elif kind < 0.82:
      parts.append(b"q" + bytes([puts % 256]))
      puts += 1
    elif kind < 0.9:
      parts.append(b"h" + bytes([rng.randrange(max(1, min(puts, 256)))]))
    elif kind < 0.96:
      shape = [rng.choice(ODD) for _ in range(rng.randrange(4))]
      strides = [rng.choice(ODD) for _ in shape]
      parts.append(make.tensor(shape, strides, rng.choice(ODD)))
    elif kind < 0.97:
      parts.append(rng.choice(STRANGE))
    else:
      parts.append(rng.choice((b"](", b"}(")))
  if rng.random() < 0.5:
    parts = [b"](", *parts, b"e"]
  return make.pickled(*parts)


def grown(rng: random.Random, depth: int = 0) -> bytes:
  """The opcodes of a random value that can be read."""
  kind = rng.randrange(6 if depth > 4 else 10)
  inner = [grown(rng, depth + 1) for _ in range(rng.randrange(4))] if kind > 5 else []
  if kind == 0:
    return rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"G" + rng.randbytes(8)))
  if kind == 1:
    return make.text(rng.choice(TEXTS))
  if kind == 2:
    return make.number(rng.choice(ODD))
  if kind == 3:
    return make.name(" ".join(rng.choice([*DTYPES]).rsplit(".", 1)))
  if kind == 4:
    return rng.choice((make.tensor(), make.tensor((3,), (1,), 2), make.tensor((3, 2), (1, 3))))
  if kind == 5:
    return make.call("torch device", make.text("cuda"), make.number(rng.randrange(9)))
  if kind == 6:
    return make.group(*inner)
  if kind == 7:
    return b"](" + b"".join(inner) + b"e"
  head = b"}" if kind == 8 else make.call("collections OrderedDict")
  keys = [rng.choice((make.text(str(n)), make.number(n), b"\x88", b"N")) for n in range(9)]
  return head + b"(" + b"".join(map(b"".join, zip(keys, inner, strict=False))) + b"u"


def large(rng: random.Random) -> bytes:
  """A pickle that does the same many times."""
  args = (make.storage(), make.number(0), make.numbers([6]), make.numbers([1]), b"\x89", b"N")
  first = make.name(make.V2) + b"q\x00" + make.group(*args) + b"q\x01R"
  parts = [b"h\x00h\x01R", b"}", b"]", b"\x85", b"}NNs", b"J\x00\x01\x02\x03", b"(", b"\x94", b"N"]
  parts += [make.text("ab"), make.number(2**62), b"h\x01\x85", b"(h\x01h\x01h\x01t"]
  again = b"".join(rng.choice(parts) for _ in range(rng.choice((1, 1, 2, 3))))
  times = rng.choice((10**4, 10**5, 10**6)) // len(again)
  return make.pickled(b"](", first, again * times, b"e")


def viewed(rng: random.Random) -> bytes:
  """A pickle of tensors whose sizes are near the truth."""
  parts = []
  for _ in range(rng.randrange(1, 6)):
    shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
    strides = [rng.randrange(5) for _ in shape]
    kind = rng.choice([*STORAGES])
    count = 24 // STORAGES[kind].itemsize + rng.choice((0, 0, 0, 0, 0, 0, 0, 0, 0, 1, -1))
    held = make.storage(" ".join(kind.rsplit(".", 1)), "0", count)
    dtype = make.name(" ".join(rng.choice([*DTYPES]).rsplit(".", 1)))
    rest = (dtype,) if rng.random() < 0.5 else ()
    parts.append(make.tensor(shape, strides, rng.randrange(4), held, rest))
  return make.pickled(b"](", *parts, b"e")


def case(rng: random.Random, files: list[bytes], trees: list[bytes]) -> tuple[str, bytes]:
  """The kind and the bytes of one file."""
  kind = rng.randrange(9)
  if rng.random() < 0.002:
    return "large", make.saved(large(rng))
  data = rng.choice(files)
  directory = data.index(b"PK\1\2")
  if kind == 0:
    return "any byte", damaged(rng, data)
  if kind == 1:
    return "directory", damaged(rng, data, directory)
  if kind == 2:
    starts = [at for at in range(directory) if data[at : at + 4] == b"PK\3\4"]
    at = rng.choice(starts)
    return "header", damaged(rng, data, at, at + 46)
  if kind == 3:
    return "cut", data[: rng.randrange(len(data))]
  if kind == 4:
    other = rng.choice(files)
    return "spliced", data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
  if kind == 5:
    return "pickle", make.saved(damaged(rng, rng.choice(trees)))
  if kind == 6:
    return "opcodes", make.saved(invented(rng))
  if kind == 7:
    tree = make.pickled(grown(rng))
    return "grown", make.saved(damaged(rng, tree) if rng.random() < 0.5 else tree)
  return "views", make.saved(viewed(rng))


def read_all(path: Path) -> str:
  """Reads a file and its tensors; "read" or "refused"."""
  try:
    tree = read_torch(path)
  except ValueError as error:
    message = str(error)
    if "\n" in message or len(message) > 1000 or not message.startswith(f"'{path}' "):
      raise RuntimeError(f"a message is not one short line: {message!r}") from error
    return "refused"
  total = 0
  for leaf in make.leaves(tree):
    total += leaf.nbytes
    if total > MOST_READ:
      break
    array = leaf.read()
    if array.shape != leaf.shape or array.dtype != leaf.dtype or not array.flags.c_contiguous:
      raise RuntimeError(f"{leaf} reads as {array.dtype} {array.shape}")
    make.bits(array)
  return "read"


def peak() -> int:
  """Most resident memory so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(seconds: float, seed: int, report: Callable[[str], None]) -> None:
  """Tries files for some time.

  Raises:
    RuntimeError: one was neither read nor refused as it must be, or took too much; the file stays.
  """
  rng = random.Random(seed)
  counts: Counter[tuple[str, str]] = Counter()
  slowest, slow_kind, begin = 0.0, "", peak()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    files, trees = seeds(folder), pickles()
    for data in (*files, *map(make.saved, trees)):
      read_torch(make.written(folder / "valid.pt", data))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
      kind, data = case(rng, files, trees)
      path = make.written(folder / "case.pt", data)
      start = time.process_time()
      try:
        counts[kind, read_all(path)] += 1
      except BaseException:
        kept = make.written(Path(tempfile.gettempdir()) / "fuzz_torch_case.pt", data)
        report(f"failed: {kind}, kept as {kept}")
        raise
      took = time.process_time() - start
      if took > slowest:
        slowest, slow_kind = took, kind
      if took > MOST_SECONDS or peak() - begin > MOST_GROWTH:
        raise RuntimeError(f"{kind}: {took:.2f} s, {(peak() - begin) >> 20} MiB more memory")
  for kind in sorted({kind for kind, _ in counts}):
    report(f"{kind:10} {counts[kind, 'read']:8} read {counts[kind, 'refused']:8} refused")
  read = sum(count for (_, end), count in counts.items() if end == "read")
  report(
    f"{counts.total()} files, {read} read, {counts.total() - read} refused; memory grew by"
    f" {(peak() - begin) / 2**20:.1f} MiB; the slowest took {slowest * 1e3:.0f} ms ({slow_kind})"
  )


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  run(args.minutes * 60, args.seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
  main()
