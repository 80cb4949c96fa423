"""Running Mosaic GPU kernels without a GPU: interpreted on a CPU, or lowered only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextmanager
def interpreted() -> Iterator[None]:
  """Kernels called inside are interpreted; a race between warpgroups or blocks is an error."""
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    try:
      yield
      found = gpu_callbacks.get_races().races_found
    finally:
      gpu_callbacks.reset_gpu_interpret_mode_state()
  assert not found, "the interpreter saw a race; it prints where"


def lower(
  monkeypatch, function: Callable, *shapes: jax.ShapeDtypeStruct, arch: tuple[int, int] = (9, 0)
) -> str:
  """StableHLO of `function` for CUDA; raises what Mosaic finds wrong with a kernel for `arch`."""
  device = jax.sharding.AbstractDevice(device_kind="a GPU", platform="gpu", num_cores=132)
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with monkeypatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
    patch.setattr(utils, "_infer_arch", lambda: arch)
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
  return lowered.as_text()
