"""What is to be known of low-rank adapters, and their way into a transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.checks import suggest
from longlive_jax.config import Model
from longlive_jax.convert.keys_lora import lora_rows, rank_of
from longlive_jax.convert.leaves import Leaves, is_packed, merged
from longlive_jax.convert.sources import Source
from longlive_jax.model.lora import ALL

# In the metadata of weights: path or name of the adapters that they are sampled with.
ADAPTERS = "adapters_for_sampling"


def number(name: str, value: object) -> float:
  """A finite number above 0; ValueError names it otherwise."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f"{name}={value!r} must be a number")
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f"{name}={value} must be finite and more than 0")
  return float(value)


def adapters_of(source: Source, alpha: float) -> dict[str, Any]:
  """Name, rank and alpha of adapters in a foreign file.

  Args:
    source: the file; it may say its alpha and rank.
    alpha: what the user says, 0 = nothing.

  Raises:
    ValueError: they contradict each other, or are no numbers.
  """
  rank, path = rank_of(source.tensors), source.path
  asked = number("--alpha", alpha) if alpha else 0.0
  if (stated := source.notes.get("rank")) is not None and stated != rank:
    raise ValueError(f"'{path}' says rank {stated!r}, but its tensors have rank {rank}")
  noted = source.notes.get("alpha", source.notes.get("lora_alpha"))
  said = number(f"alpha in '{path}'", noted) if noted not in (None, 0) else 0.0
  if asked and said and asked != said:
    raise ValueError(f"--alpha={asked:g}, but '{path}' says {said:g}")
  return {"name": path.name, "rank": rank, "alpha": asked or said or float(rank)}


def read_adapters(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """What the metadata of a checkpoint of adapters says.

  Raises:
    ValueError: it says nothing, or nonsense.
  """
  about = metadata.get("lora")
  if not isinstance(about, dict):
    raise ValueError("the checkpoint's metadata.json does not describe adapters: it has no 'lora'")
  for name in ("rank", "alpha"):
    number(f"lora.{name} in metadata.json", about.get(name))
  return about


def with_adapters(
  base: Leaves,
  adapters: Leaves,
  about: Mapping[str, Any],
  metadata: Mapping[str, Any],
  cfg: Model,
  layers: Sequence[str] = ALL,
) -> Leaves:
  """The base with adapters merged.

  Args:
    base: leaves of the transformer.
    adapters: theirs.
    about: name, rank and alpha.
    metadata: of the base.
    cfg: of the base.
    layers: patterns of the linear layers that have adapters.

  Raises:
    ValueError: adapters are merged already, weights are packed, or one of the layers has none.
  """
  before = metadata.get("adapters")
  if before:
    entries = before if isinstance(before, list) else [before]
    names = ", ".join(str(e.get("name", "?")) if isinstance(e, dict) else "?" for e in entries)
    raise ValueError(f"adapters are merged already ({names}); merge into the weights without them")
  if is_packed(base):
    raise ValueError("adapters cannot be merged into NVFP4 weights; merge first, quantise then")
  wanted = {row.place for row in lora_rows(cfg, layers=layers)}
  odd = next((n for n in sorted(wanted ^ set(adapters))), None)
  if odd is not None:
    what = "lack" if odd in wanted else "have"
    raise ValueError(
      f"the adapters {what} '{odd}': they are of another model{suggest(odd, wanted - {odd})}"
    )
  return merged(base, adapters, about["alpha"] / about["rank"])
