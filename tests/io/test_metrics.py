"""Metrics: JSON lines and TensorBoard."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from longlive_jax.io.metrics import MetricWriter, read_metrics


def events(folder: Path) -> Iterator[Event]:
  """The events of each file: records of length, checksum, data, checksum."""
  for file in sorted(folder.glob("events.out.tfevents.*")):
    data = file.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def test_lines_and_events(tmp_path):
  with MetricWriter(tmp_path / "run") as writer:
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": math.nan, "lr": 1e-4})
  with MetricWriter(tmp_path / "run") as writer:  # a run that goes on
    writer.write(3, {"loss": 0.25})
  lines = read_metrics(tmp_path / "run")
  assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, None), (3, 0.25)]
  assert lines[1]["lr"] == 1e-4
  found = [
    (e.step, v.tag, v.simple_value) for e in events(tmp_path / "run") for v in e.summary.value
  ]
  assert (1, "loss", 0.5) in found and (3, "loss", 0.25) in found


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1.0}'])
def test_steps_that_come_again_are_dropped_in_both(tmp_path, tail):
  with MetricWriter(tmp_path, done=0) as writer:
    for step in (1, 2, 3, 4):
      writer.write(step, {"loss": step / 2})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(tail)  # of a run that was killed while it wrote
  with MetricWriter(tmp_path, done=2) as writer:
    writer.write(3, {"loss": 9.0})
  expected = [(1, 0.5), (2, 1.0), (3, 9.0)]
  assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
  starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
  assert starts == [1, 3]  # TensorBoard hides what came before from these steps on


DAMAGED = ["", "nonsense", "[1]", '{"loss": 1.0}', '{"step": "2"}', "\udcff"]


def write_lines(folder: Path, *lines: str) -> Path:
  path = folder / "metrics.jsonl"
  path.write_bytes("".join(f"{x}\n" for x in lines).encode(errors="surrogateescape"))
  return path


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_named(tmp_path, line):
  path = write_lines(tmp_path, '{"step": 1}', line, '{"step": 3}')
  before = path.read_bytes()
  for attempt in (lambda: MetricWriter(tmp_path, done=3), lambda: read_metrics(tmp_path)):
    with pytest.raises(ValueError, match=f"'{path}' is damaged in line 2; remove that line"):
      attempt()
  assert path.read_bytes() == before


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_last_line_is_dropped(tmp_path, line, caplog):
  path = write_lines(tmp_path, '{"step": 1}', line)
  MetricWriter(tmp_path, done=3).close()
  assert path.read_text() == '{"step": 1}\n'
  assert f"'{path}' is damaged in line 2" in caplog.text


def test_a_run_that_lost_nothing_keeps_its_file(tmp_path):
  with MetricWriter(tmp_path, done=0) as writer:
    writer.write(1, {"loss": 0.5})
  before = (tmp_path / "metrics.jsonl").stat().st_ino
  MetricWriter(tmp_path, done=1).close()
  assert (tmp_path / "metrics.jsonl").stat().st_ino == before
