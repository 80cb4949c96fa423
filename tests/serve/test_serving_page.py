"""The clients in docs/serving.md work as they are written, and the page names all there is."""

import json
import re
from pathlib import Path

import pytest

from longlive_jax.io.video import read_video
from longlive_jax.serve.messages import KINDS
from tests.serve.running import running
from tests.test_readme import BLOCK, flags_of


@pytest.fixture(scope="module")
def page(root: Path) -> str:
  return (root / "docs" / "serving.md").read_text()


def test_the_clients_of_the_page(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "outputs").mkdir()
  found = [m for m in BLOCK.finditer(page) if m["kind"] == "python" and m["note"]]
  clients = [m["text"] for m in found]
  assert len(clients) == 2
  with running() as run:
    for text in clients:
      assert ":8000" in text
      text = text.replace(":8000", f":{run.port}").replace("sleep(1)", "sleep(0.01)")
      exec(compile(text, "serving.md", "exec"), {"__name__": "page"})
  assert len(read_video("outputs/live.mp4")) == 5 + 3 * 8
  assert len(read_video("outputs/video.mp4")) == 12 * 8 - 3


def test_the_page_names_every_message_and_flag(page: str, root: Path):
  table = page.partition("### From the client")[2].partition("### From the server")[0]
  cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()]
  for kind, fields in KINDS.items():
    (given,) = [row[1] for row in cells if len(row) == 2 and f"`{kind}`" in row[0]]
    assert set(re.findall(r"`(\w+)`", given)) == set(fields), kind
  flags = flags_of("launch.serve") - {"help", "debug", "config"}
  assert not [flag for flag in flags if f"`--{flag}`" not in page]


def test_the_page_names_every_event_and_code(page: str, root: Path):
  source = "\n".join(p.read_text() for p in (root / "longlive_jax" / "serve").glob("*.py"))
  events = set(re.findall(r'event\(\s*"(\w+)"', source)) | {"frames"}
  told = page.partition("### From the server")[2].partition("close code")[0]
  assert events == set(re.findall(r"^\| `(\w+)` \|", told, re.M)) - {"type"}
  codes = set(re.findall(r'Refused\(\s*\d+, "(\w+)"', source))
  assert not [code for code in codes if f"`{code}`" not in page]


def test_examples_of_messages_are_messages(page: str):
  from longlive_jax.serve.messages import parse

  blocks = [m["text"] for m in BLOCK.finditer(page) if m["kind"] == "json"]
  (messages,) = [json.loads(text) for text in blocks if text.startswith("[")]
  for message in messages:
    assert parse(json.dumps(message)).kind == message["type"]
