"""How fast a run is: rates of an update, by what it has to do."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Work:
  """What an update has to do.

  Attributes:
    tokens: that the network sees, context and target, of the whole batch.
    flops: model operations, see `eval.flops.step_flops`.
    devices: that share it.
    peak: operations a second of one of them; None = unknown.
  """

  tokens: int = 0
  flops: float = 0.0
  devices: int = 1
  peak: float | None = None

  def rates(self, seconds: float) -> dict[str, float]:
    """Metrics of updates that take `seconds` each; memory is the peak so far of one device."""
    found = {"steps_per_second": 1.0 / seconds}
    if self.tokens:
      found["tokens_per_second"] = self.tokens / seconds
    if self.peak and self.flops:
      found["mfu"] = self.flops / (seconds * self.devices * self.peak)
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      found["peak_gib"] = stats["peak_bytes_in_use"] / 2**30
    return found
