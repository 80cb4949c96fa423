"""A plan as a table for a terminal: GiB, TFLOP, and a note where a number is an estimate."""

from collections.abc import Mapping

import jax

from longlive_jax.config import Experiment
from longlive_jax.eval.flops import peak_flops
from longlive_jax.eval.plan import REACHED, Plan, make_plan
from longlive_jax.types import HALF, SEQ

GIB = 2**30
NOTES = {
  "kept by the forward": "see train.remat",
  "a layer in its backward": "an estimate, see docs/plan.md",
  "computed again": "see train.remat; logits of attention",
  "parameters gathered": "forward and backward, as rings send them",
}
Row = tuple[str, str, str]


def dry_run(experiment: Experiment, devices: int | None = None, device_kind: str = "") -> str:
  """The table of a run that is not started.

  Args:
    experiment: checked experiment.
    devices: that there would be; None for those there are.
    device_kind: of them; empty for that of those there are, unless another number is given.

  Raises:
    ValueError: see `make_plan`.
  """
  if devices is None:
    kind = jax.devices()[0].device_kind
    device_kind = device_kind or (kind if peak_flops(kind) else "")
  return format_plan(make_plan(experiment, devices or jax.device_count(), device_kind))


def gib(count: float) -> str:
  """Bytes in GiB."""
  return f"{count / GIB:.2f} GiB"


def section(title: str, rows: list[Row]) -> list[Row]:
  """Rows below a title."""
  return [
    ("", "", ""),
    (title, "", ""),
    *((f"  {name}", value, note) for name, value, note in rows),
  ]


def with_total(numbers: Mapping[str, float], unit: float, name: str, digits: int = 2) -> list[Row]:
  """Numbers in a unit, and their sum."""
  rows = [
    (kind, f"{n / unit:.{digits}f} {name}", NOTES.get(kind, "")) for kind, n in numbers.items() if n
  ]
  return [*rows, ("total", f"{sum(numbers.values()) / unit:.{digits}f} {name}", "")]


def mesh_rows(plan: Plan) -> list[Row]:
  """The mesh and what there is in it."""
  note = " x ".join(f"{name} {size}" for name, size in plan.axes.items())
  legal = ", ".join(map(str, plan.legal_seq))
  if plan.used < plan.devices:
    note += f"; {plan.devices - plan.used} are not used"
  return [
    ("devices", f"{plan.used}", note),
    ("parallel.seq", f"{plan.axes[HALF] * plan.axes[SEQ]}", f"can be {legal}"),
    *((f"parameters {name}", f"{n / 1e9:.3f} G", "") for name, n in plan.parameters.items()),
  ]


def whole_rows(plan: Plan) -> list[Row]:
  """Parameters that could not be split."""
  return [(w.path, gib(w.nbytes), " x ".join(map(str, w.shape))) for w in plan.whole]


def format_plan(plan: Plan) -> str:
  """The table, without a line feed at its end."""
  rows = mesh_rows(plan)
  rows += section("memory of a device", with_total(plan.device_bytes, GIB, "GiB"))
  if plan.host_bytes:
    full = ("banks of errors, full", gib(plan.host_bytes), f"{gib(plan.host_growth)} an update")
    rows += section("memory of the host", [full])
  rows += section("work of a device, an update", with_total(plan.flops, 1e12, "TFLOP", 1))
  if plan.seconds is not None:
    note = f"{plan.device_kind} at {REACHED:.0%} of its bfloat16 peak"
    rows.append(("  at least", f"{plan.seconds:.2f} s", note))
  if plan.used > 1:
    rows += section("sent by a device, an update", with_total(plan.sent, GIB, "GiB"))
  if plan.layer_sent:
    rows.append(("  all-to-all, forward of a layer", gib(plan.layer_sent), ""))
  handled = [(name, f"{count:,}", "") for name, count in plan.sizes.items()]
  rows += section("a device, an update", handled)
  if plan.whole:
    rows += section("whole on every device: their axis does not divide", whole_rows(plan))
  return table(rows)


def table(rows: list[Row]) -> str:
  """Names, values to the right, notes; a title is a row without the last two."""
  body = [row for row in rows if row[1]]
  first, second = (max(len(row[i]) for row in body) for i in range(2))
  lines = [
    f"{name:{first}}  {value:>{second}}  {note}".rstrip() if value else name
    for name, value, note in rows
  ]
  return "\n".join(lines)
