"""The mesh of a job, and where its arrays live on it.

Arrays are placed, and the compiler splits the work accordingly (Auto axes): a batch split along
"data" with parameters on every device makes each device compute its share of the samples, and
sums gradients over all devices.
"""

import math
from collections.abc import Sequence

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.types import DATA, PyTree


def data_mesh(batch: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of one axis, "data", that divides a batch.

  Args:
    batch: samples a step.
    devices: to choose from; default all of them.

  Returns:
    Mesh of the largest number of devices that divides both `batch` and their count.
  """
  devices = jax.devices() if devices is None else devices
  count = math.gcd(batch, len(devices))
  if count < len(devices):
    logging.info(
      "train.batch=%d uses %d of %d devices; a multiple of %d uses all",
      *(batch, count, len(devices), len(devices)),
    )
  return jax.make_mesh((count,), (DATA,), (AxisType.Auto,), devices=devices[:count])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays put on every device of a mesh."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def split_batch(tree: PyTree, mesh: Mesh) -> PyTree:
  """Inside a jitted function: arrays split over "data" along their first axis.

  An axis that holds several rows a sample, sample-major, is split between samples.
  """
  return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(DATA)))
