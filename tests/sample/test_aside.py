"""What is put aside is what was there, in pinned memory while there is room for it."""

import gc

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.sample.aside import Aside, bytes_of, to_host


def drawn(seed: int) -> dict:
  return {"a": jax.random.normal(jax.random.key(seed), (4, 8)), "b": (jnp.arange(6), None)}


def kinds(tree: dict) -> set[str]:
  return {
    a.sharding.memory_kind if isinstance(a, jax.Array) else "ordinary"
    for a in jax.tree.leaves(tree)
  }


def check_same(found: dict, wanted: dict) -> None:
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_pinned_memory_is_taken_while_there_is_some_and_given_back():
  size = bytes_of(drawn(0))
  aside = Aside(2 * size)
  first, second, third = (aside.start(drawn(seed))() for seed in range(3))
  assert kinds(first) == kinds(second) == {"pinned_host"} and kinds(third) == {"ordinary"}
  for seed, found in enumerate((first, second, third)):
    check_same(found, to_host(drawn(seed)))
  assert aside.left == 0
  del first
  gc.collect()
  assert aside.left == size
  again = aside.start(drawn(4))()
  assert kinds(again) == {"pinned_host"} and aside.left == 0
  part = again["a"]  # outlives the rest
  del again, found
  gc.collect()
  assert aside.left == size - part.nbytes


def test_a_machine_with_less_pinned_memory_uses_the_other(monkeypatch):
  def full(tree: dict) -> dict:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")

  monkeypatch.setattr("longlive_jax.sample.aside.parked", full)
  aside = Aside(1 << 20)
  found = aside.start(drawn(3))()
  assert kinds(found) == {"ordinary"} and aside.left == 1 << 20
  check_same(found, to_host(drawn(3)))


def test_copies_that_nobody_waits_for_are_given_back():
  """A block that failed meanwhile."""
  aside = Aside()
  before, wait = aside.left, aside.start(drawn(0))
  assert aside.left == before - bytes_of(drawn(0))
  del wait
  gc.collect()
  assert aside.left == before


def test_copies_that_fail_on_their_way_are_made_in_the_other_memory(monkeypatch):
  def failing(copies: dict) -> dict:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of pinned memory")

  aside = Aside(1 << 20)
  wait = aside.start(drawn(3))
  monkeypatch.setattr("longlive_jax.sample.aside.jax.block_until_ready", failing)
  found = wait()
  assert kinds(found) == {"ordinary"}
  check_same(found, to_host(drawn(3)))
  del wait
  gc.collect()
  assert aside.left == 1 << 20


def test_what_was_put_aside_may_be_donated():
  use = jax.jit(lambda tree: jax.tree.map(lambda a: a * 2, tree), donate_argnums=0)
  tree, aside = drawn(7), Aside()
  kept = aside.start(tree)()
  use(tree)
  check_same(kept, to_host(drawn(7)))
  assert aside.start((None, {}))() == (None, {})
