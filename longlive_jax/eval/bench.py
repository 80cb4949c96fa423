"""Benchmarks: several implementations of one job, timed in turn on one device, with their error.

A record says what ran (job, implementation, inputs), on what (device, versions), how fast (median,
10th and 90th percentile of the runs, TFLOP/s, GB/s), how long it compiled, the memory of its
executable, and how far its result is from that of a reference: another implementation, or sums in
float32 that are not timed.
"""

import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.io.atomic import replacing
from longlive_jax.kernels.timing import alternated_seconds
from longlive_jax.sample.together import TIMED
from longlive_jax.types import Array, PyTree

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin")
Record = dict[str, Any]


def check_some(flag: str, values: Sequence[str], known: Sequence[str]) -> None:
  """Raises ValueError, which names the flag, unless there are values and all are known."""
  if not values:
    raise ValueError(f"--{flag} is empty; use some of {', '.join(known)}")
  for value in values:
    if value not in known:
      raise ValueError(f"--{flag} has {value!r}; use some of {', '.join(known)}")


def write_records(path: str | Path, records: Sequence[Record]) -> None:
  """Writes records, one JSON a line; the file appears when it is complete."""
  with replacing(path) as part:
    part.write_text("".join(json.dumps(record) + "\n" for record in records))


def compiled(
  function: Callable[..., PyTree], args: tuple[PyTree, ...], donated: tuple[int, ...] = ()
) -> tuple[Callable[..., PyTree], Record]:
  """An executable, and what is known of it before it runs.

  Args:
    function: of arrays.
    args: what it will be given, or shapes.
    donated: places of the arguments whose memory its results may take.
  """
  began = time.perf_counter()
  lowered = jax.jit(function, donate_argnums=donated).lower(*args)
  executable = lowered.compile(dict(TIMED))
  return executable, {"compile_seconds": time.perf_counter() - began, **memory_of(executable)}


def memory_of(executable: Any) -> Record:
  """What a record says of the memory of a compiled function, in bytes; None = unknown."""
  memory = executable.memory_analysis()
  return {
    "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    "argument_bytes": None if memory is None else memory.argument_size_in_bytes,
  }


@dataclasses.dataclass(frozen=True)
class Case:
  """One job.

  Attributes:
    name: what is done.
    sizes: its sizes, for the record.
    inputs: distribution and seed of the inputs.
    functions: implementation -> function of what it alone takes (`own`) and `args`, or what else
      `make` makes one of.
    args: inputs of all of them.
    value: output -> float array that errors are taken of.
    reference: implementation that the others are compared with; with `truth`, what that is.
    calls: jobs done in one call, since a short one is mostly its launch.
    in_flight: calls launched before the last of them is awaited.
    flops: floating-point operations of a job.
    bytes_moved: implementation -> bytes a job must read and write at least, or send.
    more: implementation -> what else its record says.
    own: implementation -> its first arguments, which no other takes.
    values: implementation -> `value` of its outputs, where they are of another kind.
    truth: what `value` should give, where that is no implementation; called once, not timed.
    make: `(function, arguments)` -> what is called and timed, and what is known of it by then.
  """

  name: str
  sizes: Mapping[str, int | str]
  inputs: str
  functions: Mapping[str, Any]
  args: tuple[PyTree, ...]
  value: Callable[[PyTree], Array]
  reference: str
  calls: int = 1
  in_flight: int = 1
  flops: float = 0.0
  bytes_moved: Mapping[str, float] = dataclasses.field(default_factory=dict)
  more: Mapping[str, Record] = dataclasses.field(default_factory=dict)
  own: Mapping[str, tuple[PyTree, ...]] = dataclasses.field(default_factory=dict)
  values: Mapping[str, Callable[[PyTree], Array]] = dataclasses.field(default_factory=dict)
  truth: Callable[[], Array] | None = None
  make: Callable[[Any, tuple[PyTree, ...]], tuple[Callable[..., PyTree], Record]] = compiled

  def made(self, name: str) -> tuple[Callable[..., PyTree], Record]:
    """An implementation as a function of `args`, and what is known of it."""
    own = self.own.get(name, ())
    run, known = self.make(self.functions[name], (*own, *self.args))
    return functools.partial(run, *own), known

  def found(self, name: str, run: Callable[..., PyTree]) -> Array:
    """What errors of an implementation are taken of."""
    return self.values.get(name, self.value)(run(*self.args))

  def wanted(self) -> Array:
    """What `found` is compared with, where the reference is not timed itself."""
    if self.truth is None:
      return self.found(self.reference, self.made(self.reference)[0])
    with jax.default_matmul_precision("highest"):
      return self.truth()


