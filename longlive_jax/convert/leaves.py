"""Weights on their way from one checkpoint to another: leaves that are made when they are written.

    Leaves = name of a leaf on disk ("layers/3/ffn/up/kernel") -> Stored, in our layout

Every step takes leaves and gives leaves, and reads nothing itself: so a conversion holds a few
tensors at a time, whatever the size of the model.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from longlive_jax.config import Quant
from longlive_jax.convert.stored import Stored
from longlive_jax.io.checkpoint import load_group, stored_arrays
from longlive_jax.quant.matmul import quantise_weight
from longlive_jax.quant.nvfp4 import Spec
from longlive_jax.quant.policy import KERNEL, selected
from longlive_jax.quant.qtensor import QTensor

Leaves = dict[str, Stored]
FLOATING = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
PARTS = ("codes", "scales", "amax")


def checkpoint_leaves(folder: Path) -> Leaves:
  """The leaves of one network of a checkpoint; one Orbax group is in memory at a time.

  Args:
    folder: of the network, such as CHECKPOINT/dit.

  Raises:
    ValueError: a group is damaged.
  """
  last: dict[Path, dict[str, np.ndarray]] = {}

  def reader(group: Path, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
      if group not in last:
        last.clear()
        last[group] = load_group(group)
      return last[group][name]

    return read

  leaves: Leaves = {}
  for group in sorted(path for path in folder.iterdir() if path.is_dir()):
    for name, (shape, dtype) in stored_arrays(group).items():
      leaves[name] = Stored(shape, np.dtype(dtype), reader(group, name))
  return leaves


def cast(leaves: Mapping[str, Stored], dtype: str, *, vectors: bool = False) -> Leaves:
  """Leaves in another precision.

  Args:
    leaves: what to convert; integers and packed weights stay.
    dtype: "bfloat16" or "float32".
    vectors: convert leaves of one axis as well; otherwise they become or stay float32 (they are
      small, and constants such as the deviation of the latents lose by it).
  """
  wide = np.dtype(np.float32)

  def one(stored: Stored) -> Stored:
    if stored.dtype not in FLOATING or not stored.shape:
      return stored
    wanted = np.dtype(jnp.dtype(dtype)) if vectors or len(stored.shape) > 1 else wide
    if wanted == stored.dtype:
      return stored
    return Stored(stored.shape, wanted, lambda: stored.read().astype(wanted))

  return {name: one(stored) for name, stored in leaves.items()}


def is_packed(leaves: Mapping[str, Stored]) -> bool:
  """Whether there are kernels in NVFP4."""
  return any(name.endswith(f"/{PARTS[0]}") for name in leaves)


def path_of(name: str) -> str:
  """Path of a linear layer without the number of the layer: what `quant.layers` speaks of."""
  return re.sub(r"^layers/\d+/", "layers/", name).removesuffix(f"/{KERNEL}")


def kernels(leaves: Mapping[str, Stored]) -> list[str]:
  """Names of the plain kernels of linear layers."""
  return [name for name in leaves if name.endswith(f"/{KERNEL}")]


def quantised(leaves: Mapping[str, Stored], quant: Quant, dtype: str) -> Leaves:
  """Leaves with the kernels of the chosen layers `[in, out]` in NVFP4 `[out, in]`, three leaves.

  Byte for byte what loading `leaves` with these settings gives.

  Args:
    leaves: plain ones.
    quant: settings.
    dtype: what kernels are converted to before, `model.dtype`.

  Raises:
    ValueError: a pattern of `quant.layers` matches nothing.
  """
  chosen = selected((path_of(name) for name in kernels(leaves)), quant.layers)
  spec = Spec(quant.weights, two_d=quant.weight_blocks == "16x16", exact=True)
  quantise = jax.jit(lambda kernel: quantise_weight(kernel, spec))
  made: Leaves = {}
  for name, stored in leaves.items():
    if name.endswith(f"/{KERNEL}") and path_of(name) in chosen:
      shapes = jax.eval_shape(quantise, jax.ShapeDtypeStruct(stored.shape, dtype))
      like = {part: getattr(shapes, part) for part in PARTS}
      made |= packed_leaves(name, quantising(quantise, stored, dtype), like)
    else:
      made[name] = stored
  return made


def quantising(
  quantise: Callable[..., QTensor], kernel: Stored, dtype: str
) -> Callable[[], QTensor]:
  """Reads a kernel and quantises it."""
  return lambda: quantise(jnp.asarray(kernel.read().astype(jnp.dtype(dtype))))


def packed_leaves(
  name: str, make: Callable[[], QTensor], like: Mapping[str, jax.ShapeDtypeStruct]
) -> Leaves:
  """The three leaves of one quantised kernel, made together when one of them is read.

  Args:
    name: of the kernel.
    make: gives it.
    like: shapes and dtypes of its `PARTS`.
  """
  last: dict[str, np.ndarray] = {}

  def part(which: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
      if which not in last:
        made = make()
        last.update({each: np.asarray(getattr(made, each)) for each in PARTS})
      return last.pop(which)

    return read

  return {
    f"{name}/{which}": Stored(tuple(like[which].shape), np.dtype(like[which].dtype), part(which))
    for which in PARTS
  }


def merged(leaves: Mapping[str, Stored], adapters: Mapping[str, Stored], scale: float) -> Leaves:
  """Leaves with low-rank adapters added: `W + scale A B`.

  The product and the sum are float32, the result has the dtype of W.

  Args:
    leaves: of the base.
    adapters: "layers/0/ffn/up/a" `[in, r]` and ".../b" `[r, out]` for kernels `[in, out]`.
    scale: alpha / rank.

  Raises:
    ValueError: an adapter has no kernel, lacks its other half, or does not fit; when a leaf is
      read: the sum is not finite.
  """
  made = dict(leaves)
  for name, a, b in halves(adapters):
    kernel = leaves.get(f"{name}/{KERNEL}")
    if kernel is None:
      raise ValueError(f"the base has no kernel '{name}', which the adapters change")
    rank = a.shape[-1]
    if (*a.shape, *b.shape) != (kernel.shape[0], rank, rank, kernel.shape[1]):
      raise ValueError(
        f"adapters of '{name}' have shapes {a.shape} and {b.shape}; the kernel has {kernel.shape}"
      )
    made[f"{name}/{KERNEL}"] = dataclasses.replace(kernel, read=summed(name, kernel, a, b, scale))
  return made


def halves(adapters: Mapping[str, Stored]) -> Iterator[tuple[str, Stored, Stored]]:
  """(Name of the layer, A, B) of adapters; ValueError where one is missing."""
  names = dict.fromkeys(name.rpartition("/")[0] for name in adapters)
  for name in names:
    for half in "ab":
      if f"{name}/{half}" not in adapters:
        raise ValueError(f"the adapters of '{name}' lack '{name}/{half}'")
    yield name, adapters[f"{name}/a"], adapters[f"{name}/b"]


def summed(
  name: str, kernel: Stored, a: Stored, b: Stored, scale: float
) -> Callable[[], np.ndarray]:
  """Reads the three and adds them."""

  def read() -> np.ndarray:
    low_rank = a.read().astype(np.float32) @ b.read().astype(np.float32)
    total = kernel.read().astype(np.float32) + np.float32(scale) * low_rank
    if not np.isfinite(total).all():
      raise ValueError(f"'{name}' is not finite (NaN or inf) after the adapters were added")
    return total.astype(kernel.dtype)

  return read
