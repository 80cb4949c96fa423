"""What a file or a checkpoint holds, and whether it fits a configuration: for people to read."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from longlive_jax.checks import suggest
from longlive_jax.config import Experiment
from longlive_jax.convert.checkpoints import open_checkpoint
from longlive_jax.convert.networks import FOLDERS, Form, layer_of, likely_form, without_twins
from longlive_jax.convert.safetensors_file import INDEX
from longlive_jax.convert.sources import Source, open_source, safetensors_files
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import foreign_shape
from longlive_jax.io.checkpoint import CONFIG, METADATA

SUFFIXES = (".safetensors", ".pt", ".pth")
MOST_PROBLEMS = 20  # listed without --all
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
  parts = files_of(path)
  if not parts:
    raise FileNotFoundError(f"the folder '{path}' holds no weights")
  return "\n".join(describe_source(open_source(p, entry), experiment, every) for p in parts)


def files_of(path: Path) -> list[Path]:
  """The files of weights in a folder, or in those of a Diffusers pipeline; a file is itself."""
  if not path.is_dir():
    return [path]
  inside = [path / name for name in FOLDERS.values() if (path / name).is_dir()]
  if inside:
    return inside
  indices = sorted(path.glob(f"*{INDEX}"))
  shards = {file for index in indices for file in safetensors_files(index)}
  others = {file for suffix in SUFFIXES for file in path.glob(f"*{suffix}")} - shards
  return [*indices, *sorted(others)]


def describe_checkpoint(folder: Path, every: bool) -> str:
  """The networks of a checkpoint."""
  found = open_checkpoint(folder)
  metadata = found.metadata
  text = [f"checkpoint '{folder}'"]
  text += [f"  {name}: {value}" for name, value in metadata.items() if name != "sources"]
  sources = metadata.get("sources")
  for source in sources if isinstance(sources, list) else []:
    values = source if isinstance(source, dict) else {}
    text.append("  made of " + ", ".join(f"{k} {v}" for k, v in values.items()))
  for name, leaves in found.networks.items():
    text.append(summary(name, leaves))
    if every:
      lines = [Line(n, str(s.dtype), s.shape, s.nbytes) for n, s in leaves.items()]
      text += table(lines)
  return "\n".join(text)


def summary(name: str, tensors: Mapping[str, Stored]) -> str:
  """Counts of a network in one line."""
  count = sum(math.prod(stored.shape) for stored in tensors.values())
  size = sum(stored.nbytes for stored in tensors.values())
  kinds = Counter(str(stored.dtype) for stored in tensors.values())
  listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
  return f"{name}: {len(tensors)} tensors ({listed}), {count:,} numbers, {size / 1e6:,.1f} MB"


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
  shown = lines if every else wrong[:MOST_PROBLEMS]
  left = 0 if every else len(wrong) - len(shown)
  more = [f"  ... and {left} more; --all lists everything"] if left else []
  if len(fitting) == 0 or len(wrong) > len(form.rows) // 2:
    more.append(
      f"  most sizes are not those of the configuration '{experiment.name}': see --config"
    )
  return "\n".join([*text, *table(shown), *more])


def short(value: object) -> str:
  """A value of the notes, not too long."""
  text = " ".join(str(value).split())
  return text if len(text) <= 400 else f"{text[:397]}..."


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
