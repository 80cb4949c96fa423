"""Several executables compiled at a time: for one, XLA uses few of a machine's cores."""

import functools
import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

# How XLA chooses algorithms on a GPU: each is timed, and not compared with the others too, which
# takes minutes. At level 0, without any timing, a decoder that takes a second took over a minute.
# Products are those of cuBLAS, which XLA chose for all large ones here: fewer are timed, and a bias
# and GELU go with them. Convolutions keep channels last, as the arrays are: over frames XLA would
# put them first, and transpose.
TIMED: Mapping[str, Any] = {
  "xla_gpu_autotune_level": 1,
  "xla_gpu_enable_triton_gemm": False,
  "xla_gpu_force_conv_nhwc": True,
}


class Lowered(Protocol):
  """A function that is traced and not compiled yet, from `jax.jit(f).lower(...)`."""

  def compile(self, compiler_options: Any = None) -> Any: ...


def together[K](makers: Mapping[K, Callable[[], Any]]) -> dict[K, Any]:
  """What functions that trace and compile return, each run in a thread.

  Raises:
    Exception: what the first of them raised; the others are ended first.
  """
  with ThreadPoolExecutor(max(min(len(makers), os.cpu_count() or 1), 1)) as pool:
    return dict(zip(makers, pool.map(lambda make: make(), makers.values()), strict=True))


def compile_all[K](lowered: Mapping[K, Lowered], first: Hashable | None = None) -> dict[K, Any]:
  """Executables of traced functions.

  Args:
    lowered: the functions.
    first: one that is compiled before the others and has products in common with all of them. XLA
      remembers what it has timed; compiled at once, each would time the same, in turn on one GPU.
  """

  def make(name: K) -> Any:
    return lowered[name].compile(dict(TIMED))

  made = {name: make(name) for name in lowered if name == first}
  rest = {name: functools.partial(make, name) for name in lowered if name not in made}
  return {**made, **together(rest)}
