r"""Serves live sessions and videos over HTTP and WebSocket.

  python -m launch.serve --config=configs/tiny.py --port=8000

The protocol is in docs/serving.md. Everything is compiled before the server says that it is ready.
SIGTERM ends it: no new work is taken, the block in the making ends, sessions are saved under
--state_dir, and the exit code is 0.
"""

import dataclasses
import logging as python_logging
import os
import signal
import sys
from pathlib import Path

from absl import flags

from longlive_jax.build import enable_compile_cache
from longlive_jax.config.load import define_config_flag, from_flags, run_main
from longlive_jax.serve.adapter import builder
from longlive_jax.serve.contract import Facts
from longlive_jax.serve.frames import FORMATS, Form
from longlive_jax.serve.heap import keep_one_heap
from longlive_jax.serve.limits import Limits
from longlive_jax.serve.security import LOOPBACK_NAMES, Access, check_tokens
from longlive_jax.serve.server import Server, is_loopback, listen, take_folder
from longlive_jax.serve.service import Setup

CONFIG = define_config_flag()
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; others need a token")
PORT = flags.DEFINE_integer("port", 8000, "port; 0 takes a free one", 0, 65535)
TOKEN = flags.DEFINE_multi_string(
  "token", [], "who has one is let in; better hidden in the variable LONGLIVE_TOKEN, with commas"
)
NAMES = flags.DEFINE_list(
  "names", [], "host names that the server answers to; default: any, or this machine's own"
)
STATE_DIR = flags.DEFINE_string("state_dir", "", "folder for sessions and videos; empty: none")
FORMAT = flags.DEFINE_enum("frame_format", "jpeg", sorted(FORMATS), "of frames sent to viewers")
QUALITY = flags.DEFINE_integer("quality", 85, "of frames, 1 to 100; webp at 100 is lossless")
MESSAGE_FRAMES = flags.DEFINE_integer("frames_a_message", 8, "frames of a binary message, at most")
ENCODERS = flags.DEFINE_integer("encoders", 2, "threads that encode frames", 1)
REWIND = flags.DEFINE_integer(
  "rewind_blocks", 3, "that a session can go back; each costs host memory"
)

SESSIONS = flags.DEFINE_integer("sessions", 8, "live sessions at a time")
RESIDENT = flags.DEFINE_integer(
  "resident_sessions", 0, "of those and of videos on the accelerator, others are parked; 0: all"
)
VIDEOS = flags.DEFINE_integer("videos_at_once", 2, "videos made at a time")
QUEUE = flags.DEFINE_integer("queue", 32, "videos that may wait")
VIDEOS_KEPT = flags.DEFINE_integer("videos_kept", 100, "finished videos; the oldest give way")
SAVED = flags.DEFINE_integer("saved_sessions", 100, "sessions on disk; the oldest give way")
CONNECTIONS = flags.DEFINE_integer("connections", 64, "open connections")
PROMPT_CHARS = flags.DEFINE_integer("prompt_chars", 2000, "characters of a prompt")
SECONDS = flags.DEFINE_float("seconds", 300.0, "longest video or session")
REQUEST_BYTES = flags.DEFINE_integer("request_bytes", 8 << 20, "largest request or message")
MESSAGES = flags.DEFINE_float("messages_a_second", 30.0, "of a WebSocket client, on average")
AHEAD = flags.DEFINE_integer("ahead", 2, "blocks made beyond what the viewer has played")
PARK = flags.DEFINE_float("park_seconds", 30.0, "idle time until a session leaves the accelerator")
DISK = flags.DEFINE_float("disk_seconds", 300.0, "idle time until it leaves memory (--state_dir)")
RESUME = flags.DEFINE_float("resume_seconds", 600.0, "how long a session outlives its connection")
PATIENCE = flags.DEFINE_float("patience_seconds", 10.0, "for a body or a first message")

TOKEN_VARIABLE = "LONGLIVE_TOKEN"


def read_limits() -> Limits:
  """The limits that the flags give.

  Raises:
    ValueError: one cannot be.
  """
  return Limits(
    sessions=SESSIONS.value,
    resident_sessions=RESIDENT.value,
    rewind_blocks=REWIND.value,
    videos_at_once=VIDEOS.value,
    queue=QUEUE.value,
    videos_kept=VIDEOS_KEPT.value,
    saved_sessions=SAVED.value,
    connections=CONNECTIONS.value,
    prompt_chars=PROMPT_CHARS.value,
    seconds=SECONDS.value,
    request_bytes=REQUEST_BYTES.value,
    messages_a_second=MESSAGES.value,
    ahead=AHEAD.value,
    park_seconds=PARK.value,
    disk_seconds=DISK.value,
    resume_seconds=RESUME.value,
    patience_seconds=PATIENCE.value,
  )


def read_access() -> Access:
  """Who is let in.

  Raises:
    ValueError: others than this machine could come without a token, or a token will not do.
  """
  given = [*TOKEN.value, *filter(None, os.environ.get(TOKEN_VARIABLE, "").split(","))]
  tokens, host = check_tokens(given), HOST.value
  if not tokens and not is_loopback(host):
    raise ValueError(
      f"--host={host} can be reached by others, so it needs a --token (or {TOKEN_VARIABLE});"
      " --host=127.0.0.1 does not"
    )
  names = frozenset(name.lower() for name in NAMES.value)
  if not names and is_loopback(host):
    names = LOOPBACK_NAMES | {host.lower()}
  return Access(tokens, names)


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  keep_one_heap()
  limits = read_limits()
  setup = Setup(
    Facts.of(experiment),
    builder(experiment, limits.rewind_blocks),
    limits,
    read_access(),
    Form(FORMAT.value, QUALITY.value, MESSAGE_FRAMES.value),
    Path(STATE_DIR.value) if STATE_DIR.value else None,
    ENCODERS.value,
  )
  with listen(HOST.value, PORT.value) as listening:  # before anything is made on disk
    lock = take_folder(setup.state_dir) if setup.state_dir else None
    python_logging.getLogger("python_multipart").setLevel(python_logging.ERROR)
    enable_compile_cache(experiment)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
    address, port = listening.getsockname()[:2]
    name = f"[{address}]" if ":" in address else address
    server = Server(dataclasses.replace(setup, url=f"http://{name}:{port}"))
    try:
      server.serve_on(listening)
    except KeyboardInterrupt:
      if server.service.built:
        raise
      sys.stderr.write("interrupted\n")
      leave(130)
    if not server.service.built:
      leave(0)
    del lock


def leave(code: int) -> None:
  """Ends the process at once; the thread that compiles would be waited for."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


if __name__ == "__main__":
  run_main(main)
