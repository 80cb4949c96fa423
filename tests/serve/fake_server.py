"""A server with a fake model as a process of its own.

  python -m tests.serve.fake_server --state_dir=DIR --block_seconds=0.05

Prints the port when it listens, and goes on until it is told to stop.
"""

import argparse
import dataclasses
import signal
from pathlib import Path

from longlive_jax.serve.server import Server, listen, take_folder
from longlive_jax.serve.service import Setup
from tests.serve.fake import FACTS, FakeBackend
from tests.serve.running import LOSSLESS, QUICK


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--state_dir", type=Path, default=None)
  parser.add_argument("--block_seconds", type=float, default=0.0)
  parser.add_argument("--sessions", type=int, default=8)
  given = parser.parse_args()
  backend = FakeBackend(block_seconds=given.block_seconds)
  limits = dataclasses.replace(QUICK, sessions=given.sessions)
  lock = take_folder(given.state_dir) if given.state_dir else None
  setup = Setup(FACTS, lambda: backend, limits, form=LOSSLESS, state_dir=given.state_dir)
  listening = listen("127.0.0.1", 0)
  print(listening.getsockname()[1], flush=True)
  signal.signal(signal.SIGTERM, lambda *_: None)  # raised again at the end
  Server(setup).serve_on(listening)
  del lock


if __name__ == "__main__":
  main()
