"""Metrics: JSON lines and TensorBoard."""

import math

from longlive_jax.io.metrics import MetricWriter, read_metrics


def test_lines_and_events(tmp_path):
  with MetricWriter(tmp_path / "run") as writer:
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": math.nan, "lr": 1e-4})
  with MetricWriter(tmp_path / "run") as writer:  # a run that goes on
    writer.write(3, {"loss": 0.25})
  lines = read_metrics(tmp_path / "run")
  assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, None), (3, 0.25)]
  assert lines[1]["lr"] == 1e-4
  assert list((tmp_path / "run").glob("events.out.tfevents.*"))
