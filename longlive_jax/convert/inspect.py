"""What a file or a checkpoint holds, and whether it fits a configuration: for people to read."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from longlive_jax.checks import suggest
from longlive_jax.config import Experiment
from longlive_jax.convert.jobs import checkpoint_networks
from longlive_jax.convert.keys_lora import HALVES
from longlive_jax.convert.networks import (
  NETWORKS,
  Form,
  best_form,
  layer_of,
  without_twins,
)
from longlive_jax.convert.sources import Source, open_source
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import foreign_shape
from longlive_jax.io.checkpoint import CONFIG, METADATA, read_metadata

COLUMNS = ("tensor", "dtype", "shape", "MB", "")


@dataclasses.dataclass(frozen=True)
class Line:
  """One tensor of the table; `problem` is empty where it fits."""

  name: str
  dtype: str
  shape: tuple[int, ...]
  nbytes: int
  goes_to: str = ""
  problem: str = ""


def describe(path: Path, experiment: Experiment, entry: str = "", *, every: bool = False) -> str:
  """A table of what there is; see `launch.convert inspect`.

  Args:
    path: a foreign file or folder, or a checkpoint of ours.
    experiment: the configuration that it is compared with.
    entry: container of a foreign file.
    every: list all tensors, not only what does not fit.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: it is damaged or unsafe.
  """
  if (path / CONFIG).is_file() and (path / METADATA).is_file():
    return describe_checkpoint(path, every)
  return describe_source(open_source(path, entry), experiment, every)


def describe_checkpoint(folder: Path, every: bool) -> str:
  """The networks of a checkpoint."""
  metadata = read_metadata(folder)
  text = [f"checkpoint '{folder}'"]
  text += [f"  {name}: {value}" for name, value in metadata.items() if name != "sources"]
  sources = metadata.get("sources")
  for source in sources if isinstance(sources, list) else []:
    text.append(f"  made of {source['name']}, {source['bytes']} bytes, sha256 {source['sha256']}")
  for name, leaves in checkpoint_networks(folder).items():
    text.append(summary(name, leaves))
    if every:
      lines = [Line(n, str(s.dtype), s.shape, s.nbytes) for n, s in leaves.items()]
      text += table(lines)
  return "\n".join(text)


def summary(name: str, tensors: Mapping[str, Stored]) -> str:
  """Counts of a network in one line."""
  count = sum(elements(stored.shape) for stored in tensors.values())
  size = sum(stored.nbytes for stored in tensors.values())
  kinds = Counter(str(stored.dtype) for stored in tensors.values())
  listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
  return f"{name}: {len(tensors)} tensors ({listed}), {count:,} numbers, {size / 1e6:,.1f} MB"


def elements(shape: Iterable[int]) -> int:
  """Numbers of a tensor."""
  count = 1
  for size in shape:
    count *= size
  return count


def describe_source(source: Source, experiment: Experiment, every: bool) -> str:
  """A foreign file against the network that it fits best."""
  text = [f"'{source.path}'"]
  if source.entries:
    chosen = f", '{source.entry}' is taken" if source.entry else ""
    text.append(f"  entries: {', '.join(source.entries)}{chosen}")
  text += [f"  {name}: {short(value)}" for name, value in source.notes.items()]
  text.append(summary(source.entry or "tensors", source.tensors))
  if source.dropped:
    text.append(f"  {len(source.dropped)} tensors belong to no network: {source.dropped[0]}, ...")
  tensors = without_twins(source.tensors)
  form = likely_form(experiment, tensors)
  if form is None:
    return "\n".join([*text, "these are the names of no network that is known here"])
  lines = compared(form, tensors)
  wrong = [line for line in lines if line.problem]
  fitting = {line.goes_to for line in lines} - {"", *(line.goes_to for line in wrong)}
  text.append(
    f"as {form.network} with {form.dialect} names: {len(fitting)} of {len(form.rows)}"
    f" fit, {len(wrong)} problems"
  )
  return "\n".join(text + table(lines if every else wrong))


def short(value: object) -> str:
  """A value of the notes, not too long."""
  text = " ".join(str(value).split())
  return text if len(text) <= 160 else f"{text[:157]}..."


def likely_form(experiment: Experiment, tensors: Mapping[str, Stored]) -> Form | None:
  """The network whose names these are most; None where none has any of them."""
  is_lora = any(f".{half}." in name for name in tensors for half in HALVES.values())
  names = [name for name in NETWORKS if (name == "lora") == is_lora]
  forms = [best_form(experiment, name, tensors) for name in names]
  best = max(forms, key=lambda form: form.hits(tensors))
  return best if best.hits(tensors) else None


def compared(form: Form, tensors: Mapping[str, Stored]) -> list[Line]:
  """A line for every tensor that is there, and for every one that is missing."""
  rows = {layer_of(row.key): row for row in form.rows}
  lines, seen = [], set()
  free = [row.key for row in form.rows if row.key not in tensors]
  for name, stored in tensors.items():
    row, problem, goes_to = rows.get(layer_of(name)), "", ""
    if row is None:
      problem = f"unknown{suggest(name, free)}"
    else:
      seen.add(row.key)
      goes_to, wanted = row.place, foreign_shape(row, form.shape(row))
      if name == row.key and stored.shape != wanted:
        problem = f"must be {list(wanted)}"
    lines.append(Line(name, str(stored.dtype), stored.shape, stored.nbytes, goes_to, problem))
  for row in form.rows:
    if row.key not in seen:
      wanted = foreign_shape(row, form.shape(row))
      lines.append(Line(row.key, "", wanted, 0, row.place, "missing"))
  return lines


def table(lines: list[Line]) -> list[str]:
  """Lines in columns."""
  if not lines:
    return []
  cells = [COLUMNS] + [
    (
      line.name,
      line.dtype,
      "x".join(map(str, line.shape)),
      f"{line.nbytes / 1e6:.2f}",
      line.problem or (f"-> {line.goes_to}" if line.goes_to else ""),
    )
    for line in lines
  ]
  widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS) - 1)]
  return [
    "  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
    for row in cells
  ]
