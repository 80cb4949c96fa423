"""Where the frames of a video live when several devices decode it: each has some of the rows.

Only the placement is said here, of latents, frames and carried state alike, which all have rows as
their third axis. The compiler splits the network: a convolution takes the border rows of its
neighbours, the attention over the positions of a frame gathers keys and values of the latents'
size, and everything else belongs to a position.
"""

from absl import logging
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from longlive_jax.types import SEQ


def split_rows(home: Sharding, rows: int) -> Sharding:
  """The placement of arrays `[B, T, H, W, C]` whose rows are split over "seq".

  Args:
    home: of the parameters, see `parallel.rules.home_of`.
    rows: of the latents; all other heights are multiples of it.

  Returns:
    `home` itself where no devices share a video, or (logged) where they do not divide the rows.
  """
  if not isinstance(home, NamedSharding) or home.mesh.shape.get(SEQ, 1) == 1:
    return home
  ranks = home.mesh.shape[SEQ]
  if rows % ranks:
    logging.warning("%d devices do not divide %d rows of latents: each decodes all", ranks, rows)
    return home
  return NamedSharding(home.mesh, P(None, None, SEQ))


def fetched(place: Sharding, home: Sharding) -> Sharding:
  """Where arrays that a process reads are: split, unless other processes have parts of them."""
  return place if place.is_fully_addressable else home
