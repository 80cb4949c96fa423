"""The README and the pages in docs run as written.

Blocks of ```python run in order in one namespace. Of ```bash blocks, every `make X` must be a
target and every `python -m X --flag=...` a module with such flags. An HTML comment right before a
block changes that: `<!-- not run: reason -->` skips it, `<!-- run -->` also executes its commands;
where the page shows what they print, they must print that.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longlive_jax.config.walk import check_setting_name

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
  r"(?:<!--\s*(?P<note>[^>]*?)\s*-->\s*\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S
)


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block: its language, text, line, and the comment before it."""

  kind: str
  text: str
  line: int
  note: str


def blocks(markdown: str) -> list[Block]:
  """All blocks that are not marked `not run`; a mark must give its reason."""
  found = []
  for match in BLOCK.finditer(markdown):
    note = match["note"] or ""
    line = markdown[: match.start("text")].count("\n") + 1
    if note.startswith("not run"):
      assert re.fullmatch(r"not run: .+", note), f"line {line}: say why it is not run"
      continue
    found.append(Block(match["kind"], match["text"], line, note))
  return found


def commands(block: Block) -> list[list[str]]:
  """The commands of a bash block, without comments, prompts and what they print."""
  lines = block.text.replace("\\\n", " ").splitlines()
  if any(line.startswith("$ ") for line in lines):
    lines = [line[2:] for line in lines if line.startswith("$ ")]
  split = [shlex.split(line, comments=True) for line in lines]
  return [words for words in split if words]


def printed(block: Block) -> str:
  """What a block with prompts shows of the output of its commands."""
  lines = block.text.replace("\\\n", " ").splitlines()
  if not any(line.startswith("$ ") for line in lines):
    return ""
  return "\n".join(line for line in lines if not line.startswith("$ ")).strip()


def make_targets() -> set[str]:
  """The targets of the Makefile."""
  return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.M))


def flags_of(module: str) -> set[str]:
  """Names of the flags that a module defines, by absl or argparse."""
  spec = importlib.util.find_spec(module)
  assert spec and spec.origin, f"there is no module {module}"
  names = {"help", "debug"}
  for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
    if not isinstance(node, ast.Call):
      continue
    called = ast.unparse(node.func)
    first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
    if called == "define_config_flag":
      names.add("config")
    elif called == "define_process_flags":
      names |= flags_of("launch.processes")
    elif "DEFINE_" in called or called.endswith("add_argument"):
      names.add(str(first).lstrip("-"))
  return names


def has_default_config(module: str) -> bool:
  """Whether a program has a configuration that it takes when none is given."""
  spec = importlib.util.find_spec(module)
  return bool(spec and spec.origin) and "default_config" in Path(spec.origin).read_text()


def check_command(words: list[str]) -> None:
  """Fails unless a command could run: module, flags, settings and files that it reads exist."""
  if words[0] == "make":
    targets = {word for word in words[1:] if "=" not in word}
    assert targets <= make_targets(), f"no such make target: {targets - make_targets()}"
  if not re.fullmatch(r"(\S*/)?python3?", words[0]) or words[1:2] != ["-m"]:
    return
  module, arguments = words[2], words[3:]
  known = flags_of(module)
  given = {argument[2:].partition("=")[0] for argument in arguments}
  needs = "config" in known and not has_default_config(module)
  assert not needs or "config" in given, f"{module} needs --config"
  for argument in arguments:
    if not argument.startswith("--"):
      continue
    name, _, value = argument[2:].partition("=")
    if "." in name:
      check_setting_name(name.partition(".")[2])
      name = name.partition(".")[0]
    assert name in known, f"{module} has no flag --{name}"
    path = value.partition(":")[0]
    if path.startswith("configs/"):
      assert (ROOT / path).is_file(), f"there is no file {path}"


def missing_links(markdown: str, folder: Path) -> list[str]:
  """Links to files of this repository that do not exist."""
  targets = re.findall(r"\]\(([^)\s#]+)", markdown)
  return [t for t in targets if "://" not in t and not (folder / t).exists()]


