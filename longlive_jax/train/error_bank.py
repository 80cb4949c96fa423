"""Error recycling: the model's own errors, kept by noise level and added to later training inputs.

Sampling feeds a block what the model made of earlier ones; teacher forcing feeds it clean latents.
A bank keeps errors of whole blocks on the host, in buckets of noise level. A step may add some to
the noise, to the latents before they are noised, and to the context; the target keeps pointing at
the latents without error.

    noise' = noise + e_n        noisy = (1 - sigma) (x + e_x) + sigma noise'
    target = noise' - x         context = x + e_c

Every decision comes from one generator of random numbers, so a run that is restored with its banks
and its generator goes on bit by bit, on any mesh.

Source: spec/training.md sections 3.3 and 4.
"""

import dataclasses
import random
from collections.abc import Iterator

import numpy as np

from longlive_jax.config.schema import Recycling
from longlive_jax.model.flow import TIMESTEPS


def bucket_of(cfg: Recycling, index: int) -> int:
  """Bucket of an entry of the table of noise levels, 0 (noise alone) to 999."""
  return min(max(int(index // (TIMESTEPS / cfg.buckets)), 0), cfg.buckets - 1)


class ErrorBank:
  """Errors of blocks, `[F_b, H, W, C]` each, by bucket.

  Args:
    cfg: sizes.
    rng: draws which error is given, its modulation, and which one a full bucket gives up.

  Attributes:
    entries: bucket -> errors, the oldest first.
    added: errors that were ever taken in.
  """

  def __init__(self, cfg: Recycling, rng: random.Random):
    self.cfg, self.rng = cfg, rng
    self.entries: dict[int, list[np.ndarray]] = {}
    self.added = 0

  def add(self, error: np.ndarray, index: int) -> None:
    """Keeps an error made at an entry of the table of noise levels."""
    kept = self.entries.setdefault(bucket_of(self.cfg, index), [])
    if len(kept) < self.cfg.bucket_size:
      kept.append(error)
    elif self.cfg.replacement == "random":
      kept[self.rng.randint(0, self.cfg.bucket_size - 1)] = error
    else:
      kept.append(error)
      kept.pop(0)
    self.added += 1

  def sample(self, index: int) -> np.ndarray | None:
    """An error of the bucket of an entry of the table; None if it is empty."""
    return self._pick(self.entries.get(bucket_of(self.cfg, index), []))

  def sample_any(self) -> np.ndarray | None:
    """Any error; None if there is none."""
    count = sum(len(pool) for pool in self.entries.values())
    if not count:
      return None
    place = self.rng.randint(0, count - 1)
    for bucket in sorted(self.entries):
      if place < len(self.entries[bucket]):
        break
      place -= len(self.entries[bucket])
    return self._modulated(self.entries[bucket][place])

  def _pick(self, pool: list[np.ndarray]) -> np.ndarray | None:
    if not pool:
      return None
    return self._modulated(pool[self.rng.randint(0, len(pool) - 1)])

  def _modulated(self, error: np.ndarray) -> np.ndarray:
    factor = self.rng.uniform(1.0 - self.cfg.modulation, 1.0 + self.cfg.modulation)
    return (error * error.dtype.type(factor)).astype(error.dtype)

  def state(self) -> dict[str, np.ndarray]:
    """All errors, oldest first within a bucket, and their buckets; see `restore`."""
    pairs = [(bucket, error) for bucket in sorted(self.entries) for error in self.entries[bucket]]
    if not pairs:
      return {"added": np.asarray(self.added)}
    errors = np.stack([error for _, error in pairs])
    buckets = np.asarray([bucket for bucket, _ in pairs], np.int32)
    return {"errors": errors, "buckets": buckets, "added": np.asarray(self.added)}

  def restore(self, state: dict[str, np.ndarray]) -> None:
    """Takes over what `state` gave."""
    self.entries, buckets = {}, state.get("buckets", np.zeros(0, np.int32))
    for bucket, error in zip(buckets.tolist(), state.get("errors", ()), strict=True):
      self.entries.setdefault(bucket, []).append(error)
    self.added = int(state["added"])

  def summary(self) -> tuple[int, float]:
    """How many errors are kept, and the root mean square of those of the fullest bucket."""
    kept = sum(len(pool) for pool in self.entries.values())
    fullest = max(self.entries.values(), key=len, default=[])
    rms = float(np.sqrt(np.mean(np.square(fullest[-1].astype(np.float32))))) if fullest else 0.0
    return kept, rms


@dataclasses.dataclass(frozen=True)
class Injection:
  """Errors of a step, `[B, F, H, W, C]` each; None = nothing is added there.

  Attributes:
    noise, latents, context: what is added.
    clean: whether the step was drawn to be without any.
  """

  noise: np.ndarray | None = None
  latents: np.ndarray | None = None
  context: np.ndarray | None = None
  clean: bool = False

  def arrays(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """What `Batch.errors` holds."""
    return self.noise, self.latents, self.context


class Recycler:
  """The two banks of a run and the decisions of each step.

  Args:
    cfg: shares and sizes.
    seed: of all decisions.
    block_latents: latents of a block.
    dtype: of what is added.
  """

  def __init__(
    self,
    cfg: Recycling,
    seed: int,
    block_latents: int,
    dtype: np.typing.DTypeLike = np.float32,
  ):
    self.cfg, self.block_latents, self.dtype = cfg, block_latents, dtype
    self.rng = random.Random(seed)
    self.latents, self.noise = ErrorBank(cfg, self.rng), ErrorBank(cfg, self.rng)

  def draw(self, indices: np.ndarray, shape: tuple[int, ...]) -> Injection:
    """Decides what a step adds.

    Args:
      indices: int `[B, F]`, entries of the table of noise levels, equal within a block.
      shape: `[B, F, H, W, C]` of the latents.
    """
    cfg, first = self.cfg, indices[:, :: self.block_latents]
    if self.rng.random() < cfg.clean_share:
      return Injection(clean=True)

    def chosen(bank: ErrorBank, share: float, any_level: bool = False) -> np.ndarray | None:
      if not bank.added or not self.rng.random() < share:
        return None
      total = np.zeros(shape, self.dtype)
      for row, column in np.ndindex(first.shape):
        error = bank.sample_any() if any_level else bank.sample(int(first[row, column]))
        if error is not None:
          total[row, self._span(column)] = error
      return total

    noise = chosen(self.noise, cfg.noise_share)
    latents = chosen(self.latents, cfg.latent_share)
    return Injection(noise, latents, chosen(self.latents, cfg.context_share, any_level=True))

  def keep(
    self, injection: Injection, indices: np.ndarray, latents: np.ndarray, noise: np.ndarray
  ) -> None:
    """Takes in the errors of a step, `[B, F, H, W, C]` of latents and of noise."""
    if injection.clean and not self.rng.random() < self.cfg.clean_update_share:
      return
    for row, column in self._blocks(indices):
      span, index = self._span(column), int(indices[row, column * self.block_latents])
      self.latents.add(latents[row, span], index)
      self.noise.add(noise[row, span], index)

  def state(self) -> dict[str, np.ndarray]:
    """Both banks and the generator, as arrays; see `restore`."""
    version, numbers, spare = self.rng.getstate()
    banks = {"latents": self.latents.state(), "noise": self.noise.state()}
    found = {f"{name}/{part}": a for name, bank in banks.items() for part, a in bank.items()}
    found["generator"] = np.asarray([version, *numbers], np.int64)
    return found | {"spare": np.asarray(np.nan if spare is None else spare)}

  def restore(self, state: dict[str, np.ndarray]) -> None:
    """Takes over what `state` gave."""
    for name, bank in (("latents", self.latents), ("noise", self.noise)):
      prefix = f"{name}/"
      bank.restore({n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)})
    version, *numbers = state["generator"].tolist()
    spare = float(state["spare"])
    self.rng.setstate((version, tuple(numbers), None if np.isnan(spare) else spare))

  def _span(self, block: int) -> slice:
    return slice(block * self.block_latents, (block + 1) * self.block_latents)

  def _blocks(self, indices: np.ndarray) -> Iterator[tuple[int, int]]:
    yield from np.ndindex(indices.shape[0], indices.shape[1] // self.block_latents)
