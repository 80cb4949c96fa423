"""Set up before JAX is imported: eight CPU devices and a compilation cache that outlives a run."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8
# Files that take longest, with these first, no worker is left with one of them at the end.
SLOWEST = (
  "parity/test_parity.py",
  "sample/test_quantised.py",
  "quant/test_training_memory.py",
  "quant/test_policy.py",
  "parallel/test_sequence_parallel.py",
  "test_readme.py",
)
# Folders and files whose tests compare what JAX computes with what it computes in another way,
# within a tolerance. They spend nearly all their time compiling.
COMPILED_QUICKLY = (
  "launch",
  "model",
  "parallel/test_halo.py",
  "parallel/test_mesh.py",
  "quant/test_policy.py",
  "quant/test_training_memory.py",
  "sample",
  "train",
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(DEVICES))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


# A shell that runs the tests in the background has it ignored, and so would their programs.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the slowest files first; skips tests marked `gpu` where there is no GPU, and says so."""
  rank = {ROOT / "tests" / name: place for place, name in enumerate(SLOWEST)}
  items.sort(key=lambda item: rank.get(item.path, len(rank)))
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if not marked:
    return
  import jax

  if not any(device.platform == "gpu" for device in jax.devices()):
    for item in marked:
      item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU among jax.devices()"))


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> None:
  """On a CPU, turns LLVM's optimisation off for what is in `COMPILED_QUICKLY`.

  XLA still does to a program what it always does; but its kernels are not vectorised, and products
  are not fused into sums. What is compared to the bit with something else than JAX, or with
  recorded numbers, is optimised in full.
  """
  import jax

  chosen = any(request.path.is_relative_to(ROOT / "tests" / name) for name in COMPILED_QUICKLY)
  quickly = chosen and os.environ["JAX_PLATFORMS"] == "cpu"
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quickly)  # of programs that a test starts
  if jax.config.read("jax_disable_most_optimizations") != quickly:
    jax.config.update("jax_disable_most_optimizations", quickly)
    jax.clear_caches()  # which do not know how they were compiled


@pytest.fixture(scope="session")
def root() -> Path:
  """The root of the repository."""
  return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
  """The folder of the recorded numbers."""
  return ROOT / "tests" / "golden"
