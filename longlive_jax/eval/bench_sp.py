"""The jobs of the suite "sp": what several devices of one host do together for a block.

They share its latents, and the heads of the cache, as in `parallel.share`: one exchange turns the
tokens of q, k and v into heads, attention is local, a second exchange turns heads back. Rates are
of all devices together, but bytes are those that one of them sends to the others.
"""

from collections.abc import Iterator, Sequence
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
from longlive_jax.parallel.share import AS_THEY_ARE, LATENTS, Travel, exchanged, island, to_heads
from longlive_jax.quant.fp8 import from_bytes, to_bytes
from longlive_jax.types import SEQ, Array

NORMAL = "normal(0, 1), seed 0"
HEADS = P(None, None, SEQ)  # [B, S, N, D]
CALLS = 8  # exchanges in one executable
COMPARED = 64  # tokens
FP8 = Travel(to_bytes, from_bytes)


def ways(mesh: Mesh) -> dict[str, Travel]:
  """Implementations by name."""
  name = f"{mesh.size} devices"
  return {name: AS_THEY_ARE, f"{name} in fp8": FP8}


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


def sent(mesh: Mesh, elements: int, head_dim: int) -> dict[str, float]:
  """Bytes that a device sends when so many numbers of all change their split axis, by way."""
  ranks = mesh.size
  moved = elements / ranks * (ranks - 1) / ranks
  return dict(zip(ways(mesh), (2.0 * moved, moved * (1 + 4 / head_dim)), strict=True))


def exchange(mesh: Mesh, shape: tuple[int, int, int, int]) -> Case:
  """Tokens of q, k and v to heads."""
  place = NamedSharding(mesh, LATENTS)
  lists = [
    [jax.device_put(draw(3 * call + i, *shape), place) for call in range(CALLS)] for i in range(3)
  ]
  elements = 3 * lists[0][0].size

  def job(travel: Travel) -> Any:
    run = chain(lambda _, *qkv: [to_heads(x, travel) for x in qkv], CALLS, CALLS)
    return island(run, mesh, (P(), LATENTS), HEADS)

  def first(arrays: Sequence[Array]) -> Array:
    return jnp.stack([jax.device_put(a, jax.devices()[0])[:, :COMPARED] for a in arrays])

  return Case(
    "q, k and v from tokens to heads",
    {"tokens": shape[1], "heads": shape[2], "head_dim": shape[3], "devices": mesh.size},
    NORMAL,
    {name: job(travel) for name, travel in ways(mesh).items()},
    (jax.device_put(jnp.zeros(()), NamedSharding(mesh, P())), tuple(lists)),
    lambda results: first(results[0]),
    "the same numbers on one device",
    calls=CALLS,
    bytes_moved=sent(mesh, elements, shape[3]),
    more={name: {"devices": mesh.size} for name in ways(mesh)},
    truth=lambda: first([a[0] for a in lists]),
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
  (kind, dense), width = plain_attention(), heads[0] * heads[1]

  def alone(block: tuple[Array, Array, Array], window: tuple[Array, Array]) -> Any:
    q, k, v = block
    return Window().attend(dense, q, k, v, window, 0)

  def together(travel: Travel) -> Any:
    attend = exchanged(dense, travel)

    def run(block: tuple[Array, Array, Array], window: tuple[Array, Array]) -> Any:
      return attend(*block, window, 0, Window())

    return island(run, mesh, (LATENTS, HEADS), (LATENTS, HEADS))

  shares = tuple(
    jax.device_put(arrays, NamedSharding(mesh, spec))
    for arrays, spec in ((block, LATENTS), (window, HEADS))
  )
  return Case(
    "Ulysses attention",
    {"queries": queries, "keys": keys, "heads": heads[0], "head_dim": heads[1]},
    NORMAL,
    {"one device": alone} | {name: together(travel) for name, travel in ways(mesh).items()},
    (),
    lambda out: out[0],
    "one device",
    flops=attention_flops(queries, keys, width),
    bytes_moved=sent(mesh, 4 * queries * width, heads[1]),
    more={"one device": {"devices": 1, "by": kind}}
    | {name: {"devices": mesh.size, "by": kind} for name in ways(mesh)},
    own={"one device": (block, window)} | dict.fromkeys(ways(mesh), shares),
  )
