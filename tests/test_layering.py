"""The house rules, read from the source: who may import whom, and limits on size and style."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "longlive_jax"
ORDER = (
  "types",
  "checks",
  "kernels",
  "config",
  "io",
  "data",
  "model",
  "parallel",
  "quant",
  "sample",
  "eval",
  "train",
  "convert",
  "weights",
  "build",
  "serve",
  "launch",
)
BROAD = ("Exception", "BaseException")
Rule = Callable[[ast.Module, Path], Iterator[str]]


def layer_of(parts: tuple[str, ...]) -> str | None:
  """The layer of a dotted name or path, or None where none is meant (the API, third parties)."""
  if parts[0] == "configs":
    return "config"
  if parts[0] == "launch":
    return "launch"
  if parts[0] != LIBRARY or len(parts) == 1 or parts[1] == "__init__":
    return None
  home = ROOT / LIBRARY / parts[1]
  known = parts[1] in ORDER or home.is_dir() or home.with_suffix(".py").is_file()
  return parts[1] if known else None


def imported_names(tree: ast.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
  """Yields (line, dotted parts) of everything that is imported, wherever it stands."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, tuple(alias.name.split("."))
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      for alias in node.names:
        yield node.lineno, (*(node.module or "").split("."), alias.name)


def imports_to_the_right(tree: ast.Module, path: Path) -> Iterator[str]:
  """A package imports itself and packages to its left."""
  own = layer_of(path.with_suffix("").parts)
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.level:
      yield f"{node.lineno}: relative import"
  for line, parts in imported_names(tree):
    if parts[0] == "tests":
      yield f"{line}: imports tests"
    other = layer_of(parts)
    if other is None:
      if own not in (None, "launch") and parts[0] == LIBRARY:
        yield f"{line}: imports the public API from inside"
      continue
    if other not in ORDER:
      yield f"{line}: layer '{other}' has no place in ORDER"
    elif own is not None and ORDER.index(other) > ORDER.index(own):
      yield f"{line}: {own} imports {other}, which is to its right"


def dropped_replace(tree: ast.Module, path: Path) -> Iterator[str]:
  """`state.replace(...)` as a statement does nothing: its result is the new value."""
  for node in ast.walk(tree):
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
      continue
    called = node.value.func
    if not (isinstance(called, ast.Attribute) and called.attr == "replace"):
      continue
    if not (isinstance(called.value, ast.Name) and called.value.id == "os"):
      yield f"{node.lineno}: the result of replace() is dropped"


def long_file(tree: ast.Module, path: Path) -> Iterator[str]:
  """Files have at most 300 lines, tests 600."""
  most = 600 if path.parts[0] == "tests" else 300
  lines = len((ROOT / path).read_text().splitlines())
  if lines > most:
    yield f"{lines} lines, more than {most}"


def long_function(tree: ast.Module, path: Path) -> Iterator[str]:
  """Functions have at most 50 lines, kernels 80."""
  most = 80 if "kernels" in path.parts else 50
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = (node.end_lineno or node.lineno) - node.lineno + 1
      if lines > most:
        yield f"{node.lineno}: {node.name} has {lines} lines, more than {most}"


def forbidden_calls(tree: ast.Module, path: Path) -> Iterator[str]:
  """No print, no assert, no environment variables in the library."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
      yield f"{node.lineno}: print"
    if isinstance(node, ast.Assert):
      yield f"{node.lineno}: assert"
    if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
      yield f"{node.lineno}: os.{node.attr}"
    if isinstance(node, ast.ImportFrom) and node.module == "os":
      names = {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
      yield from (f"{node.lineno}: imports {name}" for name in names)


def broad_except(tree: ast.Module, path: Path) -> Iterator[str]:
  """Errors are caught by name."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ExceptHandler):
      caught = ast.walk(node.type) if node.type else [ast.Name("Exception")]
      if any(isinstance(name, ast.Name) and name.id in BROAD for name in caught):
        yield f"{node.lineno}: broad except"


