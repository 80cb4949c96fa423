"""The trace of a training forward and its gradient over a mesh without devices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from longlive_jax.config import Experiment
from longlive_jax.config.rules_train import check_shared_clip
from longlive_jax.eval.trace import Work, kept_bytes, kernel_attention, linearise, work, work_of
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.module import Network
from longlive_jax.model.ops import Ops, attend_with
from longlive_jax.model.rope import Rope
from longlive_jax.parallel.mesh import mesh_shape
from longlive_jax.parallel.ulysses import sequence_parallel
from longlive_jax.quant.policy import quantised_ops
from longlive_jax.types import CLIP, DATA, FSDP, HALF, SEQ, Array, PyTree

AXES = (DATA, FSDP, HALF, SEQ)


def abstract_mesh(experiment: Experiment, devices: int) -> AbstractMesh:
  """The mesh of so many devices, none of which need be there."""
  check_shared_clip(experiment)
  train, parallel = experiment.train, experiment.parallel
  part = train.batch // train.accumulate
  shape = mesh_shape(part, devices, parallel.fsdp, parallel.seq, parallel.layout)
  return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def ranks(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
  """Devices along some axes."""
  return math.prod(mesh.shape[name] for name in axes)


def clip_latents(experiment: Experiment) -> int:
  """F of a training sample."""
  return experiment.data.blocks * experiment.model.block_latents


@dataclasses.dataclass(frozen=True)
class Traced:
  """What the network does with a part of the batch.

  Attributes:
    forward, step: of the forward, and of forward and backward.
    kept: bytes on all devices between them.
    layer: bytes that one layer would keep if it kept all: what it holds while it goes backward.
  """

  forward: Work
  step: Work
  kept: int
  layer: int

  @property
  def backward_sent(self) -> int:
    """Bytes of all-to-alls after the forward, recomputed ones included."""
    return self.step.sent - self.forward.sent


def traced_ops(experiment: Experiment, network: Network, mesh: AbstractMesh) -> Ops:
  """The ops of a run on GPUs, with attention that can be traced anywhere.

  All scale rules of NVFP4 have the same shapes and products; the simplest is the fastest to trace.
  """
  ops = Ops(attend=attend_with(kernel_attention), dense=kernel_attention)
  quant = dataclasses.replace(experiment.quant, kernels="off")
  for name in ("weights", "activations", "gradients"):
    setattr(quant, name, getattr(quant, name) and "static_6")
  ops = quantised_ops(ops, quant, network.abstract)
  if ranks(mesh, CLIP) == 1:
    return ops
  attend = sequence_parallel(kernel_attention, mesh)  # type: ignore[arg-type]
  return dataclasses.replace(ops, attend=attend)


def traced_function(
  experiment: Experiment, network: Network, mesh: AbstractMesh, remat: str
) -> tuple[Callable[..., Array], tuple[Any, ...]]:
  """A scalar of the teacher-forcing pass of a part of the batch, and the shapes it is given."""
  cfg, blocks = experiment.model, experiment.data.blocks
  batch = experiment.train.batch // experiment.train.accumulate
  ops = traced_ops(experiment, network, mesh)
  latents, tokens = clip_latents(experiment), experiment.latent_tokens
  borders = block_borders(latents, cfg.block_latents, tokens)

  def total(
    params: PyTree, x: Array, times: Array, prompts: Array, turn: Array, key: Array
  ) -> Array:
    model, here = network.bind(params), ops.with_key(key)
    plan, text = TeacherForcing(Rope(turn, turn), borders), model.text_kv(prompts, here)
    out = model(x, times, text, plan, context=x, pieces=blocks, remat=remat, ops=here)[0]
    return jnp.sum(out**2)

  def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  field = (experiment.latent_height, experiment.latent_width, cfg.vae.latent_channels)
  return total, (
    network.abstract,
    shape(batch, latents, *field),
    shape(batch, latents),
    shape(batch * blocks, cfg.text.length, cfg.text.width),
    shape(batch, latents * tokens, cfg.head_dim // 2),
    jax.eval_shape(lambda: jax.random.key(0)),
  )


def trace(experiment: Experiment, network: Network, mesh: AbstractMesh) -> Traced:
  """Traces forward and gradient of the teacher-forcing pass of a part of the batch."""
  remat = experiment.train.remat
  total, arguments = traced_function(experiment, network, mesh, remat)
  step, linearised = work(jax.grad(total), *arguments), linearise(total, *arguments)
  kept = everything = kept_bytes(linearised)
  if remat != "none":
    total, arguments = traced_function(experiment, network, mesh, "none")
    everything = kept_bytes(linearise(total, *arguments))
  return Traced(work_of(linearised), step, kept, everything // experiment.model.layers)
