from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.kernels import hopper_matmul, matmul_choice
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


def test_comparison_times_both(monkeypatch):
  seen = []

  def reference(x, words, scales, unit, *, tuning):
    seen.append(words.shape)
    return hopper_matmul.packed_matmul_reference(x, words, scales, unit, tuning=tuning)

  monkeypatch.setattr(matmul_choice, "packed_matmul", reference)
  seconds = matmul_choice.compare_with_bfloat16(8, 128, 64, calls=2, repeats=3, warm_seconds=0.0)
  assert {name: len(times) for name, times in seconds.items()} == {"packed": 3, "bfloat16": 3}
  assert all(one > 0 for times in seconds.values() for one in times)
  assert seen == [(1, 128, 16)] * 2


@pytest.mark.gpu
def test_comparison_runs_on_a_hopper_gpu():
  if kernel_for(jax.devices()[0]) != HOPPER:
    pytest.skip("the GPU is no Hopper")
  seconds = matmul_choice.compare_with_bfloat16(64, 14336, 3072, repeats=3, warm_seconds=1.0)
  assert jnp.isfinite(jnp.asarray([*seconds.values()])).all()
