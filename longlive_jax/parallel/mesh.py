"""The mesh of a job, and where its arrays live on it.

Arrays are placed, and the compiler splits the work accordingly (Auto axes). Samples are split over
"data" and "fsdp", the latents of a clip over "seq", parameters and all that has their shape over
"fsdp" and "seq": gradients are summed over all of them.
"""

import math
from collections.abc import Sequence

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.checks import check_divides
from longlive_jax.types import DATA, FSDP, SAMPLES, SEQ, PyTree


def make_mesh(
  batch: int, fsdp: int = 1, seq: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh that divides a batch.

  Args:
    batch: samples a step, a multiple of `fsdp`.
    fsdp: devices that share parameters, each with its own samples.
    seq: devices that share a clip.
    devices: to choose from; default all of them.

  Returns:
    Mesh of the axes "data", "fsdp", "seq"; "data" is the largest that divides the batch and for
    which there are devices.

  Raises:
    ValueError: fewer devices than fsdp * seq, or fsdp does not divide the batch.
  """
  devices = jax.devices() if devices is None else devices
  if fsdp * seq > len(devices):
    raise ValueError(
      f"parallel.fsdp={fsdp} * parallel.seq={seq} needs {fsdp * seq} devices; there are"
      f" {len(devices)}"
    )
  check_divides("train.batch", batch, "parallel.fsdp", fsdp)
  data = math.gcd(batch // fsdp, len(devices) // (fsdp * seq))
  count = data * fsdp * seq
  if count < len(devices):
    logging.info("train.batch=%d uses %d of %d devices", batch, count, len(devices))
  axes = (AxisType.Auto,) * 3
  return jax.make_mesh((data, fsdp, seq), (DATA, FSDP, SEQ), axes, devices=devices[:count])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays put on every device of a mesh."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def split_batch(tree: PyTree, mesh: Mesh) -> PyTree:
  """Inside a jitted function: arrays split between samples along their first axis.

  An axis that holds several rows a sample, sample-major, is split between samples.
  """
  return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(SAMPLES)))
