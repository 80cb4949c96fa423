"""Times of a training step over a mesh, and of what it is made of.

Parts are functions of their own that end where the step goes on: encoding the clip, encoding the
prompts, the loss, the loss with gradients, the whole update. What the backward pass and the
optimiser take follows by subtraction. Weights, pixels and prompts are random; variants run in one
process, in turn.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Record, setting
from longlive_jax.eval.flops import encode_flops, peak_flops, step_flops, text_flops
from longlive_jax.parallel.halo import encode, windows_of
from longlive_jax.parallel.mesh import mesh_of
from longlive_jax.parallel.parked import at_hand
from longlive_jax.sample.sampler import Models
from longlive_jax.train.feed import text_dropout, turns_of
from longlive_jax.train.state import init_state, make_optimizer, place_state
from longlive_jax.train.step import Clips, make_loss, make_part, make_step, state_places
from longlive_jax.types import SAMPLES, SEQ, Array, PyTree

PARTS = ("vae", "text", "forward", "gradients", "update")
# variant -> settings of `parallel`
VARIANTS: dict[str, dict[str, Any]] = {
  "balanced": {"layout": "balanced", "chunk_vae": True},
  "whole clips": {"layout": "balanced", "chunk_vae": False},
  "plain": {"layout": "plain", "chunk_vae": False},
}
Run = Callable[[], Any]


def varied(experiment: Experiment, name: str) -> Experiment:
  """The experiment as a variant of `VARIANTS`."""
  parallel = dataclasses.replace(experiment.parallel, **VARIANTS[name])
  return dataclasses.replace(experiment, parallel=parallel)


def random_on(mesh: Mesh, shape: tuple[int, ...], spec: P, dtype: Any, seed: int) -> Array:
  """Random numbers made where they live."""

  def draw(key: Array) -> Array:
    if jnp.issubdtype(dtype, jnp.integer):
      return jax.random.randint(key, shape, 0, 200).astype(dtype)
    return jax.random.normal(key, shape, dtype)

  return jax.jit(draw, out_shardings=NamedSharding(mesh, spec))(jax.random.key(seed))


def random_clips(experiment: Experiment, mesh: Mesh) -> Clips:
  """Random latents and prompts of an update."""
  batch, blocks, model = experiment.train.batch, experiment.data.blocks, experiment.model
  size = (experiment.latent_height, experiment.latent_width, model.vae.latent_channels)
  shape = (batch, blocks * model.block_latents, *size)
  latents = random_on(mesh, shape, P(SAMPLES, SEQ), jnp.float32, 2)
  shape = (batch * blocks, model.text.length, model.text.width)
  prompts = random_on(mesh, shape, P(SAMPLES), model.text.dtype, 3)
  turns = turns_of(experiment, np.zeros((batch, blocks), np.int32))
  cos, sin = jax.device_put(turns, NamedSharding(mesh, P(SAMPLES)))
  return Clips(latents, prompts, cos, sin)


def encode_part(experiment: Experiment, models: Models, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
  """(function, arguments) of encoding the clips of an update."""
  windows, split = windows_of(experiment, mesh.shape[SEQ])
  video = experiment.video
  shape = (experiment.train.batch, mesh.shape[SEQ] if split else 1, windows.frames)
  spec = P(SAMPLES, SEQ) if split else P(SAMPLES)
  pixels = random_on(mesh, (*shape, video.height, video.width, 3), spec, jnp.uint8, 1)

  def run(params: PyTree, pixels: Array) -> Array:
    return encode(models.vae, params, pixels, windows, mesh)

  return run, (models.params["vae"], pixels)


def text_part(experiment: Experiment, models: Models, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
  """(function, arguments) of encoding the prompts of an update."""
  prompts = text_dropout(experiment, models)
  shape = (experiment.train.batch, experiment.data.blocks, experiment.model.text.length)
  ids = random_on(mesh, shape, P(SAMPLES), jnp.int32, 4)

  def run(params: PyTree, ids: Array) -> Array:
    return prompts(jax.random.key(0), ids, jnp.ones_like(ids), params)

  return run, (at_hand(models.params["text"]), ids)


class Variant:
  """The parts of one way to run the step, compiled.

  Args:
    experiment: checked.
    models: networks, and the weights of VAE and text encoder.
    parts: of `PARTS`.
  """

  def __init__(self, experiment: Experiment, models: Models, parts: tuple[str, ...]):
    self.experiment, self.mesh = experiment, mesh_of(experiment)
    self.optimizer = make_optimizer(experiment.train)
    self.places = state_places(models, self.optimizer, self.mesh)
    clips, mesh = random_clips(experiment, self.mesh), self.mesh
    loss = make_loss(experiment, models, mesh)

    def forward(params: PyTree, clips: Clips) -> Array:
      return loss(params, make_part(experiment, 0, clips, None))[0]

    def gradients(params: PyTree, clips: Clips) -> tuple[Array, Array]:
      value, found = jax.value_and_grad(forward)(params, clips)
      found = jax.lax.with_sharding_constraint(found, self.places.params)
      return value, optax.tree.norm(found)

    params = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      models.dit.abstract,
      self.places.params,
    )
    made: dict[str, tuple[Any, tuple[Any, ...]]] = {
      "forward": (forward, (params, clips)),
      "gradients": (gradients, (params, clips)),
    }
    if "vae" in parts:
      made["vae"] = encode_part(experiment, models, mesh)
    if "text" in parts:
      made["text"] = text_part(experiment, models, mesh)
    self.clips, self.compiled, self.known = clips, {}, {}
    for name in parts:
      began = time.perf_counter()
      if name == "update":
        abstract = jax.eval_shape(lambda p: init_state(p, self.optimizer), params)
        state = jax.tree.map(
          lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, self.places
        )
        step: Any = make_step(experiment, models, self.optimizer, mesh)
        executable = step.lower(state, clips, None)
      else:
        executable = jax.jit(made[name][0]).lower(*made[name][1])
      self.compiled[name] = executable.compile()
      memory = self.compiled[name].memory_analysis()
      self.known[name] = {
        "compile_seconds": time.perf_counter() - began,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "argument_bytes": memory.argument_size_in_bytes if memory else None,
      }
    self.arguments = {name: made[name][1] for name in ("vae", "text") if name in parts}

  def seconds(self, name: str, state: Any) -> tuple[float, Any]:
    """Seconds of a part, and the state after it."""
    began = time.perf_counter()
    if name == "update":
      state, metrics, _ = self.compiled[name](state, self.clips, None)
      jax.block_until_ready((state, metrics))
    elif name in self.arguments:
      jax.block_until_ready(self.compiled[name](*self.arguments[name]))
    else:
      jax.block_until_ready(self.compiled[name](state.params, self.clips))
    return time.perf_counter() - began, state

  def flops(self, name: str) -> float:
    """Model operations of a part, of all devices; of encoding, what they do together."""
    e, windows = self.experiment, windows_of(self.experiment, self.mesh.shape[SEQ])[0]
    size = (windows.encoded, e.video.height, e.video.width)
    whole = step_flops(e)
    return {
      "vae": e.train.batch * self.mesh.shape[SEQ] * encode_flops(e.model.vae, *size),
      "text": text_flops(e.model.text, e.train.batch * e.data.blocks),
      "forward": whole / 3,
    }.get(name, whole)


def measure(
  experiment: Experiment,
  models: Models,
  variants: tuple[str, ...],
  parts: tuple[str, ...],
  repeats: int,
) -> Iterator[Record]:
  """Times the parts of all variants in turn; one round before is not timed.

  Yields:
    A record for each variant and part.
  """
  made = {name: Variant(varied(experiment, name), models, parts) for name in variants}
  first = next(iter(made.values()))
  state = place_state(models.params["dit"], first.optimizer, first.places)
  times: dict[tuple[str, str], list[float]] = {(v, p): [] for v in made for p in parts}
  for number in range(repeats + 1):
    for name, variant in made.items():
      state = jax.device_put(state, variant.places)
      for part in parts:
        seconds, state = variant.seconds(part, state)
        if number:
          times[name, part].append(seconds)
  stats = jax.local_devices()[0].memory_stats() or {}
  kind, peak = jax.devices()[0].device_kind, peak_flops(jax.devices()[0].device_kind)
  for (name, part), found in times.items():
    low, median, high = np.percentile(found, [10, 50, 90])
    variant = made[name]
    rate = variant.flops(part) / median / variant.mesh.size
    yield {
      "case": "training step",
      "implementation": name,
      "part": part,
      "sizes": sizes_of(variant.experiment, variant.mesh),
      "inputs": "random weights, pixels, tokens and latents",
      "median_seconds": median,
      "p10_seconds": low,
      "p90_seconds": high,
      "repeats": repeats,
      "tflops_per_second_per_device": rate / 1e12,
      "mfu": rate / peak if peak and part in ("gradients", "update") else None,
      "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
      **variant.known[part],
      **setting(),
      "device": kind,
    }


def sizes_of(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
  """What a record says of sizes."""
  return {
    "layers": experiment.model.layers,
    "width": experiment.model.width,
    "latents": experiment.data.blocks * experiment.model.block_latents,
    "batch": experiment.train.batch,
    "remat": experiment.train.remat,
    "linears": experiment.quant.linears,
    **{name: size for name, size in mesh.shape.items()},
  }
