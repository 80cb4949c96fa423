"""The page's files: all there, served as what they are, nothing from elsewhere, nothing inline."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.data.shapes_render import BACKGROUNDS, COLOURS, SHAPES
from longlive_jax.data.shapes_spec import LANES, MAX_CAPTION_BYTES, PAIRS
from longlive_jax.serve.frames import Form, encode_block
from longlive_jax.serve.messages import KINDS, parse
from longlive_jax.serve.security import ALWAYS
from tests.serve.fake import FACTS
from tests.serve.running import running

PAGE = Path(__file__).parents[2] / "longlive_jax" / "serve" / "page"
TYPES = {
  ".html": "text/html",
  ".css": "text/css",
  ".js": "text/javascript",
  ".svg": "image/svg+xml",
}
SCRIPTS = sorted(PAGE.glob("*.js"))
MOST_LINES, MOST_FUNCTION_LINES, MOST_BYTES = 300, 50, 96 << 10


class Markup(HTMLParser):
  """Collects what a document refers to, and what stands in it."""

  def __init__(self, text: str):
    super().__init__()
    self.references: set[str] = set()
    self.ids: list[str] = []
    self.refers_to: set[str] = set()
    self.faults: list[str] = []
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    given = dict(attrs)
    for name in ("src", "href"):
      if (value := given.get(name)) and not value.startswith("#"):
        self.references.add(value)
    self.faults += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
    if tag == "style" or (tag == "script" and not given.get("src")):
      self.faults.append(f"inline {tag}")
    if found := given.get("id"):
      self.ids.append(found)
    for name in ("for", "aria-labelledby", "aria-describedby"):
      self.refers_to |= set((given.get(name) or "").split())


@pytest.fixture(scope="module")
def markup() -> Markup:
  return Markup((PAGE / "index.html").read_text())


def imports(path: Path) -> set[str]:
  """Modules that a module imports."""
  return set(re.findall(r'(?:\bfrom |\bimport\()"([^"]+)"', path.read_text()))


def test_every_file_is_there_and_is_needed(markup: Markup):
  outside = [n for path in SCRIPTS for n in imports(path) if not n.startswith("./")]
  assert not outside
  named = markup.references | {n.removeprefix("./") for path in SCRIPTS for n in imports(path)}
  assert named | {"index.html"} == {path.name for path in PAGE.iterdir()}


def test_the_server_serves_them_as_what_they_are():
  with running() as run, run.http() as client:
    assert client.get("/").text == (PAGE / "index.html").read_text()
    for path in PAGE.iterdir():
      answer = client.get(f"/{path.name}")
      assert answer.status_code == 200 and answer.content == path.read_bytes()
      assert answer.headers["content-type"].partition(";")[0] == TYPES[path.suffix]
      assert answer.headers["content-security-policy"] == ALWAYS["content-security-policy"]


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(markup: Markup):
  assert not markup.faults
  forbidden = r"https?://|\beval\(|new Function|innerHTML|insertAdjacentHTML|@import|localStorage"
  for path in PAGE.iterdir():
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(forbidden, text), path.name
    assert not re.findall(r"url\((?!#)", text), path.name
    assert not re.findall(r'setAttribute\("style"', text), path.name


def test_the_files_are_small():
  assert sum(path.stat().st_size for path in PAGE.iterdir()) < MOST_BYTES
  for path in SCRIPTS:
    lines = path.read_text().splitlines()
    assert len(lines) < MOST_LINES, path.name
    starts = [i for i, line in enumerate(lines) if line.endswith("{") and "(" in line]
    for start in starts:
      indent = len(lines[start]) - len(lines[start].lstrip())
      closing = re.compile(" " * indent + r"\}")
      end = next((i for i in range(start + 1, len(lines)) if closing.match(lines[i])), start)
      assert end - start < MOST_FUNCTION_LINES, f"{path.name}:{start + 1}"


def test_every_element_that_is_named_exists_once(markup: Markup):
  assert len(markup.ids) == len(set(markup.ids))
  assert markup.refers_to <= set(markup.ids)
  named = {
    n
    for path in SCRIPTS
    for n in re.findall(r'(?:\$|\b(?:text|show|enable))\("([\w-]+)"', path.read_text())
  }
  assert named and named <= set(markup.ids)


def test_the_page_knows_the_words_of_the_model():
  text = (PAGE / "words.js").read_text()

  def words(name: str) -> list[str]:
    found = re.search(rf"const {name} = (\[.*?\]);", text, re.S)
    assert found
    return json.loads(re.sub(r",\s*\]", "]", found[1]))

  assert words("COLOURS") == list(COLOURS)
  assert words("SHAPES") == list(SHAPES)
  assert words("BACKGROUNDS") == list(BACKGROUNDS)
  lists = [
    tuple(json.loads(found)) for found in re.findall(r"(?:lanes|directions): (\[.*?\])", text)
  ]
  assert lists == [LANES[0], PAIRS[0], LANES[1], PAIRS[1]]
  one = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (moving|heading) (left|right|up|down)"
  whole = rf"(one {one}|\w+ {one}, \w+ {one}), over ({'|'.join(BACKGROUNDS)})"
  for example in words("EXAMPLES"):
    assert re.fullmatch(whole, example) and len(example) < MAX_CAPTION_BYTES


NODE = """
import * as protocol from "./protocol.js";
import {canGoBack, initial, phase, reduce} from "./state.js";
import {FrameStore} from "./frames.js";
import {anyPrompt} from "./words.js";
import {readFileSync} from "node:fs";
const given = JSON.parse(readFileSync(0, "utf8"));
const sizes = {first: given.first, per: given.per, fps: 24};
const frames = new FrameStore(1 << 20);
frames.reset(sizes);
const unpacked = given.messages.map((text) => {
  const bytes = new Uint8Array(Buffer.from(text, "base64"));
  const packed = protocol.unpack(bytes.buffer);
  const end = frames.add(packed);
  const types = packed.frames.map((frame) => [frame.type, frame.size]);
  return {...packed, frames: types, end, ahead: frames.ahead(0)};
});
const blocks = given.frames.map((frame) => protocol.blockAt(frame, sizes));
const starts = [0, 1, 2, 9].map((block) => protocol.firstFrame(block, sizes));
let state = reduce(initial, {type: "begin", prompt: "a"});
const phases = [phase(state)[0]];
for (const event of given.events) {
  state = reduce(state, {type: "server", event});
  phases.push(phase(state)[0]);
}
const script = protocol.scriptOf(given.shots, 6, 7);
const told = protocol.shotsOf({
  prompts: given.shots.map(({block, prompt, transition}) => ({block, text: prompt, transition})),
});
const limits = {rewind_blocks: 3};
const back = [1, 2, 7].map((block) => canGoBack({model: {limits}, made: 4, making: 5}, block));
const prompts = Array.from({length: 50}, () => anyPrompt());
const {shots} = state;
console.log(JSON.stringify({unpacked, blocks, starts, phases, shots, script, prompts, told, back}));
"""


@pytest.fixture(scope="module")
def node() -> dict:
  """What the page's own modules make of messages of the server."""
  program = shutil.which("node")
  if program is None:
    pytest.skip("there is no node, which runs modules outside a browser")
  import base64

  frames = np.zeros((5, FACTS.height, FACTS.width, 3), np.uint8)
  messages = encode_block(frames, 0, 0, Form("webp", 100, 3))
  session = {"type": "session", "id": "session_1", "seed": 7, "width": 32, "height": 16, "fps": 24}
  session |= {"block": 0} | {
    "first_block_frames": 5,
    "block_frames": 8,
    "most_blocks": 9,
    "prompt": "a",
  }
  given = {
    "first": FACTS.first_frame(1),
    "per": FACTS.block_frames,
    "messages": [base64.b64encode(message).decode() for message in messages],
    "frames": [0, 4, 5, 12, 13],
    "events": [
      session | {"position": 0, "paused": False},
      {"type": "rewound", "block": 0, "first_frame": 0},
      {"type": "ended", "reason": "length", "saved": False},
    ],
    "shots": [
      {"block": 0, "prompt": "a", "transition": "keep"},
      {"block": 2, "prompt": "b", "transition": "cut"},
      {"block": 9, "prompt": "c", "transition": "recache"},
    ],
  }
  done = subprocess.run(
    [program, "--input-type=module", "-e", NODE],
    cwd=PAGE,
    input=json.dumps(given),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_the_page_counts_and_unpacks_as_the_server_does(node: dict):
  assert node["blocks"] == [FACTS.block_at(frame) for frame in (0, 4, 5, 12, 13)]
  assert node["starts"] == [FACTS.first_frame(block) for block in (0, 1, 2, 9)]
  first, second = node["unpacked"]
  assert (first["block"], first["firstFrame"], first["last"]) == (0, 0, False)
  assert (second["firstFrame"], second["last"]) == (3, True)
  assert [len(message["frames"]) for message in (first, second)] == [3, 2]
  assert first["frames"][0][0] == "image/webp" and first["frames"][0][1] > 0
  assert (second["end"], second["ahead"]) == (5, 5)


def test_states_follow_what_the_server_says(node: dict):
  assert node["phases"] == ["connecting", "waiting", "waiting", "ended"]
  assert node["shots"] == [{"block": 0, "prompt": "a", "transition": "keep"}]


def test_the_script_of_a_session_is_one_that_the_server_takes(node: dict):
  from longlive_jax.serve.limits import Limits
  from longlive_jax.serve.video_request import script_of

  script = script_of({"script": node["script"]}, FACTS, Limits())
  assert script.seed == 7
  told = [(shot.prompt, FACTS.blocks_of(shot), shot.transition) for shot in script.shots]
  assert told[0][:2] == ("a", 2) and told[1] == ("b", 4, "cut")


def test_the_page_knows_what_was_said_and_how_far_it_can_go_back(node: dict):
  transitions = [(shot["block"], shot["prompt"], shot["transition"]) for shot in node["told"]]
  assert transitions == [(0, "a", "keep"), (2, "b", "cut"), (9, "c", "recache")]
  assert node["back"] == [False, True, True]


def test_prompts_drawn_at_random_are_short_enough(node: dict):
  assert all(len(prompt) < MAX_CAPTION_BYTES for prompt in node["prompts"])


def test_the_page_says_only_what_the_server_understands():
  text = "\n".join(path.read_text() for path in SCRIPTS)
  sent = set(re.findall(r'link\.(?:send|ask)\("(\w+)"', text))
  sent |= set(re.findall(r'\{type: "(start|resume_session)", ', text))
  assert {"played", "rewind", "fork", "start", "resume_session"} <= sent <= set(KINDS)
  assert parse('{"type": "played", "id": 3, "position": 5}').kind == "played"
