"""`python -m tests.parity --golden DIR`: every recorded file in DIR against this implementation.

Prints the largest error of each array beside its tolerance, then one line a file. The exit code
is 0 when everything that was compared is within its tolerance. Runs on the CPU in float32, as the
recorded numbers were made.
"""

import argparse
import sys
from pathlib import Path

import jax

from tests.parity.runner import check_file, find_files, line_of, summary_of


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
  parser.add_argument("--golden", required=True, type=Path, help="folder of .npz files")
  parser.add_argument("--only", default="", help="a set (rope) or a file (rope_dev)")
  parser.add_argument("--unread", action="store_true", help="list the arrays not looked at")
  options = parser.parse_args(arguments)
  try:
    files = find_files(options.golden, options.only)
  except ValueError as error:
    sys.stderr.write(f"{error}\n")
    return 1
  reports = []
  for file in files:
    print(file.name, flush=True)
    reports.append(check_file(file, lambda record: print(line_of(record), flush=True)))
    for name in reports[-1].unread if options.unread else ():
      print(f"  unread   {name}")
  print("\nsummary")
  for report in reports:
    print(f"  {summary_of(report)}")
  failed = [report.file for report in reports if report.failed]
  compared = sum(len(report.compared) for report in reports)
  print(f"FAILED: {', '.join(failed)}" if failed else f"passed: {compared} arrays")
  return 1 if failed else 0


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