def implementations_of(cases: Callable[[], Iterable[Case]]) -> set[str]:
  """Names of all implementations of cases; what makes their arrays is traced, not run."""
  found: set[str] = set()

  def look() -> None:
    for case in cases():
      found.update(case.functions)

  jax.eval_shape(look)
  return found


def chain(
  job: Callable[..., PyTree], calls: int, copies: int
) -> Callable[[PyTree, tuple[list[PyTree], ...]], list[PyTree]]:
  """Jobs one after the other in one function `(x, weights)`, each with another weight.

  Args:
    job: `(x, *weights)`.
    calls: how often.
    copies: length of each list of weights; call i takes number `i % copies`, so that with enough
      of them no weight is found in a cache.

  Returns:
    A function that gives all results: none of them can be left out, nothing is added, and what a
    job makes of its weight, such as decoding it, is made again by the next that has it.
  """

  def run(x: PyTree, weights: tuple[list[PyTree], ...]) -> list[PyTree]:
    results = []
    for call in range(calls):
      y = job(x, *(each[call % copies] for each in weights))
      x, y, weights = jax.lax.optimization_barrier((x, y, weights))
      results.append(y)
    return results

  return run


def relative_error(found: Array, wanted: Array) -> float:
  """Root of the mean squared difference over that of the wanted values."""
  a, b = (np.asarray(each, np.float64) for each in (found, wanted))
  return float(np.sqrt(np.mean((a - b) ** 2) / max(np.mean(b**2), np.finfo(np.float64).tiny)))


def commit() -> str | None:
  """The commit of the checkout that this file is in, with "-dirty" where files were changed."""
  command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def setting() -> Record:
  """Device, versions and commit of a record."""
  installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "versions": {name: installed[name] for name in PACKAGES if name in installed},
    "commit": commit(),
  }


def measure(
  case: Case,
  repeats: int,
  warm_seconds: float,
  only: Collection[str] = (),
  profile: str | Path = "",
) -> Iterator[Record]:
  """Times implementations of a case in turn.

  Args:
    case: the job.
    repeats: timed runs of each.
    warm_seconds: of runs before, which are not timed.
    only: of these implementations; empty = all. The reference is computed in any case.
    profile: folder for a trace of each, made when all are timed; empty = none.

  Yields:
    A record for each implementation.
  """
  made = {name: case.made(name) for name in case.functions if not only or name in only}
  run = {name: function for name, (function, _) in made.items()}
  values = {name: case.found(name, each) for name, each in run.items()}
  wanted = values[case.reference] if case.reference in values else case.wanted()
  seconds = alternated_seconds(
    run, *case.args, repeats=repeats, warm_seconds=warm_seconds, in_flight=case.in_flight
  )
  if profile:
    trace(case, run, Path(profile))
  timing = {"repeats": repeats, "in_flight": case.in_flight, "warm_seconds": warm_seconds}
  for name, times in seconds.items():
    yield {
      "case": case.name,
      "sizes": dict(case.sizes),
      "implementation": name,
      "inputs": case.inputs,
      **rates(case, name, times),
      **timing,
      "error": relative_error(values[name], wanted),
      "reference": case.reference,
      **made[name][1],
      **case.more.get(name, {}),
      **setting(),
    }


def rates(case: Case, name: str, times: list[float]) -> Record:
  """How fast an implementation did one job, from the seconds of each of its calls."""
  low, median, high = np.percentile(times, [10, 50, 90]) / case.calls
  moved = case.bytes_moved.get(name, 0.0)
  return {
    "median_us": 1e6 * median,
    "p10_us": 1e6 * low,
    "p90_us": 1e6 * high,
    "flops": case.flops or None,
    "bytes_moved": moved or None,
    "tflops_per_second": case.flops / median / 1e12 if case.flops else None,
    "gigabytes_per_second": moved / median / 1e9 if moved else None,
  }


def trace(
  case: Case, run: Mapping[str, Callable[..., PyTree]], folder: Path, calls: int = 3
) -> None:
  """Writes a trace of a few calls of each function for `jax.profiler`, in a folder of its own."""
  sizes = "_".join(f"{name}{size}" for name, size in case.sizes.items())
  for name, function in run.items():
    parts = [re.sub(r"\W+", "_", part).strip("_") for part in (case.name, sizes, name)]
    with jax.profiler.trace(folder.joinpath(*filter(None, parts))):
      for _ in range(calls):
        jax.block_until_ready(function(*case.args))
