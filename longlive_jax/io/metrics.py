"""Numbers of a run over its steps: JSON lines for programs, TensorBoard for people."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

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
  """Keeps the lines of steps up to `step`; one that was not written to its end is dropped too."""
  if not path.is_file():
    return
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
  if kept != lines:
    with replacing(path) as partial:
      partial.write_text("".join(kept), encoding="utf-8")


def read_metrics(folder: str | Path) -> list[dict[str, float | None]]:
  """All lines of `FOLDER/metrics.jsonl`."""
  text = (Path(folder) / LINES).read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]
