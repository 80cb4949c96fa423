from types import SimpleNamespace

import jax
import pytest

from longlive_jax.kernels.matmul_choice import BLACKWELL, HOPPER, PLAIN, kernel_for


@pytest.mark.parametrize(
  ("capability", "kernel"),
  [("9.0", HOPPER), ("10.0", BLACKWELL), ("10.3", BLACKWELL), ("8.9", PLAIN), ("12.0", PLAIN)],
)
def test_kernel_is_chosen_by_capability(capability, kernel):
  assert kernel_for(SimpleNamespace(platform="gpu", compute_capability=capability)) == kernel


def test_processor_without_kernels_gets_plain_jnp():
  assert kernel_for(jax.devices("cpu")[0]) == PLAIN
  assert kernel_for(SimpleNamespace(platform="gpu", compute_capability="gfx942")) == PLAIN
