"""Executables that are compiled side by side."""

import threading

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.sample.together import TIMED, compile_all, together


class Recorded:
  """A traced function that notes when it is compiled, and how."""

  def __init__(self, name: str, log: list[str], gate: threading.Barrier | None = None):
    self.name, self.log, self.gate = name, log, gate

  def compile(self, compiler_options: object = None) -> str:
    assert compiler_options == TIMED
    if self.gate:
      self.gate.wait(timeout=10)  # passes only if the others are being compiled too
    self.log.append(self.name)
    return self.name.upper()


def test_the_first_is_compiled_before_the_others_and_these_side_by_side():
  log: list[str] = []
  gate = threading.Barrier(2)
  lowered = {"b": Recorded("b", log, gate), "a": Recorded("a", log), "c": Recorded("c", log, gate)}
  assert compile_all(lowered, first="a") == {"a": "A", "b": "B", "c": "C"}
  assert log[0] == "a" and sorted(log) == ["a", "b", "c"]


def test_one_alone_and_a_first_that_is_not_there():
  log: list[str] = []
  assert compile_all({"a": Recorded("a", log)}, first="a") == {"a": "A"}
  assert compile_all({"a": Recorded("a", log)}, first="b") == {"a": "A"}


def test_compiled_functions_run():
  shape = jax.ShapeDtypeStruct((3,), jnp.float32)
  made = compile_all({n: jax.jit(lambda x, n=n: x * n).lower(shape) for n in (2, 3)}, first=3)
  assert [float(made[n](jnp.ones(3))[0]) for n in (2, 3)] == [2.0, 3.0]


def test_what_a_maker_raises_comes_out():
  def fail() -> None:
    raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    together({"a": lambda: 1, "b": fail})
