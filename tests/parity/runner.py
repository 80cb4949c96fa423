"""Finds recorded files and their checkers, runs them, and writes the report."""

import dataclasses
import importlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from tests.parity.records import Compared, Refused, as_record

FOLDER = Path(__file__).parent
# sets of parts that this version does not have
NOT_BUILT: dict[str, str] = {}
HELPERS = ("__init__", "__main__", "networks", "nvfp4_linear", "records", "runner", "semantics")
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
WRONG_LAYOUT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Archive(Mapping[str, np.ndarray]):
  """The arrays of a file; remembers which ones were read."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self._arrays = arrays
    self.read: set[str] = set()

  def __getitem__(self, name: str) -> np.ndarray:
    array = self._arrays[name]
    self.read.add(name)
    return array

  def __contains__(self, name: object) -> bool:
    return name in self._arrays

  def __iter__(self) -> Iterator[str]:
    return iter(self._arrays)

  def __len__(self) -> int:
    return len(self._arrays)


@dataclasses.dataclass
class Report:
  """Result of one file.

  Attributes:
    file: its name.
    records: what was compared or refused, in order.
    problem: why the file could not be read or its checker stopped; "" = it went through.
    no_checker: why nothing was compared; "" = it was.
    unread: recorded results that no checker looked at.
  """

  file: str
  records: list[Compared | Refused] = dataclasses.field(default_factory=list)
  problem: str = ""
  no_checker: str = ""
  unread: list[str] = dataclasses.field(default_factory=list)

  @property
  def compared(self) -> list[Compared]:
    return [record for record in self.records if isinstance(record, Compared)]

  @property
  def failed(self) -> bool:
    return bool(self.problem) or not all(record.passed for record in self.compared)


def checkers() -> list[str]:
  """Names of the sets that have a checker."""
  return sorted(path.stem for path in FOLDER.glob("*.py") if is_checker(path.stem))


def is_checker(stem: str) -> bool:
  """Whether a module of this folder is a checker."""
  return stem not in HELPERS and not stem.startswith("test_")


def set_of(file: Path) -> str:
  """The set of a file: the longest known name it starts with, or its name without the tag."""
  known = [s for s in {*checkers(), *NOT_BUILT} if file.stem == s or file.stem.startswith(f"{s}_")]
  return max(known, key=len, default=file.stem.rpartition("_")[0] or file.stem)


def find_files(folder: Path, only: str = "") -> list[Path]:
  """Recorded files of a folder.

  Args:
    folder: where to look.
    only: keep the files of this set, or of this name without ".npz"; "" = all.

  Raises:
    ValueError: the folder is missing, or holds no such file.
  """
  if not folder.is_dir():
    raise ValueError(f"--golden '{folder}' is not a folder")
  files = sorted(folder.glob("*.npz"))
  if not files:
    raise ValueError(f"--golden '{folder}' holds no .npz file")
  chosen = [file for file in files if not only or only in (set_of(file), file.stem)]
  if not chosen:
    names = ", ".join(sorted({set_of(file) for file in files}))
    raise ValueError(f"--only '{only}' names no file of '{folder}'; it holds the sets {names}")
  return chosen


def read(file: Path) -> tuple[Archive, dict]:
  """All arrays of a file and its configuration, {} where it has none.

  Raises:
    ValueError: the file is damaged.
  """
  if not zipfile.is_zipfile(file):
    raise ValueError(f"cannot read {file}: it is damaged, or no .npz file")
  try:
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    config = json.loads(str(arrays.pop("config_json", "{}")))
  except UNREADABLE as error:
    raise ValueError(f"cannot read {file}: {type(error).__name__}: {error}") from error
  return Archive(arrays), config


def unread_results(archive: Archive) -> list[str]:
  """Recorded arrays, parameters and inputs aside, that were not looked at."""
  skipped = ("param/", "in/")
  return sorted(n for n in archive if n not in archive.read and not n.startswith(skipped))


def check_file(
  file: Path, show: Callable[[Compared | Refused], None] = lambda record: None
) -> Report:
  """Runs the checker of one file; `show` sees every record as it comes."""
  name, report = set_of(file), Report(file.name)
  if name in NOT_BUILT:
    report.no_checker = NOT_BUILT[name]
    return report
  if name not in checkers():
    report.no_checker = f"'{name}' is no set that is known here"
    return report
  try:
    archive, config = read(file)
  except ValueError as error:
    report.problem = str(error)
    return report
  check = importlib.import_module(f"tests.parity.{name}").check
  try:
    for item in check(archive, config):
      report.records.append(as_record(item))
      show(report.records[-1])
  except WRONG_LAYOUT as error:
    line = " ".join(str(error).split())
    report.problem = f"the checker stopped: {type(error).__name__}: {line}"
  if not report.records and not report.problem:
    report.problem = "the checker compared nothing"
  report.unread = unread_results(archive)
  return report


def line_of(record: Compared | Refused) -> str:
  """One line of the report."""
  if isinstance(record, Refused):
    return f"  refused  {record.name}: {record.reason}"
  verdict = "ok     " if record.passed else "FAILED "
  tolerance = f"{record.atol:.1e}" + (f" + {record.rtol:.0e} |x|" if record.rtol else "")
  note = f"  ({record.note})" if record.note else ""
  return f"  {verdict}  {record.name:<44} error {record.error:.2e}  tolerance {tolerance}{note}"


def summary_of(report: Report) -> str:
  """The last line about a file."""
  if report.no_checker:
    return f"{report.file}: no checker: {report.no_checker}"
  refused = len(report.records) - len(report.compared)
  passed = sum(record.passed for record in report.compared)
  text = f"{report.file}: {passed} of {len(report.compared)} arrays within tolerance"
  text += f", {refused} refused by design" if refused else ""
  text += f", {len(report.unread)} recorded arrays not looked at" if report.unread else ""
  return f"{text}; FAILED: {report.problem}" if report.problem else text
