"""The jobs of the suite "sp": what several devices of one host do together for a block.

They share its latents, and the heads of the cache, as in `parallel.share`: one exchange turns the
tokens of q, k and v into heads, attention is local, a second exchange turns heads back. Rates are
of all devices together, but bytes are those that one of them sends to the others.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Case, chain
from longlive_jax.eval.bench_attention import attention_flops, draw, plain_attention
from longlive_jax.model.ops import Dense
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.parallel.share import LATENTS, exchanged, island
from longlive_jax.parallel.ulysses import to_heads
from longlive_jax.types import SEQ, Array

NORMAL = "normal(0, 1), seed 0"
HEADS = P(None, None, SEQ)  # [B, S, N, D]
CALLS = 8  # exchanges in one executable
COMPARED = 64  # tokens


def sharing(experiment: Experiment, devices: int) -> int:
  """How many of so many devices can share a block: they divide heads and latents.

  Raises:
    ValueError: there is one device, or they do not divide.
  """
  heads, latents = experiment.model.heads, experiment.model.block_latents
  most = max(n for n in range(1, devices + 1) if heads % n == 0 and latents % n == 0)
  if most == 1:
    raise ValueError(
      f"--suite=sp needs at least 2 devices that divide {heads} heads and {latents} latents; there"
      f" are {devices}"
    )
  return most


def cases(experiment: Experiment) -> Iterator[Case]:
  """All jobs of the suite, for as many devices of this process as can share a block.

  Raises:
    ValueError: see `sharing`.
  """
  devices = jax.local_devices()
  count = sharing(experiment, len(devices))
  mesh = make_mesh(1, seq=count, devices=devices[:count])
  model = experiment.model
  tokens = model.block_latents * experiment.latent_tokens
  keys = experiment.sample.window_latents * experiment.latent_tokens
  yield exchange(mesh, (1, tokens, model.heads, model.head_dim))
  yield ulysses(mesh, tokens, keys, (model.heads, model.head_dim))


def sent(mesh: Mesh, elements: int) -> float:
  """Bytes that a device sends when so many bfloat16 numbers of all change their split axis."""
  ranks = mesh.size
  return 2.0 * elements / ranks * (ranks - 1) / ranks


def exchange(mesh: Mesh, shape: tuple[int, int, int, int]) -> Case:
  """Tokens of q, k and v to heads, in one all-to-all."""
  place = NamedSharding(mesh, LATENTS)
  lists = [
    [jax.device_put(draw(3 * call + i, *shape), place) for call in range(CALLS)] for i in range(3)
  ]
  job = chain(lambda _, q, k, v: to_heads(q, k, v), CALLS, CALLS)
  name, elements = f"{mesh.size} devices", 3 * lists[0][0].size
  own = jnp.stack([jax.device_put(a[0], jax.devices()[0])[:, :COMPARED] for a in lists])
  return Case(
    "q, k and v from tokens to heads",
    {"tokens": shape[1], "heads": shape[2], "head_dim": shape[3], "devices": mesh.size},
    NORMAL,
    {name: island(job, mesh, (P(), LATENTS), P(None, *HEADS))},
    (jax.device_put(jnp.zeros(()), NamedSharding(mesh, P())), tuple(lists)),
    lambda results: results[0][:, :, :COMPARED],
    "the same numbers on one device",
    calls=CALLS,
    bytes_moved={name: sent(mesh, elements)},
    more={name: {"devices": mesh.size}},
    truth=lambda: own,
  )


class Window:
  """A plan of attention to keys and values that are there already; hands back the block's own."""

  def attend(
    self, dense: Dense, q: Array, k: Array, v: Array, cache: Any, layer: Array | int
  ) -> tuple[Array, Any]:
    return dense(q, *cache), (k, v)


def ulysses(mesh: Mesh, queries: int, keys: int, heads: tuple[int, int]) -> Case:
  """A block against a full window whose heads are split: two exchanges and the attention."""
  block = tuple(draw(seed, 1, queries, *heads) for seed in range(3))
  window = tuple(draw(3 + seed, 1, keys, *heads) for seed in range(2))
  name, (kind, dense) = f"{mesh.size} devices", plain_attention()
  attend, width = exchanged(dense), heads[0] * heads[1]

  def alone(block: tuple[Array, Array, Array], window: tuple[Array, Array]) -> Any:
    q, k, v = block
    return Window().attend(dense, q, k, v, window, 0)

  def together(block: tuple[Array, Array, Array], window: tuple[Array, Array]) -> Any:
    q, k, v = block
    return attend(q, k, v, window, 0, Window())

  shares = tuple(
    jax.device_put(arrays, NamedSharding(mesh, spec))
    for arrays, spec in ((block, LATENTS), (window, HEADS))
  )
  return Case(
    "Ulysses attention",
    {"queries": queries, "keys": keys, "heads": heads[0], "head_dim": heads[1]},
    NORMAL,
    {
      "one device": alone,
      name: island(together, mesh, (LATENTS, HEADS), (LATENTS, HEADS)),
    },
    (),
    lambda out: out[0],
    "one device",
    flops=attention_flops(queries, keys, width),
    bytes_moved={name: sent(mesh, 4 * queries * width)},
    more={"one device": {"devices": 1, "by": kind}, name: {"devices": mesh.size, "by": kind}},
    own={"one device": (block, window), name: shares},
  )
