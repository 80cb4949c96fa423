"""Counts what JAX traces and compiles."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import jax

EVENTS = {
  "/jax/core/compile/jaxpr_trace_duration": "traces",
  "/jax/core/compile/backend_compile_duration": "compilations",  # hits of the disk cache included
}


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter[str]]:
  """Counts inside of the block: "traces" and "compilations"."""
  counts: collections.Counter[str] = collections.Counter()

  def listen(event: str, seconds: float, **about: Any) -> None:
    del seconds, about
    if event in EVENTS:
      counts[EVENTS[event]] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
