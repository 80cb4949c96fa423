"""`launch.serve`: from flags to a server that is ready, and to an end with exit code 0."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.tiny import TINY, Outcome, Program
from tests.serve.running import Running, wait_for

TOKEN = "token-of-the-tests-0123"


def assert_refused(done: Outcome, line: str) -> None:
  assert line in done.stderr, done.stderr
  assert done.code == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


REFUSED = {
  "--host=0.0.0.0": "--host=0.0.0.0 can be reached by others, so it needs a --token",
  "--host=nowhere.invalid": "--host='nowhere.invalid' is no address of this machine",
  "--host=192.0.2.1 --token=0123456789abcdef": "cannot listen at --host=192.0.2.1",
  "--token=short": "--token must be 16 to 256 letters",
  "--port=70000": "port",
  "--state_dir=LICENSE/x": "is not a folder",
  "--state_dir=LICENSE": "it is a file; give the name of a folder",
  "--sessions=0": "--sessions=0 must be at least 1",
  "--connections=3": "--connections=3 must be at least 9",
  "--quality=0": "--quality=0 must be from 1 to 100",
  "--frame_format=gif": "frame_format",
  "--config.video.height=100": "video.height=100 must be",
  "--config.io.checkpoint=nothing": "io.checkpoint='nothing' is neither",
  "--seconds=0": "--seconds=0.0 must be at least",
  "--seconds=inf": "--seconds=inf must be a finite number",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_served(program: Program, monkeypatch: pytest.MonkeyPatch, arguments):
  monkeypatch.delenv("LONGLIVE_TOKEN", raising=False)
  done = program("serve", *TINY, "--port=0", *arguments.split())
  assert_refused(done, REFUSED[arguments])


def test_a_port_that_is_taken(program: Program, tmp_path: Path):
  state = tmp_path / "state"
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    line = f"--port={port}: address already in use; choose another --port"
    done = program("serve", *TINY, f"--port={port}", f"--state_dir={state}")
  assert_refused(done, line)
  assert not state.exists()


def test_help_is_no_error(program: Program):
  done = program("serve", "--help")
  assert done.code == 0 and "--helpfull" in done.stdout and not done.stderr


@pytest.fixture
def served(root: Path, checkpoint: Path, tmp_path: Path) -> Iterator:
  """Starts the program; `served(*flags)` gives the process and its server."""
  processes: list[subprocess.Popen] = []

  def start(*arguments: str) -> tuple[subprocess.Popen, Running]:
    weights = f"--config.io.checkpoint={checkpoint}"
    flags = (*TINY, weights, "--port=0", f"--state_dir={tmp_path / 'state'}", *arguments)
    process = subprocess.Popen(
      [sys.executable, "-m", "launch.serve", *flags],
      cwd=root,
      env={**os.environ, "LONGLIVE_TOKEN": TOKEN},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    processes.append(process)
    for line in process.stdout or ():
      if match := re.search(r"ready in [\d.]+ s: http://127.0.0.1:(\d+)", line):
        return process, Running(None, int(match[1]), None, None)  # type: ignore
    raise AssertionError(process.communicate()[1])

  yield start
  for process in processes:
    if process.poll() is None:
      process.kill()
    process.communicate()


def test_it_serves_until_a_signal_and_the_next_one_goes_on(served):
  process, run = served()
  with run.http() as client:
    assert client.get("/readyz").status_code == 200
    assert client.get("/v1/videos").status_code == 401
    client.headers["authorization"] = f"Bearer {TOKEN}"
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["size"], model["block_frames"]) == ("tiny", "32x32", 8)
    video = client.post("/v1/videos", json={"prompt": "one red circle", "seconds": 1}).json()
    url = f"/v1/videos/{video['id']}"
    wait_for(lambda: client.get(url).json()["status"] == "completed")
    assert client.get(f"{url}/content").content[4:8] == b"ftyp"
  with run.viewer("one red circle", seed=1, token=TOKEN) as viewer:
    assert viewer.block()[0].block == 0
    process.send_signal(signal.SIGTERM)
    assert viewer.event("ended") == {"type": "ended", "reason": "server_stop", "saved": True}
    assert viewer.close_code() == 1012
  _, errors = process.communicate(timeout=30)
  assert (process.returncode, errors) == (0, "")
  process, run = served()
  with run.resumed(viewer.session["id"], token=TOKEN) as viewer:
    assert viewer.block()[0].block == 0  # it had not been played
  with run.http(authorization=f"Bearer {TOKEN}") as client:
    assert client.get(url).json()["status"] == "completed"
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=30)
  assert (process.returncode, errors) == (130, "interrupted\n")
