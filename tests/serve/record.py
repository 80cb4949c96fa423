"""Records of long runs for `benchmarks/results`: what ran, on what, and what came of it."""

import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from longlive_jax.eval.bench import setting

PACKAGES = ("h11", "pillow", "starlette", "uvicorn", "websockets")


def write_record(path: str, module: str, values: dict[str, Any]) -> None:
  """Writes a record as JSON, unless there is no path.

  Args:
    path: of the file.
    module: that runs, as `python -m` takes it.
    values: what came of it.
  """
  if not path:
    return
  given = [part for part in sys.argv[1:] if not part.startswith("--out")]
  where = setting()
  where["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
  record = {"command": shlex.join(["python", "-m", module, *given]), **values, **where}
  Path(path).write_text(json.dumps(record, indent=1) + "\n")
