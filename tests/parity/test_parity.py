"""The runner: what it reports, and every recorded file of the repository."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.__main__ import main
from tests.parity.records import Compared, Refused, as_record, compare
from tests.parity.runner import NOT_BUILT, check_file, checkers, find_files, line_of, set_of

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.npz")), ids=lambda file: file.stem)
def test_recorded_file_is_within_tolerance(file):
  if set_of(file) in NOT_BUILT:
    pytest.skip(f"{file.name}: {NOT_BUILT[set_of(file)]}")
  report = check_file(file)
  wrong = [line_of(record) for record in report.compared if not record.passed]
  assert not report.problem and not report.no_checker
  assert report.compared and not wrong, "\n".join(wrong)


def test_no_set_has_both_a_checker_and_an_excuse():
  assert not set(checkers()) & set(NOT_BUILT)
  assert {"umt5", "rope", "scheduler", "wan_dit"} <= set(checkers())


@pytest.mark.parametrize(
  ("stem", "name"),
  [
    ("wan_dit_dev", "wan_dit"),
    ("wan_dit_s1", "wan_dit"),
    ("rope_other_seed", "rope"),
    ("rope", "rope"),
    ("nvfp4_dev", "nvfp4"),
    ("nvfp4_blocks_dev", "nvfp4_blocks"),
    ("strange_thing_dev", "strange_thing"),
  ],
)
def test_a_file_belongs_to_the_longest_known_name(stem, name):
  assert set_of(Path(f"{stem}.npz")) == name


def test_compare_passes_at_the_tolerance_and_fails_beyond():
  golden = np.array([1.0, 100.0])
  assert compare("a", golden + np.array([0.01, 0.1]), golden, 0.01, 1e-3).passed
  worse = compare("a", golden + np.array([0.02, 0.0]), golden, 0.01, 1e-3)
  assert not worse.passed and worse.error == pytest.approx(0.02)


@pytest.mark.parametrize("ours", [np.array([np.nan, 0.0]), np.zeros(3), np.zeros((1, 2))])
def test_compare_fails_on_nan_and_on_another_shape(ours):
  assert not compare("a", ours, np.zeros(2), 1.0, 1.0).passed


def test_plain_tuples_are_records():
  assert as_record(("a", 1e-6, 1e-4, True)) == Compared("a", 1e-6, 1e-4, 0.0, True)
  assert as_record(Refused("a", "why")) == Refused("a", "why")


def test_missing_and_empty_folders_are_errors_of_one_line(tmp_path, capsys):
  for folder, message in ((tmp_path / "no", "is not a folder"), (tmp_path, "holds no .npz")):
    assert main(["--golden", str(folder)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_only_names_the_sets_that_are_there():
  assert [file.name for file in find_files(GOLDEN, "rope")] == ["rope_dev.npz"]
  with pytest.raises(ValueError, match="'ropes' names no file .*rope, scheduler"):
    find_files(GOLDEN, "ropes")


def test_a_damaged_file_fails_and_the_others_still_run(tmp_path, capsys):
  whole = (GOLDEN / "scheduler_dev.npz").read_bytes()
  (tmp_path / "scheduler_cut.npz").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "scheduler_good.npz").write_bytes(whole)
  assert main(["--golden", str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert "FAILED: cannot read" in out and "FAILED: scheduler_cut.npz" in out
  assert "scheduler_good.npz: 61 of 61 arrays within tolerance" in out


def test_a_wrong_number_fails_by_name(tmp_path, capsys):
  with np.load(GOLDEN / "scheduler_dev.npz") as stored:
    arrays = dict(stored)
  arrays["fm/shift5/n4/extra/sigmas"] = arrays["fm/shift5/n4/extra/sigmas"] + np.float32(1e-3)
  np.savez(tmp_path / "scheduler_wrong.npz", **arrays)
  assert main(["--golden", str(tmp_path)]) == 1
  assert "FAILED   fm/shift5/n4/extra/sigmas" in capsys.readouterr().out


def test_a_missing_array_stops_the_file_with_its_name(tmp_path):
  with np.load(GOLDEN / "umt5_dev.npz") as stored:
    arrays = {name: stored[name] for name in stored.files if name != "in/ids"}
  np.savez(tmp_path / "umt5_less.npz", **arrays)
  report = check_file(tmp_path / "umt5_less.npz")
  assert report.failed and "in/ids" in report.problem


def test_sets_without_a_checker_are_listed_with_the_reason(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(NOT_BUILT, "later_part", "there is no such part yet")
  np.savez(tmp_path / "later_part_dev.npz", config_json="{}")
  assert main(["--golden", str(tmp_path)]) == 0
  expected = "later_part_dev.npz: no checker: there is no such part yet"
  assert expected in capsys.readouterr().out
