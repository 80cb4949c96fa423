"""The benchmark of the server: its records, at sizes that take no time."""

import json

import pytest

from tests.launch.tiny import TINY, Program

QUICK = (*TINY, "--config.io.checkpoint=", "--rounds=2", "--blocks=2", "--rewind_blocks=1")


def test_the_server_is_timed_beside_the_library_alone(program: Program, tmp_path):
  out = tmp_path / "serve.jsonl"
  done = program("bench_serve", *QUICK, "--frame_format=webp", "--encoders=1", f"--out={out}")
  assert done.code == 0, done.stderr
  records = [json.loads(line) for line in out.read_text().splitlines()]
  assert [record["implementation"] for record in records] == ["stream", "session", "api"]
  table = [line.split() for line in done.stdout.splitlines()[-4:]]
  assert [row[0] for row in table] == ["way", "stream", "session", "api"] and len(table[-1]) == 7
  assert "compiling" in done.stdout and "round 2 of 2: stream, " in done.stdout
  stream, session, api = records
  for record in records:
    assert 0 < record["p10_seconds"] <= record["median_seconds"] <= record["p90_seconds"]
    assert record["frames_per_second"] == pytest.approx(8 / record["median_seconds"])
    over = record["median_seconds"] / session["median_seconds"]
    assert record["over"]["session"] == pytest.approx(over)
    assert record["repeats"] == 4 and record["device"] and record["versions"]["jax"]
  assert not stream["first_frames_seconds"] and len(session["first_frames_seconds"]) == 2
  assert len(api["first_frames_seconds"]) == 2 and min(api["first_frames_seconds"]) > 0
  assert api["model_seconds"] > 0 and api["encode_seconds"] >= 0  # in whole milliseconds
  assert api["server"]["form"]["format"] == "webp" and api["server"]["rewind_blocks"] == 1


def test_ways_that_are_not_known(program: Program, tmp_path):
  wrong = program("bench_serve", *QUICK, "--ways=pigeon", f"--out={tmp_path / 'x'}")
  assert wrong.code == 2 and "use some of stream, session, api" in wrong.stderr
  empty = program("bench_serve", *QUICK, "--ways=", f"--out={tmp_path / 'x'}")
  assert empty.code == 2 and "--ways is empty; use some of stream" in empty.stderr
