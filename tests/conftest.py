"""Set up before JAX is imported: eight CPU devices and a compilation cache that outlives a run."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(DEVICES))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


# A shell that runs the tests in the background has it ignored, and so would their programs.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips tests marked `gpu` where there is no GPU, and says so."""
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if not marked:
    return
  import jax

  if not any(device.platform == "gpu" for device in jax.devices()):
    for item in marked:
      item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU among jax.devices()"))


@pytest.fixture(scope="session")
def root() -> Path:
  """The root of the repository."""
  return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
  """The folder of the recorded numbers."""
  return ROOT / "tests" / "golden"