def missing_docstring(tree: ast.Module, path: Path) -> Iterator[str]:
  """Modules, and public classes and functions at their top, say what they are for."""
  if not ast.get_docstring(tree):
    yield "1: the module has no docstring"
  for node in tree.body:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
      continue
    if not ast.get_docstring(node):
      yield f"{node.lineno}: {node.name} has no docstring"


def missing_annotation(tree: ast.Module, path: Path) -> Iterator[str]:
  """All arguments and results are annotated."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef):
      continue
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
    bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    if bare:
      yield f"{node.lineno}: {node.name}({', '.join(bare)}) is not annotated"
    if node.returns is None and node.name != "__init__":
      yield f"{node.lineno}: {node.name} has no result type"


def unfinished(tree: ast.Module, path: Path) -> Iterator[str]:
  """Notes of things to do belong to the tracker."""
  words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
  for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
    if any(word in line for word in words):
      yield f"{number}: unfinished"


PROGRAM = (LIBRARY, "configs", "launch")
RULES: dict[Rule, tuple[str, ...]] = {
  imports_to_the_right: PROGRAM,
  dropped_replace: (*PROGRAM, "tests"),
  long_file: (*PROGRAM, "tests"),
  long_function: PROGRAM,
  forbidden_calls: (LIBRARY,),
  broad_except: PROGRAM,
  missing_docstring: PROGRAM,
  missing_annotation: PROGRAM,
  unfinished: (*PROGRAM, "tests"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule):
  found = []
  for folder in RULES[rule]:
    for file in sorted((ROOT / folder).rglob("*.py")):
      path = file.relative_to(ROOT)
      tree = ast.parse(file.read_text(), str(path))
      found += [f"{path}:{line}" for line in rule(tree, path)]
  assert not found, f"{rule.__doc__}\n" + "\n".join(found)


SAMPLES = [
  (imports_to_the_right, "longlive_jax/model/x.py", "from longlive_jax.sample import rollout"),
  (imports_to_the_right, "longlive_jax/model/x.py", "def f():\n  import longlive_jax.train.loop"),
  (imports_to_the_right, "longlive_jax/checks.py", "from longlive_jax import config"),
  (imports_to_the_right, "longlive_jax/build.py", "import launch.sample"),
  (imports_to_the_right, "longlive_jax/io/x.py", "from . import video"),
  (imports_to_the_right, "configs/x.py", "from longlive_jax.io.video import write_video"),
  (dropped_replace, "a.py", "state.replace(step=1)"),
  (forbidden_calls, "a.py", "print(1)"),
  (forbidden_calls, "a.py", "assert x"),
  (forbidden_calls, "a.py", "import os\nos.environ['A'] = '1'"),
  (forbidden_calls, "a.py", "from os import getenv"),
  (broad_except, "a.py", "try:\n  f()\nexcept:\n  pass"),
  (broad_except, "a.py", "try:\n  f()\nexcept (OSError, Exception):\n  pass"),
  (long_function, "a.py", "def f():\n" + "  x = 1\n" * 50),
  (missing_docstring, "a.py", "x = 1"),
  (missing_annotation, "a.py", "def f(x) -> int: ..."),
]


@pytest.mark.parametrize(("rule", "path", "source"), SAMPLES)
def test_a_rule_sees_its_offence(rule, path, source):
  assert list(rule(ast.parse(source), Path(path)))


INNOCENT = [
  (imports_to_the_right, "longlive_jax/sample/x.py", "from longlive_jax.model import dit"),
  (imports_to_the_right, "longlive_jax/__init__.py", "from longlive_jax.build import Pipeline"),
  (imports_to_the_right, "launch/x.py", "from longlive_jax import Pipeline\nimport jax"),
  (dropped_replace, "a.py", "state = state.replace(step=1)\nos.replace(a, b)"),
  (broad_except, "a.py", "try:\n  f()\nexcept (OSError, ValueError):\n  pass"),
]


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT)
def test_a_rule_spares_the_innocent(rule, path, source):
  assert not list(rule(ast.parse(source), Path(path)))
