"""Numbers of a run over its steps: JSON lines for programs, TensorBoard for people."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from absl import logging
from tensorboardX import SummaryWriter

from longlive_jax.io.atomic import replacing

LINES = "metrics.jsonl"


class MetricWriter:
  """Appends to `FOLDER/metrics.jsonl` and to TensorBoard events in the same folder.

  Args:
    folder: created if it does not exist.
    done: steps that the run has done already. What is written there of later steps, by a run
      that was cut short, is dropped, because those steps come again. None keeps all.
  """

  def __init__(self, folder: str | Path, done: int | None = None):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if done is not None:
      drop_lines_after(folder / LINES, done)
    self._lines = (folder / LINES).open("a", encoding="utf-8")
    again = None if done is None else done + 1  # the first step that comes again
    name = f".{time.time_ns()}"  # two writers of the same second must not share a file
    self._events = SummaryWriter(str(folder), purge_step=again, filename_suffix=name)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of a step; a number that is not finite becomes null in the JSON."""
    numbers = {name: float(value) for name, value in values.items()}
    line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **line}) + "\n")
    self._lines.flush()
    for name, value in numbers.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    self._lines.close()
    self._events.close()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()


def drop_lines_after(path: Path, step: int) -> None:
  """Keeps the lines of steps up to `step`; a last one that is damaged or cut short is dropped too.

  Raises:
    ValueError: another line is damaged; names it.
  """
  if not path.is_file():
    return
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
  kept = []
  for number, line in enumerate(lines, 1):
    if not line.endswith("\n"):
      continue
    try:
      found = read_line(path, number, line)
    except ValueError as error:
      if number < len(lines):
        raise
      logging.warning("%s; it is dropped", error)
    else:
      kept += [line] if found["step"] <= step else []
  if kept != lines:
    with replacing(path) as partial:
      partial.write_text("".join(kept), encoding="utf-8")


def read_line(path: Path, number: int, line: str) -> dict[str, Any]:
  """The numbers of a line; raises ValueError, which names file and line, if it is damaged."""
  try:
    found = json.loads(line)
  except ValueError:
    found = None
  if not isinstance(found, dict) or not isinstance(found.get("step"), int):
    raise ValueError(f"'{path}' is damaged in line {number}; remove that line")
  return found


def read_metrics(folder: str | Path) -> list[dict[str, float | None]]:
  """All lines of `FOLDER/metrics.jsonl`; raises ValueError, which names one that is damaged."""
  path = Path(folder) / LINES
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  return [read_line(path, number, line) for number, line in enumerate(lines, 1)]
