"""Pictures of the page for the docs: `python -m tests.serve.page_pictures --out=docs`."""

import argparse
import contextlib
import io
import itertools
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tests.serve.browser import DESKTOP, PHONE, Watcher, browser, tiny_server

SHOTS = (
  "north yellow square moving right, south blue circle heading left, over night",
  "one purple triangle moving up, over sand",
  "one red circle moving left, over snow",
)
GIF_WIDTH, GIF_SECONDS = 720, 12.0


def tell(watcher: Watcher) -> None:
  """Plays the shots, and sends a cut that is still to come at the end."""
  watcher.watch(SHOTS[0])
  for place, prompt in enumerate(SHOTS[1:]):
    watcher.until(f"s.block >= {3 + 4 * place}", 60.0)
    watcher.change(prompt, "Control+Enter")
    watcher.until(f"s.change?.prompt === '{prompt}' && s.change.seen > 0", 60.0)
  watcher.until("s.block >= 10", 60.0)
  watcher.change("one green square moving down, over fog")
  watcher.until("s.change?.seen === null")
  time.sleep(0.3)


def picture(data: bytes) -> Image.Image:
  """A screenshot as an image."""
  return Image.open(io.BytesIO(data)).convert("RGB")


def colours(sheet: Image.Image, count: int, method: Image.Quantize) -> list[int]:
  """A palette: MEDIANCUT serves large areas, MAXCOVERAGE rare colours."""
  found = (sheet.quantize(count, method=method).getpalette() or [])[: 3 * count]
  return found + [0] * (3 * count - len(found))


def film(watcher: Watcher, path: Path) -> None:
  """A GIF of the first seconds, with one cut."""
  watcher.until("s.phase === 'ready'", 60.0)
  watcher.page.fill("#seed", "7")
  watcher.page.fill("#prompt", SHOTS[0])
  frames, times, begun, changed = [], [], time.monotonic(), False
  frames.append(watcher.page.screenshot())
  times.append(begun)
  watcher.page.press("#prompt", "Enter")
  while time.monotonic() - begun < GIF_SECONDS:
    if not changed and time.monotonic() - begun > 4.5:
      watcher.change(SHOTS[1], "Control+Enter")
      changed = True
    frames.append(watcher.page.screenshot())
    times.append(time.monotonic())
    time.sleep(0.08)
  height = GIF_WIDTH * DESKTOP[1] // DESKTOP[0]
  small = [picture(f).resize((GIF_WIDTH, height), Image.Resampling.LANCZOS) for f in frames]
  sheet = Image.new("RGB", (GIF_WIDTH, 3 * height))
  for row in range(3):
    sheet.paste(small[(len(small) - 1) * row // 2], (0, row * height))
  palette = Image.new("P", (1, 1))
  common = colours(sheet, 160, Image.Quantize.MEDIANCUT)
  palette.putpalette(common + colours(sheet, 96, Image.Quantize.MAXCOVERAGE))
  drawn = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in small]
  gaps = [round(1000 * (b - a)) for a, b in itertools.pairwise(times)] + [1500]
  drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=gaps, loop=0, optimize=True)


def draw(opened: Any, port: int, out: Path) -> None:
  """All pictures."""
  for scheme, name in (("dark", "page.png"), ("light", "page_light.png")):
    watcher = Watcher(opened, port, DESKTOP, scheme)
    tell(watcher)
    picture(watcher.page.screenshot()).save(out / name, optimize=True)
    watcher.close()
  phones = []
  for scheme in ("light", "dark"):
    watcher = Watcher(opened, port, PHONE, scheme)
    tell(watcher)
    phones.append(picture(watcher.page.screenshot()))
    watcher.close()
  pair = Image.new("RGB", (2 * phones[0].width + 40, phones[0].height), "white")
  pair.paste(phones[0], (0, 0))
  pair.paste(phones[1], (phones[0].width + 40, 0))
  half = (pair.width * 5 // 8, pair.height * 5 // 8)
  pair.resize(half, Image.Resampling.LANCZOS).save(out / "page_phone.png", optimize=True)
  watcher = Watcher(opened, port)
  film(watcher, out / "page.gif")
  watcher.close()


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--out", type=Path, required=True)
  out = parser.parse_args().out
  with contextlib.ExitStack() as stack:
    try:
      opened = stack.enter_context(browser())
    except LookupError as error:
      parser.exit(2, f"error: {error}; make browser installs both\n")
    out.mkdir(parents=True, exist_ok=True)
    draw(opened, stack.enter_context(tiny_server()), out)


if __name__ == "__main__":
  main()
