"""Numbers of a run over its steps: JSON lines for programs, TensorBoard for people."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tensorboardX import SummaryWriter


class MetricWriter:
  """Appends to `FOLDER/metrics.jsonl` and to TensorBoard events in the same folder.

  Args:
    folder: created if it does not exist; a run that goes on appends.
  """

  def __init__(self, folder: str | Path):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
    self._events = SummaryWriter(str(folder))

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


def read_metrics(folder: str | Path) -> list[dict[str, float | None]]:
  """All lines of `FOLDER/metrics.jsonl`."""
  text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]
