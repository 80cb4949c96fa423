"""Draws what benchmarks measured under the roofs of the device: `python docs/roofline.py`.

Reads records of `launch.bench`, by default those in benchmarks/results. On the left of roofline.png
is every job that multiplies and whose bytes are known, on the right, if any were measured, what
passes that do not multiply read and write. The roofs are those of one NVIDIA H200: memory by the
data sheet, products as measured.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SUITES = ("attention", "elementwise", "gemm", "vae")
MEMORY = 4.8  # TB/s
ROOFS = {"bfloat16": 790.0, "fp8": 1520.0}  # TFLOP/s
MARKERS = {"bfloat16": "o", "fp8": "s", "nvfp4": "^"}
Record = dict[str, Any]


def read(files: Iterable[Path]) -> list[Record]:
  """Records of the suites that are drawn; other lines of JSON are passed over."""
  lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
  return [line for line in lines if isinstance(line, dict) and line.get("suite") in SUITES]


def precision(record: Record) -> str:
  """Of what is multiplied: a key of MARKERS."""
  name = record["implementation"]
  return next((kind for kind in ("fp8", "nvfp4") if name.startswith(kind)), "bfloat16")


def draw_roofs(axes: plt.Axes, least: float, most: float) -> None:
  """The lines that no point can be above, between two numbers of operations a byte."""
  x = np.geomspace(least, most, 200)
  for kind, roof in ROOFS.items():
    style = "-" if kind == "bfloat16" else "--"
    label = f"{kind}: {roof:.0f} TFLOP/s, {MEMORY} TB/s"
    axes.plot(x, np.minimum(MEMORY * x, roof), style, color="#3b3b3b", linewidth=1, label=label)


def draw_products(axes: plt.Axes, records: list[Record]) -> None:
  """A point for each record: a colour for each case, a marker for each precision."""
  cases = list(dict.fromkeys(record["case"] for record in records))
  colours = plt.get_cmap("tab20")
  per_byte = [1e3 * r["tflops_per_second"] / r["gigabytes_per_second"] for r in records]
  draw_roofs(axes, min(per_byte, default=1.0) / 2, 2 * max(per_byte, default=1e4))
  for record, x in zip(records, per_byte, strict=True):
    colour = colours(cases.index(record["case"]) % 20)
    marker = MARKERS[precision(record)]
    axes.plot(x, record["tflops_per_second"], marker, color=colour, markersize=5)
  for case in cases:
    axes.plot([], [], "o", color=colours(cases.index(case) % 20), label=case)
  for kind, marker in MARKERS.items():
    axes.plot([], [], marker, color="#9e9e9e", label=kind)
  axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
  axes.yaxis.set_major_formatter("{x:.0f}")
  axes.yaxis.set_minor_formatter("{x:.0f}")
  axes.grid(color="#f2f2f2")
  axes.legend(frameon=False, fontsize=7)


def draw_passes(axes: plt.Axes, records: list[Record]) -> None:
  """A bar for each record, beside the memory's rate."""
  by_kernel = [record["implementation"] != "jnp" for record in records]
  ends = [", by a kernel" if each else "" for each in by_kernel]
  names = [record["case"] + end for record, end in zip(records, ends, strict=True)]
  colours = ["#3182bd" if each else "#9ecae1" for each in by_kernel]
  axes.barh(range(len(names)), [r["gigabytes_per_second"] / 1e3 for r in records], color=colours)
  axes.set_yticks(range(len(names)), names)
  axes.invert_yaxis()
  axes.axvline(MEMORY, color="#3b3b3b", linewidth=1)
  axes.set(xlabel="TB/s", title="read and written")


def draw(records: list[Record], path: Path) -> None:
  """The picture of these records."""
  known = [record for record in records if record["gigabytes_per_second"]]
  passes = [record for record in known if not record["tflops_per_second"]]
  widths = (2.4, 1) if passes else (2.4,)
  figure, grid = plt.subplots(
    1, len(widths), figsize=(sum(widths) * 3.2, 4.8), squeeze=False, width_ratios=widths
  )
  figure.set_layout_engine("constrained")
  axes = grid[0]
  draw_products(axes[0], [record for record in known if record["tflops_per_second"]])
  if passes:
    draw_passes(axes[1], passes)
  axes[0].set_title(", ".join(sorted({record["device"] for record in records})))
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("files", type=Path, nargs="*", help="JSONL of launch.bench")
  parser.add_argument("--out", type=Path, default=Path(__file__).with_name("roofline.png"))
  given = parser.parse_args()
  files = given.files or sorted(RESULTS.glob("*.jsonl"))
  records = read(files)
  if not records:
    parser.error(f"no records of the suites {', '.join(SUITES)} in {len(files)} files")
  draw(records, given.out)


if __name__ == "__main__":
  main()
