"""A server with a fake model as a process, told to stop more than once."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.running import Running, wait_for


@pytest.fixture
def process(root: Path) -> Iterator[subprocess.Popen[str]]:
  started = subprocess.Popen(
    [sys.executable, "-m", "tests.serve.fake_server", "--block_seconds=0.5"],
    cwd=root,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  yield started
  if started.poll() is None:
    started.kill()
  started.communicate()


def test_a_second_interruption_is_no_error(process: subprocess.Popen[str]):
  assert process.stdout
  run = Running(None, int(process.stdout.readline()), None, None)  # type: ignore
  with run.http() as client:
    wait_for(lambda: client.get("/readyz").status_code == 200)
    with run.viewer() as viewer:
      viewer.event("block_started")
      process.send_signal(signal.SIGINT)
      viewer.event("ended")
      process.send_signal(signal.SIGINT)
      _, errors = process.communicate(timeout=20)
  assert "KeyboardInterrupt" in errors and "CancelledError" not in errors, errors
  assert "ASGI" not in errors
