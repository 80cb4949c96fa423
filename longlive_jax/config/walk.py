"""Settings by their dotted names, as the command line writes them ("train.lr")."""

import dataclasses
import typing
from collections.abc import Iterator

from longlive_jax.checks import suggest
from longlive_jax.config.schema import Experiment, Section


def field_types(kind: type[Section]) -> dict[str, type]:
  """The declared type of each field of a section."""
  hints = typing.get_type_hints(kind)
  return {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def is_section(kind: object) -> bool:
  """Whether a declared type is a section rather than a value."""
  return isinstance(kind, type) and issubclass(kind, Section)


def settings(section: Section, prefix: str = "") -> Iterator[tuple[str, type, object]]:
  """Yields (dotted name, declared type, value) of every setting below `section`."""
  for name, kind in field_types(type(section)).items():
    value = getattr(section, name)
    if isinstance(value, Section):
      yield from settings(value, f"{prefix}{name}.")
    else:
      yield prefix + name, kind, value


def differences(a: Section, b: Section) -> Iterator[tuple[str, object, object]]:
  """Yields (dotted name, value in `a`, value in `b`) of every setting that is not the same."""
  for (name, _, x), (_, _, y) in zip(settings(a), settings(b), strict=True):
    if x != y:
      yield name, x, y


def check_setting_name(dotted: str, root: type[Section] = Experiment) -> None:
  """Raises ValueError unless `dotted` names one setting below `root`; suggests the nearest."""
  kind: type = root
  for part in dotted.split("."):
    known = field_types(kind) if is_section(kind) else {}
    if part not in known:
      raise ValueError(f"unknown setting '{dotted}'{nearest(dotted, root)}")
    kind = known[part]
  if is_section(kind):
    raise ValueError(f"'{dotted}' is a section; set one of {', '.join(field_types(kind))}")


def nearest(dotted: str, root: type[Section]) -> str:
  """A suggestion for an unknown name: the same last part elsewhere, or the closest spelling."""
  names = [name for name, _, _ in settings(root())]
  last = dotted.rpartition(".")[2]
  same = [name for name in names if name.rpartition(".")[2] == last]
  return f" (did you mean '{same[0]}'?)" if same else suggest(dotted, names)
