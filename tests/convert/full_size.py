"""Converts a synthetic network of full size, and measures time and memory.

  python -m tests.convert.full_size --folder=/path/with/60GB --network=dit

Makes a `.pt` file (10 GB) of numbers that are drawn once, copies it to know the speed of the disk,
imports it, quantises the result if it is the transformer, and removes everything again. Memory is
the largest anonymous memory of the process: pages of a mapped file can be dropped at any time.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from longlive_jax.config import Experiment
from longlive_jax.convert.networks import form_of
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import foreign_shape
from longlive_jax.convert.torch_write import write_torch

FOLDER = flags.DEFINE_string("folder", "/tmp", "where 60 GB are free")
NETWORK = flags.DEFINE_enum("network", "dit", ["dit", "text", "vae"], "which one")
KEEP = flags.DEFINE_bool("keep", False, "leave the files")
REPEATS = flags.DEFINE_integer("repeats", 3, "copies and imports; medians are told")
POOL = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(ml_dtypes.bfloat16)


def make(path: Path) -> int:
  """Writes the file; returns its bytes."""
  form = form_of(Experiment(), NETWORK.value)
  bf16 = np.dtype(ml_dtypes.bfloat16)
  tensors = {}
  for number, row in enumerate(form.rows):
    shape = foreign_shape(row, form.shape(row))

    def read(shape: tuple[int, ...] = shape, shift: int = number) -> np.ndarray:
      scale = ml_dtypes.bfloat16(1 / math.sqrt(shape[-1]))
      return np.resize(np.roll(POOL, shift) * scale, shape)

    tensors[row.key] = Stored(shape, bf16, read)
  write_torch(path, {"generator": tensors})
  return path.stat().st_size


def drop_caches(*paths: Path) -> None:
  """Tells the system that these files are not needed in memory, once they are on the disk."""
  for path in paths:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def run(*arguments: str) -> tuple[float, float]:
  """Runs `launch.convert`; returns seconds and GB of anonymous memory at its highest."""
  started, most = time.monotonic(), 0
  child = subprocess.Popen([sys.executable, "-m", "launch.convert", *arguments])
  while child.poll() is None:
    try:
      status = Path(f"/proc/{child.pid}/status").read_text()
    except OSError:
      break
    most = max(
      most, *(int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")), 0
    )
    time.sleep(0.05)
  if child.wait():
    raise SystemExit(f"launch.convert {' '.join(arguments)} failed")
  return time.monotonic() - started, most * 1024 / 1e9


def size_of(folder: Path) -> float:
  """GB of a folder."""
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def copied(source: Path, target: Path) -> float:
  """Seconds of a copy, until it is on the disk."""
  started = time.monotonic()
  shutil.copyfile(source, target)
  drop_caches(target)
  return time.monotonic() - started


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  folder = Path(FOLDER.value) / "full_size"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  source, copy, imported = folder / "source.pt", folder / "copy", folder / "weights"
  size = make(source) / 1e9
  copies, imports = [], []
  for _ in range(REPEATS.value):
    drop_caches(source)
    copies.append(copied(source, copy))
    copy.unlink()
    drop_caches(source)
    shutil.rmtree(imported, ignore_errors=True)
    imports.append(run("import", f"--{NETWORK.value}={source}", f"--out={imported}"))
  seconds = [float(np.median(values)) for values in (copies, [taken for taken, _ in imports])]
  result: dict[str, object] = {
    "file_GB": round(size, 3),
    "copy_GB_s": round(size / seconds[0], 3),
    "import_GB_s": round(size / seconds[1], 3),
    "import_of_copy_speed": round(seconds[0] / seconds[1], 3),
    "copy_seconds": copies,
    "import_seconds": [taken for taken, _ in imports],
    "import_anonymous_GB": max(memory for _, memory in imports),
    "checkpoint_GB": size_of(imported),
  }
  if NETWORK.value == "dit":
    packed = folder / "packed"
    taken, memory = run("quantize", f"--source={imported}", f"--out={packed}")
    result |= {"quantise_seconds": taken, "quantise_anonymous_GB": memory}
    result["packed_GB"] = size_of(packed)
  print(json.dumps(result, indent=2))
  if not KEEP.value:
    shutil.rmtree(folder)


if __name__ == "__main__":
  app.run(main)
