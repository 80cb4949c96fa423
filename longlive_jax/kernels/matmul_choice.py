"""Which kernels are used, by what the device can do."""

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


def use_kernels(setting: str, local: bool = False) -> bool:
  """Whether layers' inputs are quantised, and the packed cache is written and read, by kernels.

  Args:
    setting: `quant.kernels`. "auto": on one Hopper GPU (the compiler does not split a kernel call
      over devices); "on" or "off".
    local: they are called inside `shard_map`, on what a device has: "auto" is any number of GPUs.

  Raises:
    ValueError: "on" without a GPU that can run them.
  """
  devices = jax.devices()
  able = kernel_for(devices[0]) == HOPPER
  if setting == "on" and not able:
    raise ValueError(
      f"quant.kernels=on needs a GPU of compute capability 9; found {devices[0].device_kind};"
      " use auto or off"
    )
  return able and (setting == "on" or (setting == "auto" and (local or len(devices) == 1)))
