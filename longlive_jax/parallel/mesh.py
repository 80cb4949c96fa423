"""The mesh of a job, and where its arrays live on it.

Arrays are placed, and the compiler splits the work accordingly (Auto axes). Samples are split over
"data" and "fsdp", a clip over "half" and "seq", parameters and all that has their shape over
"fsdp", "half" and "seq": gradients are summed over all of them.

In the balanced layout "half" is 1 and each device has context and target of the same latents. In
the plain one it is 2: the first half of the devices of a clip has all contexts, the second all
targets, as if both had been joined to one sequence and that cut into equal runs.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.checks import check_divides
from longlive_jax.config import Experiment
from longlive_jax.config.rules_train import check_shared_block, check_shared_clip
from longlive_jax.types import DATA, FSDP, HALF, SAMPLES, SEQ, Array, ArrayLike, PyTree


def mesh_shape(
  batch: int, devices: int, fsdp: int = 1, seq: int = 1, layout: str = "balanced"
) -> tuple[int, int, int, int]:
  """Sizes of the axes "data", "fsdp", "half", "seq" of the mesh that divides a batch.

  Args:
    batch: samples that are computed at a time, a multiple of `fsdp`.
    devices: that there are.
    fsdp: devices that share parameters, each with its own samples.
    seq: devices that share a clip.
    layout: balanced | plain, see the module.

  Returns:
    "data" is the largest that divides the batch and for which there are devices.

  Raises:
    ValueError: fewer devices than fsdp * seq, fsdp does not divide the batch, or with the plain
      layout a group of devices would have several samples.
  """
  if fsdp * seq > devices:
    raise ValueError(
      f"parallel.fsdp={fsdp} * parallel.seq={seq} needs {fsdp * seq} devices; there are {devices}"
    )
  check_divides("train.batch / train.accumulate", batch, "parallel.fsdp", fsdp)
  groups = devices // (fsdp * seq)
  data = next(n for n in range(groups, 0, -1) if batch // fsdp % n == 0)
  half = 2 if layout == "plain" and seq > 1 else 1
  if half == 2 and batch > data * fsdp:
    raise ValueError(
      f"parallel.layout=plain takes one sample a group of devices: with {data * fsdp} groups use"
      f" train.batch / train.accumulate={data * fsdp}, not {batch}"
    )
  return data, fsdp, half, seq // half


def make_mesh(
  batch: int,
  fsdp: int = 1,
  seq: int = 1,
  layout: str = "balanced",
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The mesh of these `devices` (default all); see `mesh_shape`.

  Raises:
    ValueError: also if a process would have none of its devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(batch, len(devices), fsdp, seq, layout)
  count = math.prod(shape)
  idle = {d.process_index for d in devices} - {d.process_index for d in devices[:count]}
  if idle:
    raise ValueError(
      f"train.batch / train.accumulate={batch} uses {count} of {len(devices)} devices, and none of"
      f" process {min(idle)}; use a batch that more of them divide, or fewer processes"
    )
  if count < len(devices):
    logging.info("a batch of %d uses %d of %d devices", batch, count, len(devices))
  axes = (AxisType.Auto,) * 4
  return jax.make_mesh(shape, (DATA, FSDP, HALF, SEQ), axes, devices=devices[:count])


def mesh_of(experiment: Experiment, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a training run.

  Raises:
    ValueError: also if `parallel.seq` cannot share a clip.
  """
  check_shared_clip(experiment)
  train, parallel = experiment.train, experiment.parallel
  part = train.batch // train.accumulate
  return make_mesh(part, parallel.fsdp, parallel.seq, parallel.layout, devices)


def sampling_mesh(experiment: Experiment, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a sampler: `parallel.seq` devices share each block; nothing else is split.

  Args:
    experiment: checked experiment.
    devices: the first of them are used (default: of those of this process).

  Raises:
    ValueError: `parallel.seq` does not divide heads and a block's latents, or there are too few
      devices.
  """
  check_shared_block(experiment)
  devices, seq = jax.local_devices() if devices is None else devices, experiment.parallel.seq
  if seq > len(devices):
    raise ValueError(f"parallel.seq={seq} needs {seq} devices; there are {len(devices)}")
  return make_mesh(1, seq=seq, devices=devices[:seq])


def local_part(mesh: Mesh, batch: int) -> tuple[range, range]:
  """What of the data this process has to read.

  Returns:
    (its samples of a batch, its places along "seq").

  Raises:
    ValueError: its devices do not form whole groups or an equal part of one.
  """
  own = np.argwhere(own_devices(mesh))
  groups = np.unique(own[:, 0] * mesh.shape[FSDP] + own[:, 1])
  halves, ranks = np.unique(own[:, 2]), np.unique(own[:, 3])
  if len(own) != len(groups) * len(halves) * len(ranks):
    raise ValueError(
      f"parallel.seq={mesh.shape[HALF] * mesh.shape[SEQ]} must divide, or be a multiple of, the"
      f" {len(own)} devices of a process"
    )
  each = batch // (mesh.shape[DATA] * mesh.shape[FSDP])
  rows = range(int(groups[0]) * each, (int(groups[-1]) + 1) * each)
  return rows, range(int(ranks[0]), int(ranks[-1]) + 1)


def own_devices(mesh: Mesh) -> np.ndarray:
  """bool array of the mesh's shape: which devices are of this process."""
  return np.vectorize(lambda device: device.process_index == jax.process_index())(mesh.devices)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays put on every device of a mesh; those of a process alone are the same in all."""
  place = NamedSharding(mesh, P())

  def put(array: ArrayLike) -> Array:
    if place.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
      return jax.device_put(array, place)
    here = np.asarray(array)  # to put it would have all processes send it to each other, to compare
    return jax.make_array_from_callback(here.shape, place, lambda index: here[index])

  return jax.tree.map(put, tree)


def split_batch(tree: PyTree, mesh: Mesh) -> PyTree:
  """Inside a jitted function: arrays split between samples along their first axis.

  An axis that holds several rows a sample, sample-major, is split between samples.
  """
  return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(SAMPLES)))
