"""Keys of low-rank adapters of the transformer: two tensors for each linear layer in its layers.

    y = W x + b + (alpha / r) B A x         A [r, in], B [out, r] there; a [in, r], b [r, out] here

Source: spec/models.md section 6.6.
"""

import re
from collections.abc import Mapping, Sequence

from longlive_jax.config import Model
from longlive_jax.convert.dialects import column
from longlive_jax.convert.keys_dit import INNER
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import Row
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.lora import ALL, adapter_shapes
from longlive_jax.types import PyTree

HALVES = {"a": "lora_A", "b": "lora_B"}


def lora_rows(cfg: Model, dialect: str = "original", layers: Sequence[str] = ALL) -> list[Row]:
  """The table of the adapters of the linear layers that patterns match: of all, 20 rows a layer."""
  at = column(dialect)
  inner = {
    path: names
    for path, names in INNER.items()
    if any(re.fullmatch(pattern, f"layers/{path}") for pattern in layers)
  }
  return [
    Row(f"blocks.{i}.{names[at]}.{theirs}.weight", f"layers/{path}/{ours}", "linear", i)
    for i in range(cfg.layers)
    for path, names in inner.items()
    for ours, theirs in HALVES.items()
  ]


def lora_shapes(cfg: Model, rank: int, layers: Sequence[str] = ALL) -> PyTree:
  """Shapes of adapters: "layers/ffn/up/a" `[layers, in, rank]`, ".../b" `[layers, rank, out]`."""
  return adapter_shapes(declare_dit(cfg).abstract, rank, layers)


def rank_of(tensors: Mapping[str, Stored]) -> int:
  """The rank that all adapters of a file share.

  Raises:
    ValueError: there are none, or their ranks differ.
  """
  ranks = {
    stored.shape[0] if f".{HALVES['a']}." in key else stored.shape[-1]
    for key, stored in tensors.items()
    if any(f".{half}." in key for half in HALVES.values()) and len(stored.shape) == 2
  }
  if len(ranks) != 1:
    found = ", ".join(map(str, sorted(ranks))) or "none"
    raise ValueError(f"adapters must have one rank; found: {found}")
  return ranks.pop()
