"""Freed memory goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

from longlive_jax.serve import heap
from tests.serve.running import running, wait_for

PROGRAM = """
from pathlib import Path
import numpy as np
from longlive_jax.serve.heap import give_back, keep_one_heap

def mebibytes() -> int:
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

keep_one_heap()
arrays = [np.ones(100_000, np.uint8) for _ in range(2000)]
kept = arrays[::20]  # so that the heap cannot shrink
del arrays
before = mebibytes()
give_back()
print(before - mebibytes())
"""


@pytest.mark.skipif(heap._find("malloc_trim") is None, reason="the C library is not glibc")
def test_what_is_freed_between_things_that_stay_is_given_back():
  done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
  assert int(done.stdout) > 150


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
  heap.keep_one_heap()
  heap.give_back()


def test_memory_is_given_back_when_a_session_is_freed(monkeypatch: pytest.MonkeyPatch):
  given: list[int] = []
  monkeypatch.setattr("longlive_jax.serve.service.TEND_SECONDS", 0.02)
  monkeypatch.setattr("longlive_jax.serve.service.give_back", lambda: given.append(1))
  with running() as run, run.viewer() as viewer:
    viewer.block()
    assert not given
    viewer.say("stop")
    assert viewer.close_code() == 1000
    wait_for(lambda: given)
