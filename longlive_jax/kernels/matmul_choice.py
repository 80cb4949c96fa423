"""Which kernel multiplies NVFP4 operands, by what the device can do; and how fast it is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.kernels.hopper_layout import TILE_K
from longlive_jax.kernels.hopper_matmul import packed_matmul
from longlive_jax.kernels.hopper_tuning import Tuning
from longlive_jax.kernels.timing import alternated_seconds
from longlive_jax.types import Array

HOPPER, BLACKWELL, PLAIN = "hopper", "blackwell", "plain"
_BY_CAPABILITY = {"9": HOPPER, "10": BLACKWELL}
_L2_BYTES = 64 << 20
Weights = tuple[list[Array], ...]


def kernel_for(device: jax.Device) -> str:
  """ "hopper" (`packed_matmul`), "blackwell" (`block_scaled_matmul`) or "plain" (jnp).

  Blackwell means compute capability 10: parts of 11 and 12 lack the instructions of the kernel.
  """
  capability = getattr(device, "compute_capability", None)
  if device.platform != "gpu" or capability is None:
    return PLAIN
  return _BY_CAPABILITY.get(str(capability).split(".")[0], PLAIN)


def compare_with_bfloat16(
  m: int,
  n: int,
  k: int,
  *,
  tuning: Tuning | None = None,
  calls: int = 16,
  repeats: int = 20,
  warm_seconds: float = 20.0,
) -> dict[str, list[float]]:
  """Seconds of one product by the Hopper kernel, and by XLA with the weight in bfloat16.

  Several products run in one executable, since one can be shorter than its launch. Each takes
  another weight, as in a network, so that no weight is found in the L2 cache.

  Args:
    m: rows of x.
    n: rows of the weight.
    k: columns of both.
    tuning: of the kernel.
    calls: products in an executable.
    repeats: timed runs.
    warm_seconds: of the chip before.

  Returns:
    {"packed": seconds, "bfloat16": seconds}, one number for each run; inputs are random.
  """
  packed_bytes = n * k * 9 // 16
  copies = min(calls, 2 + _L2_BYTES // packed_bytes)
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  words = jax.random.bits(keys[1], (copies, k // TILE_K, n, 16), jnp.uint16)
  words = lax.bitcast_convert_type(words, jnp.int16)
  scales = jax.random.uniform(keys[2], (copies, k // TILE_K, 4, n)).astype(jnp.float8_e4m3fn)
  plain = jax.random.normal(keys[3], (copies, n, k), jnp.bfloat16)

  def packed(x: Array, w: Weights, i: int) -> Array:
    return packed_matmul(x, w[0][i], w[1][i], jnp.float32(1), tuning=tuning)

  def bfloat16(x: Array, w: Weights, i: int) -> Array:
    axes = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w[2][i], axes, preferred_element_type=jnp.bfloat16)

  def chain(product: Callable[[Array, Weights, int], Array]) -> Callable[[Array, Weights], Array]:
    def run(x: Array, w: Weights) -> Array:
      corners = []
      for call in range(calls):
        x, y = lax.optimization_barrier((x, product(x, w, call % copies)))
        corners.append(y[:1, :1])
      return jnp.concatenate(corners)

    return jax.jit(run)

  seconds = alternated_seconds(
    {"packed": chain(packed), "bfloat16": chain(bfloat16)},
    x,
    ([*words], [*scales], [*plain]),
    repeats=repeats,
    warm_seconds=warm_seconds,
  )
  return {name: [one / calls for one in times] for name, times in seconds.items()}
