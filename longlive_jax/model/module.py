"""Networks are declared as NNX modules and used as pure functions of a nested dict of arrays.

`declare` splits a module once into its static graph and the shapes of its parameters; afterwards
parameters are plain pytrees (`dict[str, ...]` of arrays) that every transformation, optimiser and
checkpoint handles without knowing NNX, and `Network.bind(params)` gives back a callable module
inside the traced function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from longlive_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A declared network; hashed by identity, so it can be a static argument of `jit`.

  Attributes:
    build: makes the module from an `nnx.Rngs`.
    graph: static structure.
    abstract: nested dict of `jax.ShapeDtypeStruct`, the shapes of the parameters.
  """

  build: Callable[[nnx.Rngs], nnx.Module]
  graph: Any
  abstract: PyTree

  def init(
    self,
    seed: int,
    places: PyTree | None = None,
    change: Callable[[PyTree], PyTree] = lambda params: params,
  ) -> PyTree:
    """Draws fresh parameters; the same seed gives the same numbers on any mesh.

    Args:
      seed: of all of them.
      places: their shardings; None = one device.
      change: of the parameters, before any of them is in memory as it was drawn.
    """

    def make(key: jax.Array) -> PyTree:
      return change(nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(params=key)))[1]))

    return jax.jit(make, out_shardings=places)(jax.random.key(seed))

  def bind(self, params: PyTree) -> Any:
    """Returns the module with these parameters, callable inside a traced function."""
    return nnx.merge(self.graph, params)

  def bind_part(self, params: PyTree) -> Any:
    """The module with some of its parameters, by their first names; it must not use the others."""
    return self.bind({**self.abstract, **params})


def declare(build: Callable[[nnx.Rngs], nnx.Module]) -> Network:
  """Splits the module that `build` makes, without allocating its parameters."""
  module = nnx.eval_shape(lambda: build(nnx.Rngs(params=0)))
  graph, state = nnx.split(module)
  return Network(build, graph, nnx.to_pure_dict(state))


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
  """Makes `count` equal layers whose parameters carry a leading layer axis, for `lax.scan`."""
  keys = jax.random.split(rngs.params(), count)
  return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def count_parameters(params: PyTree) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
