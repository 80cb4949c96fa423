"""The page in Chromium, on the tiny model: it plays, changes, goes back, survives the network."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from longlive_jax.io.video import read_video
from tests.serve.browser import DESKTOP, PHONE, Watcher, Wire, browser, tiny_server
from tests.serve.running import running

pytestmark = pytest.mark.browser
FIRST, SECOND = "one red circle moving left, over snow", "one purple triangle moving up, over sand"
THIRD = "one blue square moving down, over fog"
Open = Callable[..., Watcher]
FORGETS = """() => {  // as if the receipt of a prompt had been lost
  const record = JSON.parse(sessionStorage.getItem("longlive.session"));
  sessionStorage.setItem("longlive.session", JSON.stringify({...record, shots: []}));
}"""


@pytest.fixture(scope="module")
def opened() -> Iterator:
  try:
    context = browser()
    chromium = context.__enter__()
  except LookupError as error:
    pytest.skip(str(error))
  yield chromium
  context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def port(opened) -> Iterator[int]:
  with tiny_server() as number:
    yield number


@pytest.fixture
def watcher(opened) -> Iterator[Open]:
  """Opens the page; at the end nothing must have been complained of."""
  open_pages: list[Watcher] = []

  def make(*arguments, **options) -> Watcher:
    open_pages.append(Watcher(opened, *arguments, **options))
    return open_pages[-1]

  yield make
  complaints = [text for page in open_pages for text in page.complaints]
  for page in open_pages:
    page.close()
  assert not complaints


def test_it_plays_a_minute_without_a_stall(port: int, watcher: Open, record_property):
  page = watcher(port)
  page.watch(FIRST)
  first = page.until("s.drawn > 0")
  assert first["firstFrameMs"] < 3000
  page.until("s.frame > 24")
  begun, start = time.monotonic(), page.stats()
  for turn, prompt in enumerate((SECOND, THIRD, FIRST, SECOND)):
    page.change(prompt, "Control+Enter" if turn % 2 else "Enter")
    after = page.until(f"s.shots.at(-1).prompt === '{prompt}'")
    change = after["change"]
    assert change["block"] <= (change["shown"] + 3) // 32 + 2
    page.until("s.change.seen > 0")
    time.sleep(max(0.0, 15 * (turn + 1) - (time.monotonic() - begun)))
  seconds, end = time.monotonic() - begun, page.stats()
  figures = {
    "first_frame_ms": round(first["firstFrameMs"]),
    "seconds": round(seconds, 1),
    "frames_a_second": round((end["frame"] - start["frame"]) / seconds, 2),
    "skipped": end["skipped"],
    "stalls": end["stalls"],
    "response_ms": round(end["change"]["seen"]),
    "model_fps": end["stats"]["model_fps"],
  }
  record_property("figures", figures)
  print(figures)
  assert end["stalls"] == 0 and end["phase"] == "playing"
  assert figures["frames_a_second"] == pytest.approx(24, rel=0.02)


def test_a_lost_connection_goes_on_with_the_same_session(port: int, watcher: Open):
  wire = Wire(port)
  page = watcher(wire.port)
  page.watch(FIRST)
  before = page.until("s.block >= 1")
  wire.cut()
  page.until("s.phase === 'lost'")
  wire.mend()
  page.until("s.resumed === 1 && s.phase === 'playing'")
  after = page.until(f"s.frame > {before['buffered'] + 40}")
  assert after["session"] == before["session"] and after["shots"] == before["shots"]
  wire.close()


def test_a_reload_goes_on_with_the_same_session(port: int, watcher: Open):
  page = watcher(port)
  page.watch(FIRST)
  page.change(SECOND, "Control+Enter")
  before = page.until("s.shots.length === 2 && s.block >= 1")
  page.page.evaluate(FORGETS)
  page.page.reload()
  after = page.until(f"s.frame > {before['frame'] + 20}")
  assert after["session"] == before["session"] and after["shots"] == before["shots"]


def test_going_back_and_forking(port: int, watcher: Open):
  page = watcher(port)
  page.watch(FIRST)
  page.until("s.block >= 4")
  page.page.click("[data-block='3']")
  page.until("s.phase === 'back' && s.block === 3")
  page.page.fill("#prompt", THIRD)
  page.page.click("#go-on")
  page.until("s.shots.length === 2 && s.shots[1].block === 3")
  parent = page.until("s.phase === 'playing' && s.block >= 4")
  page.page.click("#fork")
  page.until(f"s.session !== '{parent['session']}' && s.block >= 5")
  page.change(SECOND, "Control+Enter")
  page.until("s.change?.seen > 0")
  page.page.select_option("#branch", parent["session"])
  page.until(f"s.session === '{parent['session']}' && s.phase === 'playing'")
  assert [shot["prompt"] for shot in page.stats()["shots"]] == [FIRST, THIRD]
  page.page.reload()
  page.until(f"s.session === '{parent['session']}' && s.phase === 'playing'")
  fork = page.page.eval_on_selector_all("#branch option", "all => all.map((one) => one.value)")[1]
  page.page.select_option("#branch", fork)
  page.until(f"s.session === '{fork}' && s.phase === 'playing' && s.shots.length === 3")


def test_pausing_stepping_and_the_file(port: int, watcher: Open, tmp_path: Path):
  page = watcher(port)
  page.watch(FIRST)
  page.until("s.block >= 1")
  page.page.evaluate("() => document.activeElement.blur()")
  page.page.keyboard.press("Space")
  still = page.until("s.phase === 'paused'")
  for _ in range(3):
    page.page.keyboard.press(",")
  page.until(f"s.frame === {still['frame'] - 3}")
  made = page.until("s.making < 0 && s.buffered === 32 * s.made - 3")["made"]
  with page.page.expect_download(timeout=60000) as download:
    page.page.keyboard.press("d")
  download.value.save_as(tmp_path / "film.mp4")
  assert len(read_video(tmp_path / "film.mp4")) == 32 * made - 3
  page.page.keyboard.press("Space")
  page.until("s.phase === 'playing'")
  page.page.click("#new")
  page.until("s.phase === 'ready'")


def test_a_first_image(port: int, watcher: Open, tmp_path: Path):
  picture = Image.new("RGB", (320, 192), (236, 240, 244))
  picture.paste((168, 52, 214), (130, 66, 190, 126))
  picture.save(tmp_path / "first.png")
  page = watcher(port)
  page.page.set_input_files("#image", tmp_path / "first.png")
  page.page.wait_for_selector("#image-shown", state="visible")
  page.watch("one purple square moving left, over snow")
  page.until("s.drawn > 0")
  page.page.evaluate("() => document.activeElement.blur()")
  page.page.keyboard.press("Space")
  page.page.keyboard.press("Home")
  page.until("s.frame === 0")
  pixel = (
    "() => [...document.getElementById('screen').getContext('2d').getImageData(80, 48, 1, 1).data]"
  )
  red, green, blue, _ = page.page.evaluate(pixel)
  assert red > 120 and green < 100 and blue > 160


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_fits_the_screen(port: int, watcher: Open, size: tuple[int, int]):
  page = watcher(port, size)
  page.watch(FIRST)
  page.until("s.block >= 1")
  measure = """() => {
    const root = document.scrollingElement;
    const kinds = 'main button, main textarea, main dd, canvas#screen';
    const parts = [...document.querySelectorAll(kinds)]
      .filter((part) => !part.closest('.chips, .cells') && part.checkVisibility())
      .map((part) => part.getBoundingClientRect())
      .filter((box) => box.right > innerWidth + 1 || box.bottom > innerHeight + 1 || box.left < -1);
    return [root.scrollHeight <= innerHeight, root.scrollWidth <= innerWidth, parts.length];
  }"""
  assert page.page.evaluate(measure) == [True, True, 0]


def test_a_token_is_asked_for_and_kept_out_of_the_address(watcher: Open):
  token = "token-of-the-tests-0123"
  with running(tokens=(token,)) as run:
    page = watcher(run.port)
    page.page.wait_for_selector("#ask-token[open]")
    page.page.fill("#token", token)
    page.page.press("#token", "Enter")
    page.watch("a red circle")
    page.until("s.frame > 20")
    assert token not in page.page.url
    page.change("refused by the model")
    page.until("s.notice === 'the model does not like this prompt'")
    page.change("explode")
    page.until("s.phase === 'ended'")
    page.close()


def test_it_waits_while_the_model_compiles(watcher: Open):
  from tests.serve.fake import FakeBackend

  def slow() -> FakeBackend:
    time.sleep(2.0)
    return FakeBackend()

  with running(build=slow) as run:
    page = watcher(run.port)
    page.until("s.phase === 'compiling'")
    page.until("s.phase === 'ready'")
    page.close()
