"""A kernel is known by what it does, not by when it was lowered."""

import re

import jax
import jax.numpy as jnp

from longlive_jax.kernels import row_jobs
from longlive_jax.kernels.naming import core, drop_numbers
from tests.kernels.mosaic import lower

X = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)


def names(monkeypatch, count: int) -> set[str]:
  """What the same kernel is known by in some functions that are lowered one after the other."""
  texts = [lower(monkeypatch, lambda x: row_jobs.quantise_rows(x), X) for _ in range(count)]
  found = [re.findall(r'kernel_hash = "([^"]*)"', text) for text in texts]
  assert all(len(each) == 1 for each in found)
  return {each for (each,) in found}


def test_the_same_kernel_has_the_same_name(monkeypatch):
  assert len(names(monkeypatch, 3)) == 1
  now = core._run_serde_pass
  drop_numbers()
  assert core._run_serde_pass is now  # once is enough
  with monkeypatch.context() as patch:
    patch.setattr(core, "_run_serde_pass", now.numbered)
    assert len(names(monkeypatch, 3)) == 3  # as JAX does it
