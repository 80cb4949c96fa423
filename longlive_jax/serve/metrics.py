"""What the server counts, in the form that Prometheus reads."""

from collections.abc import Callable

from prometheus_client import (
  CONTENT_TYPE_LATEST,
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
  """Counters of one server, each with the prefix `longlive_`."""

  def __init__(self) -> None:
    self._registry = CollectorRegistry()
    ProcessCollector(registry=self._registry)
    self._blocks = self._counter("blocks", "blocks made", "kind")
    self._frames = self._counter("frames", "frames made", "kind")
    self._sent_bytes = self._counter("frame_bytes_sent", "bytes of frames sent to viewers")
    self._failures = self._counter("failures", "sessions and videos that failed", "kind")
    self._refusals = self._counter("refusals", "requests and messages refused", "code")
    self._wait = self._histogram("turn_wait_seconds", "from wanting a block to its turn", "kind")
    self._make = self._histogram("block_seconds", "making a block", "kind")
    self._encode = self._histogram("encode_seconds", "encoding a block's frames", "kind")

  def _counter(self, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"longlive_{name}", text, labels, registry=self._registry)

  def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
    return Histogram(f"longlive_{name}", text, labels, registry=self._registry, buckets=SECONDS)

  def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
    """Adds a gauge whose value is asked for when somebody reads it."""
    Gauge(f"longlive_{name}", text, registry=self._registry).set_function(value)

  def block_done(
    self, kind: str, frames: int, waited: float, made: float, encoded: float | None
  ) -> None:
    """Counts a block.

    Args:
      kind: "live" or "video".
      frames: of the block.
      waited: seconds until its turn.
      made: seconds in the model.
      encoded: seconds of encoding, if they are known.
    """
    self._blocks.labels(kind).inc()
    self._frames.labels(kind).inc(frames)
    self._wait.labels(kind).observe(waited)
    self._make.labels(kind).observe(made)
    if encoded is not None:
      self._encode.labels(kind).observe(encoded)

  def sent(self, size: int) -> None:
    """Counts bytes of frames that were sent."""
    self._sent_bytes.inc(size)

  def failed(self, kind: str) -> None:
    """Counts a "live" session or a "video" that the model failed."""
    self._failures.labels(kind).inc()

  def refused(self, code: str) -> None:
    """Counts a refusal by its code, one of few words."""
    self._refusals.labels(code).inc()

  def text(self) -> tuple[bytes, str]:
    """All values, and their content type."""
    return generate_latest(self._registry), CONTENT_TYPE_LATEST
