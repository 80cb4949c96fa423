"""What a checker yields: a comparison, or a refusal with its reason."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Compared:
  """One array against the recorded one.

  Attributes:
    name: of the recorded array.
    error: largest absolute difference, or the share of numbers that differ; infinite when the
      shapes differ, nan when one is nan.
    atol, rtol: passed means `|ours - golden| <= atol + rtol |golden|` everywhere; of shares, the
      first is what is allowed.
    passed: the verdict.
    note: what else there is to say.
  """

  name: str
  error: float
  atol: float
  rtol: float
  passed: bool
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Refused:
  """A recorded case that is refused by design."""

  name: str
  reason: str


def compare(name: str, ours: Any, golden: Any, atol: float, rtol: float) -> Compared:
  """Compares an array with the recorded one, in float64; nan equals nothing."""
  ours, golden = np.asarray(ours), np.asarray(golden)
  if ours.shape != golden.shape:
    note = f"shape {ours.shape}, recorded {golden.shape}"
    return Compared(name, math.inf, atol, rtol, False, note)
  ours, golden = ours.astype(np.float64), golden.astype(np.float64)
  difference = np.abs(ours - golden)
  error = float(difference.max()) if difference.size else 0.0
  passed = bool(np.all(difference <= atol + rtol * np.abs(golden)))
  return Compared(name, error, atol, rtol, passed)


def compare_share(name: str, ours: Any, golden: Any, allowed: float = 0.0) -> Compared:
  """Compares by the share of numbers that are not equal; nan equals nothing."""
  ours, golden = np.asarray(ours), np.asarray(golden)
  if ours.shape != golden.shape:
    note = f"shape {ours.shape}, recorded {golden.shape}"
    return Compared(name, math.inf, allowed, 0.0, False, note)
  wrong = int(np.sum(ours.astype(np.float64) != golden.astype(np.float64)))
  share = wrong / max(golden.size, 1)
  note = f"{wrong} of {golden.size} differ" if wrong else ""
  return Compared(name, share, allowed, 0.0, share <= allowed, note)


def as_record(item: "Compared | Refused | Sequence[Any]") -> Compared | Refused:
  """A record, also from the plain form (name, error, tolerance, passed)."""
  if isinstance(item, Compared | Refused):
    return item
  name, error, tolerance, passed = item
  return Compared(str(name), float(error), float(tolerance), 0.0, bool(passed))
