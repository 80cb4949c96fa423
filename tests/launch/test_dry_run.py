"""`launch.train --dry_run`."""

from pathlib import Path

from tests.launch.tiny import TINY, Program


def test_a_dry_run_prints_the_plan_and_starts_nothing(program: Program, tmp_path: Path):
  flags = ("--dry_run", "--devices=4", "--config.parallel.fsdp=2", f"--workdir={tmp_path / 'run'}")
  done = program("train", *TINY, *flags, "--config.io.checkpoint=nowhere", "--device_kind=H200")
  assert done.code == 0 and not done.stderr
  for words in ("devices", "fsdp 2", "2 are not used", "memory of a device", "at least"):
    assert words in done.stdout
  assert not list(tmp_path.iterdir())


def test_a_mesh_that_cannot_be_made_is_one_line(program: Program):
  done = program("train", *TINY, "--dry_run", "--devices=1", "--config.parallel.fsdp=2")
  assert done.code != 0
  assert "parallel.fsdp=2 * parallel.seq=1 needs 2 devices; there are 1" in done.stderr
  assert "Traceback" not in done.stderr
