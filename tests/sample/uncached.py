"""A rollout without any cache: every velocity is a forward over all latents so far.

The sequence is [block 0, block 1, ..., own block]. Who sees whom, and how the keys are turned for
whom, is spelled out block by block, so that any story (cuts, pins, blocks that were evicted or
computed again, relative positions) is one masked forward. Euler steps, one sample.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from longlive_jax.config import Experiment
from longlive_jax.model.module import Network
from longlive_jax.types import Array, ArrayLike, PyTree


@functools.partial(
  register_dataclass, data_fields=["queries", "keys", "seen"], meta_fields=["blocks"]
)
@dataclasses.dataclass(frozen=True)
class Spelled:
  """An attention plan.

  Attributes:
    blocks: n, of S_b tokens each.
    queries: complex turns `[n, S_b, D/2]`.
    keys: complex turns `[n, n * S_b, D/2]` of all keys, for each block of queries.
    seen: bool `[n, n]`: query block, key block.
  """

  blocks: int
  queries: ArrayLike
  keys: ArrayLike
  seen: ArrayLike

  def attend(
    self, dense: Any, q: Array, k: Array, v: Array, cache: Any, layer: Any
  ) -> tuple[Array, Any]:
    size, outs = q.shape[1] // self.blocks, []
    for block in range(self.blocks):
      own = turn(q[:, block * size : (block + 1) * size], self.queries[block])
      logits = jnp.einsum("bqnd,bknd->bnqk", own, turn(k, self.keys[block])) / q.shape[-1] ** 0.5
      logits = jnp.where(jnp.repeat(jnp.asarray(self.seen)[block], size), logits, -jnp.inf)
      outs.append(jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(logits, -1), v))
    return jnp.concatenate(outs, 1), cache


def turn(x: Array, by: ArrayLike) -> Array:
  """Turns the pairs (2j, 2j + 1) of `x [B, S, N, D]`, as complex numbers, by `[S, D/2]`."""
  pairs = x.reshape(*x.shape[:-1], -1, 2)
  turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * jnp.asarray(by)[:, None]
  return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def turns(config: Experiment, positions: np.ndarray) -> np.ndarray:
  """Complex turns `[F * S_f, D/2]` of latents at temporal positions `[F]`."""
  model = config.model
  pairs = model.head_dim // 2
  rows, columns = (n // model.patch for n in (config.latent_height, config.latent_width))
  grid = np.meshgrid(positions, np.arange(rows), np.arange(columns), indexing="ij")
  sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
  angles = [
    axis.reshape(-1, 1) * model.rope_theta ** (-np.arange(size) / size)
    for axis, size in zip(grid, sizes, strict=True)
  ]
  return np.exp(1j * np.concatenate(angles, 1)).astype(np.complex64)


@dataclasses.dataclass
class Entry:
  """A finished block as it was last computed: what it saw then, the prompt, its place."""

  latents: np.ndarray
  prompt: int
  position: float
  seen: list[int]


@dataclasses.dataclass
class Uncached:
  """Plays a story for one sample.

  Attributes:
    config: gives sizes, policy, steps, shift, guidance.
    network: declared DiT.
    params: its parameters.
    prompts: embeddings `[count, L, E_text]`; the last one is the negative prompt.
    blocks: how many there can be.
  """

  config: Experiment
  network: Network
  params: PyTree
  prompts: np.ndarray
  blocks: int

  def __post_init__(self) -> None:
    self.entries: dict[int, Entry] = {}
    self.kept: list[int] = []  # oldest first
    self.pin, self.cuts = -1, 0

  @functools.cached_property
  def forward(self) -> Callable[..., Array]:
    pieces = self.blocks + 1

    def run(params: PyTree, x: Array, t: Array, prompts: Array, plan: Spelled) -> Array:
      model = self.network.bind(params)
      return model(x, t, model.text_kv(prompts), plan, pieces=pieces)[0]

    return jax.jit(run)

  def velocity(
    self, x: np.ndarray, times: np.ndarray, prompt: int, position: float, negative: bool
  ) -> np.ndarray:
    """Velocity of the own block `x [F, H, W, C]`, which is last of those kept."""
    n = self.blocks + 1
    latents, t = np.zeros((n, *x.shape), np.float32), np.zeros((n, len(x)), np.float32)
    positions, chosen = np.zeros(n), np.full(n, len(self.prompts) - 1)
    seen = np.eye(n, dtype=bool)
    ranks = np.zeros((n, n))
    rows = {b: (e.latents, 0.0, e.position, e.prompt, e.seen) for b, e in self.entries.items()}
    rows[-1] = (x, times, position, prompt, [*self.kept[:-1], -1])
    for row, (value, time, place, index, others) in rows.items():
      latents[row], t[row], positions[row] = value, time, place
      chosen[row] = len(self.prompts) - 1 if negative else index
      seen[row, others] = True
      ranks[row, others] = np.arange(len(others)) * len(x)
    plan = self.plan(positions, ranks, seen, len(x))
    shape = (1, n * len(x), *x.shape[1:])
    prompts = self.prompts[chosen]
    out = self.forward(self.params, latents.reshape(shape), t.reshape(1, -1), prompts, plan)
    return np.asarray(out)[0, -len(x) :]

  def plan(self, positions: np.ndarray, ranks: np.ndarray, seen: np.ndarray, size: int) -> Spelled:
    """The plan; positions are those of the blocks, or their ranks among what a block sees."""
    n, sample = len(positions), self.config.sample
    starts = ranks if sample.relative_rope else np.tile(positions, (n, 1))
    steps = np.arange(size)
    keys = [turns(self.config, ((row[:, None] + steps) * sample.t_scale).ravel()) for row in starts]
    own = np.diagonal(starts)[:, None] + steps
    queries = [turns(self.config, row * sample.t_scale) for row in own]
    return Spelled(n, np.stack(queries), np.stack(keys), seen)

  def block(
    self,
    noise: np.ndarray,
    prompt: int,
    cut: bool = False,
    recache: bool = False,
    first: np.ndarray | None = None,
  ) -> np.ndarray:
    """Samples the next block from `noise [F, H, W, C]`; `first [1, H, W, C]` is given."""
    sample, size = self.config.sample, len(noise)
    if recache:
      self.compute_again(prompt)
    number = len(self.entries)
    self.cuts += cut
    position = number * size + self.cuts * sample.shot_offset_latents
    self.enter(number)
    x, given = np.array(noise), 0 if first is None else 1
    sigmas = np.linspace(1.0, 0.0, sample.steps + 1)
    sigmas = self.config.model.shift * sigmas / (1 + (self.config.model.shift - 1) * sigmas)
    for sigma, after in itertools.pairwise(sigmas):
      x[:given] = first if given else 0.0
      times = np.full(size, 1000.0 * sigma)
      times[:given] = 0.0
      v = self.velocity(x, times, prompt, position, negative=False)
      if sample.guidance != 1.0:
        away = self.velocity(x, times, prompt, position, negative=True)
        v = away + sample.guidance * (v - away)
      x = x + np.float32(after - sigma) * v
    x[:given] = first if given else 0.0
    self.take(number, x, prompt, position, cut)
    return x

  def enter(self, number: int) -> None:
    """Makes room and lets the block in."""
    sample, size = self.config.sample, self.config.model.block_latents
    if len(self.kept) == sample.window_latents // size:
      sink = sample.sink_latents // size
      self.kept.remove(next(b for b in self.kept if b >= sink and b != self.pin))
    self.kept.append(number)

  def take(self, number: int, x: np.ndarray, prompt: int, position: float, cut: bool) -> None:
    """Keeps the finished block, clean."""
    sample = self.config.sample
    if cut and sample.recache_cuts:
      self.kept = [b for b in self.kept[:-1] if b < self.sink] + [number]
    self.entries[number] = Entry(x, prompt, position, list(self.kept))
    if cut and sample.pin_shots:
      self.pin = number

  @property
  def sink(self) -> int:
    return self.config.sample.sink_latents // self.config.model.block_latents

  def compute_again(self, prompt: int) -> None:
    """All but the sink, in order, under another prompt; each sees the sink and those before."""
    for place, number in enumerate(self.kept):
      if number >= self.sink:
        old = self.entries[number]
        self.entries[number] = Entry(old.latents, prompt, old.position, self.kept[: place + 1])
