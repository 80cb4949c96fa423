"""A kernel is known by what it does, not by when it was lowered, and is lowered once."""

import re

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.kernels import once, row_jobs, rows
from longlive_jax.kernels.naming import core, drop_numbers
from longlive_jax.kernels.row_jobs import Product
from tests.kernels.mosaic import lower


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, dtype)


def part_of(index: int):
  """A job on one of three products that are side by side."""
  return lambda x, w: row_jobs.rms_rows(Product(x, part=(3, index)), w, 1e-6)


X, V = shape(8, 512, dtype=jnp.bfloat16), shape(512)
SHARED, ROWS = shape(1, 512), shape(8)
JOBS = {
  "rows": (row_jobs.quantise_rows, X),
  "GELU": (lambda x, b: row_jobs.gelu_rows(Product(x, b)), X, V),
  "GELU, scaled": (lambda x, r, c: row_jobs.gelu_rows(Product(x, None, r, c)), X, ROWS, V),
  "norm": (lambda x, f: row_jobs.norm_rows(x, f, f, 1e-6, False), X, SHARED),
  "norm, other eps": (lambda x, f: row_jobs.norm_rows(x, f, f, 1e-5, False), X, SHARED),
  "norm to FP8": (lambda x, f: row_jobs.norm_rows(x, f, f, 1e-6, True), X, SHARED),
  "sum": (lambda x, g: row_jobs.add_norm_rows(x, Product(x), g, g, g, 1e-6, False), X, SHARED),
  "sum, no gate": (
    lambda x, f: row_jobs.add_norm_rows(x, Product(x), None, f, f, 1e-6, False),
    X,
    SHARED,
  ),
  "rms": (lambda x, w: row_jobs.rms_rows(Product(x), w, 1e-6), X, V),
  "rms, turned": (
    lambda x, w, c: row_jobs.rms_rows(Product(x), w, 1e-6, (c, c)),
    *(X, V, shape(8, 64)),
  ),
  "rms of one of three": (part_of(1), shape(8, 1536, dtype=jnp.bfloat16), V),
  "rms of another": (part_of(2), shape(8, 1536, dtype=jnp.bfloat16), V),
}


def call(monkeypatch, job, *shapes: jax.ShapeDtypeStruct) -> str:
  """The custom call of a job in a function of its own, without the names of its operands."""
  text = lower(monkeypatch, lambda *args: job(*args), *shapes)
  (line,) = [line for line in text.splitlines() if "mosaic_gpu_v2" in line]
  return re.sub(r"%\S+", "", line).strip()


def name(monkeypatch, job, *shapes: jax.ShapeDtypeStruct) -> str:
  """What the kernel of a job is known by."""
  return re.findall(r'kernel_hash = "([^"]*)"', call(monkeypatch, job, *shapes))[0]


@pytest.fixture
def anew(monkeypatch):
  """Lowers every call of a kernel, as JAX does."""
  monkeypatch.setattr(rows, "call_once_lowered", lambda run, key, args, outs, _: run(*args))


def test_the_same_kernel_has_the_same_name(monkeypatch, anew):
  assert len({name(monkeypatch, *JOBS["rows"]) for _ in range(3)}) == 1
  now = core._run_serde_pass
  drop_numbers()
  assert core._run_serde_pass is now  # once is enough
  monkeypatch.setattr(core, "_run_serde_pass", now.numbered)
  assert len({name(monkeypatch, *JOBS["rows"]) for _ in range(3)}) == 3


def test_other_jobs_are_other_kernels_and_each_is_lowered_once(monkeypatch):
  lowered, lower_kernel = [], once.lower_kernel
  monkeypatch.setattr(once, "_LOWERED", {})
  monkeypatch.setattr(once, "lower_kernel", lambda *args: lowered.append(1) or lower_kernel(*args))
  for _ in range(2):
    assert len({name(monkeypatch, *job) for job in JOBS.values()}) == len(JOBS)
  assert len(lowered) == len(JOBS)


@pytest.mark.parametrize("kind", JOBS)
def test_it_is_called_as_jax_would_call_it(monkeypatch, kind):
  ours = call(monkeypatch, *JOBS[kind])
  monkeypatch.setattr(rows, "call_once_lowered", lambda run, key, args, outs, _: run(*args))
  theirs = call(monkeypatch, *JOBS[kind])
  assert ours.split("loc(")[0] == theirs.split("loc(")[0]


def test_what_is_no_kernel_cannot_be_called_so():
  with pytest.raises(ValueError, match="a kernel is one call of mosaic_gpu_v2; found 0"):
    once.lower_kernel(lambda x: x + 1, [X])
