"""A real browser on the page of a real server, and a network that can be cut."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = (1280, 800), (390, 844)


def find_chromium(play: Any) -> str | None:
  """The browser that playwright has installed, or one of the system."""
  if Path(play.chromium.executable_path).exists():
    return play.chromium.executable_path
  return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
  """Chromium.

  Raises:
    LookupError: there is none, with what would help.
  """
  try:
    from playwright.sync_api import sync_playwright
  except ImportError as error:
    raise LookupError("playwright is not installed: pip install -e '.[browser]'") from error
  with sync_playwright() as play:
    path = find_chromium(play)
    if path is None:
      raise LookupError("there is no Chromium: python -m playwright install chromium")
    opened = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
    try:
      yield opened
    finally:
      opened.close()


@contextlib.contextmanager
def tiny_server(*flags: str) -> Iterator[int]:
  """`launch.serve` with the shipped weights, ready; its port."""
  process = subprocess.Popen(
    [sys.executable, "-m", "launch.serve", "--config=configs/tiny.py", "--port=0", *flags],
    cwd=ROOT,
    env={name: value for name, value in os.environ.items() if name != "LONGLIVE_TOKEN"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  said = []
  try:
    assert process.stdout
    for line in process.stdout:
      said.append(line)
      if match := re.search(r"ready in [\d.]+ s: http://127.0.0.1:(\d+)", line):
        yield int(match[1])
        return
    raise AssertionError("".join(said))
  finally:
    process.terminate()
    process.communicate(timeout=60)


class Wire:
  """Passes bytes between its own port and that of a server, until it is cut."""

  def __init__(self, port: int):
    self._target, self.whole = port, True
    self._listening = socket.create_server(("127.0.0.1", 0))
    self.port = self._listening.getsockname()[1]
    self._open: list[socket.socket] = []
    threading.Thread(target=self._accept, daemon=True).start()

  def _accept(self) -> None:
    while True:
      try:
        near, _ = self._listening.accept()
      except OSError:
        return
      if not self.whole:
        near.close()
        continue
      far = socket.create_connection(("127.0.0.1", self._target))
      self._open += [near, far]
      for pair in ((near, far), (far, near)):
        threading.Thread(target=self._pass, args=pair, daemon=True).start()

  def _pass(self, source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
      while data := source.recv(1 << 16):
        target.sendall(data)
    for end in (source, target):
      with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
      end.close()

  def cut(self) -> None:
    """Ends all connections, and refuses new ones until it is mended."""
    self.whole = False
    for end in self._open:
      with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    self._open.clear()

  def mend(self) -> None:
    """Lets connections through again."""
    self.whole = True

  def close(self) -> None:
    """The end."""
    self.cut()
    self._listening.close()


class Watcher:
  """The page in a browser.

  Args:
    opened: the browser.
    port: of the server.
    size: of the window.
    scheme: "dark" or "light".
  """

  def __init__(self, opened: Any, port: int, size: tuple[int, int] = DESKTOP, scheme="dark"):
    phone = size == PHONE
    self.context = opened.new_context(
      viewport={"width": size[0], "height": size[1]},
      color_scheme=scheme,
      has_touch=phone,
      is_mobile=phone,
      device_scale_factor=2 if phone else 1,
    )
    self.page = self.context.new_page()
    self.complaints: list[str] = []
    self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
    self.page.on("console", self._console)
    self.page.goto(f"http://127.0.0.1:{port}/")

  def _console(self, message: Any) -> None:
    lost = "net::ERR_" in message.text or "WebSocket connection" in message.text
    asked = " 401 " in message.text or " 503 " in message.text
    if message.type == "error" and not lost and not asked:
      self.complaints.append(message.text)

  def stats(self) -> dict[str, Any]:
    """What the page has played."""
    return self.page.evaluate("() => window.longlive.stats()")

  def until(self, test: str, seconds: float = 20.0) -> dict[str, Any]:
    """Waits until an expression of `s`, the stats, is true; the page's policy forbids `eval`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      code = f"() => {{ const s = window.longlive.stats(); return [!!({test}), s]; }}"
      done, stats = self.page.evaluate(code)
      if done:
        return stats
      time.sleep(0.03)
    raise AssertionError(f"not in {seconds} s: {test}: {self.stats()}")

  def watch(self, prompt: str, seed: int = 7) -> None:
    """Begins a video."""
    self.until("s.phase === 'ready'", 60.0)
    self.page.fill("#prompt", prompt)
    self.page.fill("#seed", str(seed))
    self.page.press("#prompt", "Enter")

  def change(self, prompt: str, keys: str = "Enter") -> None:
    """Sends another prompt."""
    self.page.fill("#prompt", prompt)
    self.page.press("#prompt", keys)

  def close(self) -> None:
    """Closes the page."""
    self.context.close()
