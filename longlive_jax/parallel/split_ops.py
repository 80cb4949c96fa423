"""The operations of a network whose samples, tokens and parameters are split over a mesh.

Inputs and outputs of linear layers are kept where their tokens are, and so are their gradients:
parameters are split along the inputs of a layer, and a compiler left to itself may split
activations likewise in the backward pass, which moves them through the network a dozen times a
layer. Gradients of parameters are then sums over tokens, reduced to where the parameters live.
"""

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.model.ops import Ops
from longlive_jax.parallel.ulysses import sequence_parallel
from longlive_jax.types import CLIP, ROWS, SAMPLES, SEQ, Array

OF_PROMPTS = r"text_embed/.*|layers/cross_attn/(k|v)"
# The first that matches the path of any other linear layer: where its tokens are.
TOKENS: tuple[tuple[str, P], ...] = ((r"layers/.*", P(ROWS, SEQ)), (r".*", P(SAMPLES, SEQ)))


def split_ops(ops: Ops, mesh: Mesh, *, by_block: bool = True) -> Ops:
  """The same operations over a mesh, for training clips.

  Args:
    ops: of one device.
    mesh: see `parallel.mesh`.
    by_block: a sample has a prompt for each block, and its prompts are where their blocks are;
      else it has one, which all devices of a clip have.
  """
  prompts = P((*SAMPLES, SEQ)) if by_block else P(SAMPLES)
  tokens = ((OF_PROMPTS, prompts), *TOKENS)

  def place(x: Array, path: str) -> Array:
    spec = next(spec for pattern, spec in tokens if re.fullmatch(pattern, path))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  def prepare(x: Array, paths: tuple[str, ...]) -> Any:
    return ops.prepare(place(x, paths[0]), paths)

  def matmul(x: Any, w: Any, bias: Array | None, *, path: str, key: Array | None) -> Array:
    return place(ops.matmul(x, w, bias, path=path, key=key), path)

  if mesh.size == 1:
    return ops
  shared = any(mesh.shape[axis] > 1 for axis in CLIP)
  attend = sequence_parallel(ops.dense, mesh) if shared else ops.attend
  return dataclasses.replace(ops, attend=attend, matmul=matmul, prepare=prepare)