def check_page(markdown: str, name: str = "page") -> None:
  """Checks, and runs where it is asked for, all blocks of a page."""
  namespace: dict[str, object] = {"__name__": "page"}
  for block in blocks(markdown):
    where = f"{name}:{block.line}"
    if block.kind == "python":
      code = compile("\n" * (block.line - 1) + block.text, name, "exec")
      exec(code, namespace)
    elif block.kind == "json":
      json.loads(block.text)
    elif block.kind in ("bash", "sh", "console"):
      for words in commands(block):
        check_command(words)
        if block.note == "run":
          program = sys.executable if words[0] == "python" else words[0]
          done = subprocess.run([program, *words[1:]], cwd=ROOT, capture_output=True, text=True)
          assert done.returncode == 0, f"{where}: {shlex.join(words)}\n{done.stderr}"
          if wanted := printed(block):
            assert done.stdout.strip() == wanted, f"{where}: {shlex.join(words)} prints otherwise"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(ROOT)
  text = path.read_text()
  check_page(text, path.name)
  assert not missing_links(text, path.parent)


def test_the_checks_see_the_readme():
  kinds = {block.kind for block in blocks((ROOT / "README.md").read_text())}
  assert {"bash", "python"} <= kinds


def test_a_broken_link_is_found():
  assert missing_links("[a](nowhere.md) [b](README.md#x) [c](https://x.org)", ROOT) == [
    "nowhere.md"
  ]


def test_pictures_of_the_pages_can_be_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(ROOT)
  command = [sys.executable, "docs/pictures.py", f"--out={tmp_path}"]
  environment = {**os.environ, "MPLBACKEND": "Agg"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert {p.name for p in tmp_path.iterdir()} == {*("cache.png", "shapes.png", "training.png")}


def test_records_are_drawn_under_the_roofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  def record(suite: str, name: str, tflops: float | None, gigabytes: float | None) -> str:
    rates = {"tflops_per_second": tflops, "gigabytes_per_second": gigabytes}
    made = {"suite": suite, "case": suite, "implementation": name, "device": "made up", **rates}
    return json.dumps(made)

  lines = [
    record("gemm", "bfloat16", 700.0, 400.0),
    record("gemm", "fp8 product", 1500.0, 500.0),
    record("vae", "conv3d", 556.0, 200.0),
    record("vae", "2 a call", 531.0, None),
    record("elementwise", "jnp", None, 3900.0),
    json.dumps({"loss": 0.5}),
  ]
  (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
  (tmp_path / "others.jsonl").write_text(lines[-1])
  monkeypatch.chdir(ROOT)
  environment = {**os.environ, "MPLBACKEND": "Agg"}

  def drawn(name: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(tmp_path / f"{name}.jsonl"), f"--out={tmp_path / name}.png"]
    command = [sys.executable, "docs/roofline.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)

  done = drawn("records")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "records.png").stat().st_size > 10_000
  done = drawn("others")
  assert done.returncode == 2 and "no records of the suites attention, elementwise" in done.stderr


def page(kind: str, text: str, note: str = "") -> str:
  return f"{note}\n```{kind}\n{text}\n```\n"


@pytest.mark.parametrize(
  "text",
  [
    page("bash", "make nonsense"),
    page("bash", "python -m launch.nonsense"),
    page("bash", "python -m launch.sample --nonsense=1"),
    page("bash", "python -m launch.sample --script=configs/scripts/demo.json"),
    page("bash", "python -m launch.sample --config=configs/nonsense.py"),
    page("bash", "python -m launch.sample \\\n  --config=configs/tiny.py --config.train.lrr=1"),
    page("bash", "$ make nonsense\nits output"),
    page("bash", "python -c 'raise SystemExit(3)'", "<!-- run -->"),
    page("python", "raise ValueError"),
    page("python", "x = 1") + page("python", "assert x == 2"),
    page("python", "x = 1", "<!-- not run -->"),
  ],
)
def test_wrong_pages_fail(text):
  with pytest.raises((AssertionError, ValueError, ModuleNotFoundError)):
    check_page(text)


@pytest.mark.parametrize(
  "text",
  [
    page("bash", "make demo test PYTHON=python3.13  # both"),
    page("bash", "$ make demo\nmake nonsense is only output"),
    page("bash", "python -m launch.sample --config=configs/tiny.py:i2v --config.sample.steps=8"),
    page("bash", "python -c 'pass'", "<!-- run -->"),
    page("bash", "make nonsense", "<!-- not run: it does not exist -->"),
    page("python", "x = 1") + page("python", "assert x == 1"),
    page("text", "anything"),
  ],
)
def test_right_pages_pass(text):
  check_page(text)
