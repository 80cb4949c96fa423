"""How processes find each other, and what is said when they do not."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import rendezvous
from launch.rendezvous import Address, check_name, wait_for_port
from tests.launch.tiny import TINY, Program

JOINS = """
from launch.processes import define_process_flags
from longlive_jax.config.flags import run_main
PROCESSES = define_process_flags()
def main(argv):
  with PROCESSES.joined():
    pass
run_main(main)
"""


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def start(root: Path, number: int, *flags: str) -> tuple[subprocess.Popen, str]:
  """One of two processes, the other of which never comes; the address of the first."""
  address = f"localhost:{free_port()}"
  numbers = (f"--coordinator={address}", "--processes=2", f"--process={number}")
  command = [sys.executable, "-u", "-c", JOINS, *numbers, *flags]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=root, **pipes), address


@pytest.mark.parametrize("number", [0, 1])
def test_others_that_never_come_are_one_line(root, number):
  child, address = start(root, number, "--wait_seconds=2")
  out, err = child.communicate(timeout=60)
  assert f"waiting for {address} (process {number} of 2)" in out
  assert child.returncode == 1  # the same command may go on
  assert err.startswith("error: the processes did not find each other: ")
  assert err.count("\n") == 1 and "--wait_seconds" in err


@pytest.mark.parametrize("number", [0, 1])
def test_sigterm_ends_the_wait(root, number):
  child, _ = start(root, number)
  try:
    assert child.stdout is not None and "waiting for" in child.stdout.readline()
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=20)
  finally:
    child.kill()
  assert child.returncode == 143
  assert "Traceback" not in err and err.count("\n") <= 1


WRONG = {
  "localhost": "--coordinator='localhost' must be HOST:PORT",
  "localhost:": "must be HOST:PORT",
  ":8476": "must be HOST:PORT",
  "localhost:0": "with a port from 1 to 65535",
  "localhost:65536": "with a port from 1 to 65535",
  "localhost:http": "must be HOST:PORT",
  "no-such-host.invalid:8476": "the host 'no-such-host.invalid' cannot be found",
}


@pytest.mark.parametrize("address", WRONG)
def test_an_address_that_is_none(program: Program, tmp_path, monkeypatch, address):
  monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
  numbers = ("--processes=2", "--process=1", f"--workdir={tmp_path / 'run'}")
  fresh = "--config.io.checkpoint="
  done = program("train", *TINY, fresh, f"--coordinator={address}", *numbers)
  assert done.code == 2 and WRONG[address] in done.stderr, done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_no_cluster_names_the_flags(program: Program, tmp_path):
  fresh = "--config.io.checkpoint="
  done = program("train", *TINY, fresh, "--distributed", f"--workdir={tmp_path / 'run'}")
  assert done.code == 2 and done.stderr.count("\n") == 1
  assert "no cluster tells who takes part" in done.stderr
  assert "--coordinator=HOST:PORT, --processes and --process" in done.stderr


def test_the_name_of_a_pod_is_waited_for(monkeypatch):
  asked: list[str] = []

  def find(host: str, *_: object, **__: object) -> None:
    asked.append(host)
    if len(asked) < 3:
      raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

  monkeypatch.setattr(rendezvous, "PAUSE_SECONDS", 0.01)
  monkeypatch.setattr(socket, "getaddrinfo", find)
  monkeypatch.setitem(os.environ, "KUBERNETES_SERVICE_HOST", "10.0.0.1")
  check_name(Address.of("longlive-0.longlive:8476"), time.monotonic() + 10)
  assert asked == ["longlive-0.longlive"] * 3


def test_a_port_that_answers_is_found():
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    wait_for_port(Address("127.0.0.1", listening.getsockname()[1]), time.monotonic() + 5)


def test_brackets_are_of_the_address_alone():
  address = Address.of("[::1]:8476")
  assert str(address) == "[::1]:8476" and address.plain == ("::1", 8476)
