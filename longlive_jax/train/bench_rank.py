"""Times of the work that one of several devices would have, on one device.

A device of P has 1 / P of a clip's tokens and, in self-attention, all tokens of 1 / P of the heads.
Here the exchange between the two is a copy within the device: as much is computed as there, and
nothing is sent. What the network adds to that is measured between real devices, see `bench_step`.
The layouts differ in what a device has to encode and in whose tokens it has: of the plain layout
this is a device with targets, which has the head and the loss to compute besides.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Record, setting
from longlive_jax.eval.flops import encode_flops
from longlive_jax.model.attention import Cross, TeacherForcing, block_borders
from longlive_jax.model.flow import training_table
from longlive_jax.model.ops import Attend, Dense, Ops, Plan
from longlive_jax.model.rope import video_rope
from longlive_jax.model.vae import from_uint8
from longlive_jax.parallel.halo import Windows, split_windows, whole_clip
from longlive_jax.sample.sampler import Models
from longlive_jax.train.teacher_forcing import Batch, objective
from longlive_jax.types import Array, PyTree


def one_share(dense: Dense, ranks: int, half: int) -> Attend:
  """Attention of one device of `ranks`, with copies where they would exchange."""

  def attend(
    q: Array, k: Array, v: Array, cache: Any, layer: Array | int, plan: Plan
  ) -> tuple[Array, Any]:
    del layer
    if isinstance(plan, Cross):
      return plan.attend(dense, q, k, v, None, 0)
    rows, tokens, heads, channels = q.shape
    split = (3, rows, tokens, ranks, heads // ranks, channels)
    qkv = jnp.swapaxes(jnp.stack([q, k, v]).reshape(split), 2, 3)
    q, k, v = qkv.reshape(3, rows * half, -1, heads // ranks, channels)
    out, _ = plan.attend(dense, q, k, v, None, 0)
    out = out.reshape(rows, ranks, tokens, heads // ranks, channels)
    return jnp.swapaxes(out, 1, 2).reshape(rows, tokens, heads, channels), cache

  return attend


class Share:
  """What one device of `ranks` has to do in a layout.

  Args:
    experiment: checked; one clip.
    models: networks.
    ranks: devices that share the clip.
    layout: balanced | whole clips | plain, see `bench_step.VARIANTS`.
  """

  def __init__(self, experiment: Experiment, models: Models, ranks: int, layout: str):
    self.experiment, self.models, self.plain = experiment, models, layout == "plain"
    model, latents = experiment.model, experiment.data.blocks * experiment.model.block_latents
    own = latents // ranks * (2 if self.plain else 1)
    halo = experiment.parallel.halo_latents
    self.windows: Windows = (
      split_windows(latents, ranks, halo) if layout == "balanced" else whole_clip(latents, ranks)
    )
    rows, columns = (n // model.patch for n in (experiment.latent_height, experiment.latent_width))
    borders = block_borders(latents, model.block_latents, experiment.latent_tokens)
    rope = video_rope(np.arange(latents), rows, columns, model.head_dim, model.rope_theta)
    self.plan = TeacherForcing(rope, borders)
    self.ops: Ops = dataclasses.replace(
      models.ops, attend=one_share(models.ops.dense, ranks, 2 if self.plain else 1)
    )
    self.blocks = own // model.block_latents
    size = (experiment.latent_height, experiment.latent_width, model.vae.latent_channels)
    keys = jax.random.split(jax.random.key(0), 3)
    clean, noise = (jax.random.normal(k, (1, own, *size)) for k in keys[:2])
    text = (self.blocks, model.text.length, model.text.width)
    times = jnp.full((1, own), float(training_table(model.shift).timesteps[500]))
    self.batch = Batch(clean, noise, times, jax.random.normal(keys[2], text), self.blocks)

  def gradients(self, params: PyTree, batch: Batch, plan: TeacherForcing) -> Array:
    """Norm of the gradients of the device's loss: nothing else is kept."""
    table, remat = training_table(self.experiment.model.shift), self.experiment.train.remat

    def loss(params: PyTree) -> Array:
      if not self.plain:
        return objective(self.models.dit, params, batch, plan, table, self.ops, remat)[0]
      net = self.models.dit.bind(params)
      text = net.text_kv(batch.prompts, self.ops)
      velocity, _ = net(
        batch.clean, batch.timesteps, text, plan, pieces=self.blocks, remat=remat, ops=self.ops
      )
      return jnp.mean((velocity - batch.noise) ** 2)

    return optax.tree.norm(jax.grad(loss)(params))

  def encode(self, params: PyTree, pixels: Array) -> Array:
    """Latents of the device's window."""
    return self.models.vae.bind(params).encode(from_uint8(pixels))

  def pixels(self) -> Array:
    """Random frames of it."""
    video = self.experiment.video
    shape = (1, self.windows.frames, video.height, video.width, 3)
    draw = jax.jit(lambda key: jax.random.randint(key, shape, 0, 200).astype(jnp.uint8))
    return draw(jax.random.key(1))

  def compiled(self, part: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Executable and arguments of "vae" or "gradients"."""
    if part == "vae":
      arguments, run = (self.models.params["vae"], self.pixels()), jax.jit(self.encode)
    else:
      arguments = self.models.params["dit"], self.batch, self.plan
      run = jax.jit(self.gradients)
    return run.lower(*arguments).compile(), arguments


def measure(
  experiment: Experiment,
  models: Models,
  cases: tuple[tuple[int, str], ...],
  parts: tuple[str, ...],
  repeats: int,
) -> Iterator[Record]:
  """Times "vae" and "gradients" of each (ranks, layout) in turn; the first round is not timed.

  Yields:
    A record for each case and part.
  """
  shares = {case: Share(experiment, models, *case) for case in cases}
  runs = {(*case, part): share.compiled(part) for case, share in shares.items() for part in parts}
  times: dict[Any, list[float]] = {name: [] for name in runs}
  for number in range(repeats + 1):
    for name, (run, arguments) in runs.items():
      began = time.perf_counter()
      jax.block_until_ready(run(*arguments))
      if number:
        times[name].append(time.perf_counter() - began)
  video = experiment.video
  for (ranks, layout, part), found in times.items():
    low, median, high = np.percentile(found, [10, 50, 90])
    encoded = shares[ranks, layout].windows.encoded
    flops = encode_flops(experiment.model.vae, encoded, video.height, video.width)
    yield {
      "case": "work of one device",
      "implementation": layout,
      "part": part,
      "sizes": {
        "devices": ranks,
        "layers": experiment.model.layers,
        "latents": experiment.data.blocks * experiment.model.block_latents,
        "encoded": encoded,
        "remat": experiment.train.remat,
      },
      "inputs": "random weights, pixels and latents",
      "median_seconds": median,
      "p10_seconds": low,
      "p90_seconds": high,
      "repeats": repeats,
      "tflops_per_second": flops / median / 1e12 if part == "vae" else None,
      **setting(),
    }
