"""launch.quant_report: every chosen layer, at every noise level, in one file."""

import json
from pathlib import Path

import pytest

from tests.launch.tiny import TINY, Program


def test_the_report_has_every_layer_and_level(
  program: Program, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setenv("MPLBACKEND", "Agg")
  script, out = tmp_path / "script.txt", tmp_path / "quant.json"
  script.write_text("one red circle\none blue square\n")
  where = (f"--config.io.checkpoint={checkpoint}", f"--script={script}", f"--out={out}")
  done = program("quant_report", *TINY, *where, "--timesteps=300,900")
  assert done.code == 0, done.stderr
  rows = json.loads(out.read_text())["rows"]
  weights = [row for row in rows if row["kind"] == "weight"]
  inputs = {(r["path"], r["layer"], r["timestep"]) for r in rows if r["kind"] == "activation"}
  assert len(weights) == 20 and len(inputs) == 40
  assert {level for _, _, level in inputs} == {300.0, 900.0}
  assert all(0 < row["relative_error"] < 0.3 for row in weights)
  assert out.with_suffix(".png").is_file()


def test_a_quantised_model_is_refused(program: Program, checkpoint: Path, tmp_path: Path):
  where = (f"--config.io.checkpoint={checkpoint}", f"--out={tmp_path / 'q.json'}")
  done = program("quant_report", *TINY, *where, "--config.quant.linears=nvfp4")
  assert done.code == 2 and "quant.linears=nvfp4 must be none here" in done.stderr
  assert not list(tmp_path.glob("q*"))
