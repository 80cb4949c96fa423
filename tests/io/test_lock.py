"""A workdir has one run at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from longlive_jax.io.lock import LOCK, only_run

HOLDS = """
import sys, time
from longlive_jax.io.lock import only_run
with only_run(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
  command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
    try:
      assert child.stdout is not None and child.stdout.readline() == "held\n"
      before = (tmp_path / "run" / LOCK).read_text()
      line = rf"--workdir={tmp_path / 'run'} is in use by a run on host \S+, process {child.pid};"
      with pytest.raises(ValueError, match=line), only_run(tmp_path / "run"):
        pass
      assert (tmp_path / "run" / LOCK).read_text() == before
    finally:
      child.send_signal(signal.SIGKILL)
  last = time.monotonic() + 10
  while time.monotonic() < last and child.poll() is None:
    time.sleep(0.01)
  with only_run(tmp_path / "run"):
    assert (tmp_path / "run" / LOCK).read_text().endswith(f" {os.getpid()}\n")
  with only_run(tmp_path / "run"):
    pass


def test_where_nothing_can_be_locked_it_is_a_warning(tmp_path, monkeypatch, caplog):
  def refuse(*_: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with only_run(tmp_path):
    assert f"'{tmp_path / LOCK}' cannot be locked (Operation not supported)" in caplog.text
