"""The only builders of error text: what was found, what is required, which setting fixes it."""

import difflib
import math
from collections.abc import Iterable, Sequence


def suggest(name: str, known: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the nearest of `known`, or an empty string."""
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f" (did you mean '{near[0]}'?)" if near else ""


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int | None]) -> None:
  """Raises ValueError unless `shape` equals `expected`; None in `expected` accepts any size."""
  same_rank = len(shape) == len(expected)
  if not same_rank or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} has shape {tuple(shape)}; it must be ({wanted})")


def check_dtypes(**arrays: tuple[object, object]) -> None:
  """Raises ValueError unless each (array, dtype) agrees; names all of them."""
  found = {
    name: getattr(array, "dtype", type(array).__name__) for name, (array, _) in arrays.items()
  }
  wrong = [name for name, (_, dtype) in arrays.items() if found[name] != dtype]
  if wrong:
    listed = ", ".join(f"{name} {dtype}" for name, (_, dtype) in arrays.items())
    raise ValueError(f"{', '.join(f'{n} is {found[n]}' for n in wrong)}; they must be {listed}")


def check_divides(name: str, value: int, unit_name: str, unit: int) -> None:
  """Raises ValueError unless `unit` divides `value`, and names the nearest values that work."""
  if unit <= 0 or value <= 0 or value % unit:
    below = max(value // unit, 1) * unit if unit > 0 else 0
    raise ValueError(
      f"{name}={value} must be a positive multiple of {unit_name}={unit};"
      f" use {below} or {below + unit}"
    )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of `choices`."""
  known = sorted(choices)
  if value not in known:
    listed = ", ".join(choice or "(empty)" for choice in known)
    raise ValueError(f"{name}={value!r} must be one of {listed}{suggest(value, known)}")


def check_at_least(name: str, value: float, least: float) -> None:
  """Raises ValueError unless `value` is a finite number >= `least`."""
  if value == math.inf:
    raise ValueError(f"{name}={value} must be a finite number, at least {least}")
  if not value >= least:
    raise ValueError(f"{name}={value} must be at least {least}")


def check_remainder(name: str, value: int, unit: int, rest: int) -> None:
  """Raises ValueError unless `value` is `rest + k unit` with k >= 0; names the nearest allowed."""
  if value < rest or (value - rest) % unit:
    below = max((value - rest) // unit, 0) * unit + rest
    nearest = f"{below}" if value < rest else f"{below} or {below + unit}"
    raise ValueError(f"{name}={value} must be {rest} + a multiple of {unit}; use {nearest}")
