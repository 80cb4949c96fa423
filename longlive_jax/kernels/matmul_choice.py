"""Which kernel multiplies NVFP4 operands, by what the device can do."""

import jax

HOPPER, BLACKWELL, PLAIN = "hopper", "blackwell", "plain"
_BY_CAPABILITY = {"9": HOPPER, "10": BLACKWELL}


def kernel_for(device: jax.Device) -> str:
  """ "hopper" (`packed_matmul`), "blackwell" (`block_scaled_matmul`) or "plain" (jnp).

  Blackwell means compute capability 10: parts of 11 and 12 lack the instructions of the kernel.
  """
  capability = getattr(device, "compute_capability", None)
  if device.platform != "gpu" or capability is None:
    return PLAIN
  return _BY_CAPABILITY.get(str(capability).split(".")[0], PLAIN)
