"""Benchmarks: several implementations of one job, timed in turn on one device, with their error.

A record says what ran (job, implementation, inputs), on what (device, versions), how fast (median,
10th and 90th percentile of the runs, TFLOP/s, GB/s), how long it compiled, the memory of its
executable, and how far its result is from that of a reference.
"""

import dataclasses
import importlib.metadata
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.kernels.timing import alternated_seconds
from longlive_jax.types import Array, PyTree

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin")
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """One job.

  Attributes:
    name: what is done.
    sizes: its sizes, for the record.
    inputs: distribution and seed of the inputs.
    functions: implementation -> function of `args`.
    args: inputs.
    value: output -> float array that errors are taken of.
    reference: implementation that the others are compared with.
    calls: jobs done in one call, since a short one is mostly its launch.
    in_flight: calls launched before the last of them is awaited.
    flops: floating-point operations of a job.
    bytes_moved: implementation -> bytes a job must read and write at least.
    more: implementation -> what else its record says.
  """

  name: str
  sizes: Mapping[str, int | str]
  inputs: str
  functions: Mapping[str, Callable[..., PyTree]]
  args: tuple[PyTree, ...]
  value: Callable[[PyTree], Array]
  reference: str
  calls: int = 1
  in_flight: int = 1
  flops: float = 0.0
  bytes_moved: Mapping[str, float] = dataclasses.field(default_factory=dict)
  more: Mapping[str, Record] = dataclasses.field(default_factory=dict)


def chain(
  job: Callable[..., Array], calls: int, copies: int
) -> Callable[[Array, tuple[list[PyTree], ...]], list[Array]]:
  """Jobs one after the other in one function `(x, weights)`, each with another weight.

  Args:
    job: `(x, *weights)`.
    calls: how often.
    copies: length of each list of weights; call i takes number `i % copies`, so that with enough
      of them no weight is found in a cache.

  Returns:
    A function that gives all results: none of them can be left out, and nothing is added.
  """

  def run(x: Array, weights: tuple[list[PyTree], ...]) -> list[Array]:
    results = []
    for call in range(calls):
      y = job(x, *(each[call % copies] for each in weights))
      x, y = jax.lax.optimization_barrier((x, y))
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


def compiled(function: Callable[..., PyTree], args: tuple[PyTree, ...]) -> tuple[Any, Record]:
  """An executable, and what is known of it before it runs."""
  began = time.perf_counter()
  executable = jax.jit(function).lower(*args).compile()
  seconds = time.perf_counter() - began
  memory = executable.memory_analysis()
  sizes = {
    "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    "argument_bytes": None if memory is None else memory.argument_size_in_bytes,
  }
  return executable, {"compile_seconds": seconds, **sizes}


def measure(case: Case, repeats: int, warm_seconds: float) -> Iterator[Record]:
  """Times all implementations of a case in turn.

  Args:
    case: the job.
    repeats: timed runs of each.
    warm_seconds: of runs before, which are not timed.

  Yields:
    A record for each implementation.
  """
  made = {name: compiled(function, case.args) for name, function in case.functions.items()}
  run = {name: executable for name, (executable, _) in made.items()}
  values = {name: case.value(each(*case.args)) for name, each in run.items()}
  seconds = alternated_seconds(
    run, *case.args, repeats=repeats, warm_seconds=warm_seconds, in_flight=case.in_flight
  )
  for name, times in seconds.items():
    low, median, high = np.percentile(times, [10, 50, 90]) / case.calls
    moved = case.bytes_moved.get(name, 0.0)
    yield {
      "case": case.name,
      "sizes": dict(case.sizes),
      "implementation": name,
      "inputs": case.inputs,
      "median_us": 1e6 * median,
      "p10_us": 1e6 * low,
      "p90_us": 1e6 * high,
      "repeats": repeats,
      "in_flight": case.in_flight,
      "warm_seconds": warm_seconds,
      "tflops_per_second": case.flops / median / 1e12 if case.flops else None,
      "gigabytes_per_second": moved / median / 1e9 if moved else None,
      "error": relative_error(values[name], values[case.reference]),
      "reference": case.reference,
      **made[name][1],
      **case.more.get(name, {}),
      **setting(),
    }
