"""Wall-clock times of compiled functions, for comparisons on one warm device."""

import time
from collections.abc import Callable, Mapping

import jax

from longlive_jax.types import PyTree


def alternated_seconds(
  functions: Mapping[str, Callable[..., PyTree]],
  *args: PyTree,
  repeats: int = 50,
  warm_seconds: float = 20.0,
  in_flight: int = 1,
) -> dict[str, list[float]]:
  """Times functions in turn, so that a clock that falls as a chip warms is the same for all.

  Args:
    functions: name -> compiled function of `args`.
    *args: given to each of them; must not be donated.
    repeats: timed rounds; a round calls every function once.
    warm_seconds: rounds that are not timed go on for so long, and for one round at least.
    in_flight: calls of a round that are launched one after the other before the last is awaited.

  Returns:
    name -> seconds of each call, until its result is there. A call that is shorter than its launch
    of some 50 microseconds must be timed as several in one function, a longer one with some in
    flight.
  """
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  begin = time.perf_counter()
  for function in functions.values():
    jax.block_until_ready(function(*args))
  while time.perf_counter() - begin < warm_seconds:
    for function in functions.values():
      jax.block_until_ready(function(*args))
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      out: PyTree = None
      for _ in range(in_flight):
        out = function(*args)
      jax.block_until_ready(out)
      seconds[name].append((time.perf_counter() - start) / in_flight)
  return seconds
