"""The jobs of the suite "block": one whole block of a long video, in bfloat16 and in NVFP4.

The window is full, as it is in all but the first blocks of a video: all denoising steps against
the cache, then the clean pass that leaves the block in it. Weights, cache and text are random; all
variants come from the same ones. A call copies its cache once, which a rollout that owns its cache
does not do: at 5B sizes 10 GB of bfloat16, 6 ms of 3.35 TB/s.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Case, Record
from longlive_jax.kernels.matmul_choice import use_kernels
from longlive_jax.model import solvers
from longlive_jax.model.dit import TextKV, declare_dit, separate_layers
from longlive_jax.model.kv_cache import KVCache, SlotState
from longlive_jax.model.ops import Ops
from longlive_jax.quant.kv import QuantisedKVCache, Store
from longlive_jax.quant.nvfp4 import Spec, quantise
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.latents import block_shape
from longlive_jax.sample.schedule import SampleState, Schedule, Tables
from longlive_jax.types import Array, PyTree

BFLOAT16 = "bfloat16"
# variant -> (quant.linears, quant.cache)
VARIANTS = {
  BFLOAT16: ("none", "none"),
  "nvfp4 linears": ("nvfp4", "none"),
  "nvfp4 cache": ("none", "nvfp4"),
  "nvfp4 both": ("nvfp4", "nvfp4"),
}


def varied(experiment: Experiment, linears: str, cache: str) -> Experiment:
  """The experiment with other precisions."""
  other = copy.deepcopy(dataclasses.replace(experiment))
  other.quant = dataclasses.replace(experiment.quant, linears=linears, cache=cache)
  return other


def random_params(experiment: Experiment, cast: Callable[[PyTree, str], PyTree]) -> PyTree:
  """Fresh weights of the transformer, with a head that is not zero."""
  params = cast(declare_dit(experiment.model).init(0), experiment.model.dtype)
  proj = params["head"]["proj"]
  kernel = (
    jax.random.normal(jax.random.key(1), proj["kernel"].shape) * proj["kernel"].shape[0] ** -0.5
  )
  head = params["head"] | {"proj": proj | {"kernel": kernel.astype(proj["kernel"].dtype)}}
  return params | {"head": head}


def random_cache(experiment: Experiment) -> KVCache:
  """A cache whose slots are all filled."""
  model, schedule = experiment.model, Schedule.of(experiment)
  tokens = model.block_latents * experiment.latent_tokens
  shape = (model.layers, 1, schedule.window.slots, tokens, model.heads, model.head_dim)
  draw = jax.jit(lambda key: jax.random.normal(key, shape, model.dtype))
  return KVCache(*(draw(key) for key in jax.random.split(jax.random.key(2))))


def packed_cache(cache: KVCache, experiment: Experiment) -> QuantisedKVCache:
  """The same slots in NVFP4, layer by layer."""
  rule, kernels = experiment.quant.cache_rule, use_kernels(experiment.quant.kernels)

  @jax.jit
  def store(x: Array) -> Store:
    rows = x.reshape(*x.shape[:3], -1, x.shape[-1])
    q = jax.lax.map(lambda layer: quantise(layer, Spec(rule, lead=2)), rows)
    return Store(q.codes, q.scales, q.amax, None, rule, kernels)

  return QuantisedKVCache(store(cache.k), store(cache.v))


def caches_of(experiment: Experiment, unrolled: bool) -> dict[str, PyTree]:
  """The same random cache as `quant.cache` stores it: "none", "nvfp4"."""
  layers = experiment.model.layers
  plain = random_cache(experiment)
  made = {"none": plain, "nvfp4": packed_cache(plain, experiment)}
  if not unrolled:
    return made
  return {
    name: tuple(jax.tree.map(lambda a, i=i: a[i : i + 1], cache) for i in range(layers))
    for name, cache in made.items()
  }


def full_window(experiment: Experiment) -> Tables:
  """Tables of a block in the last slot of a full window."""
  schedule = Schedule.of(experiment)
  slots, f = schedule.window.slots, experiment.model.block_latents
  filled = SlotState(tuple(range(slots)), tuple(float(f * slot) for slot in range(slots)))
  return schedule.tables((SampleState(filled),), [slots - 1])


def random_text(experiment: Experiment) -> TextKV:
  """Keys and values of a prompt."""
  model = experiment.model
  shape = (model.layers, 1, model.text.length, model.heads, model.head_dim)
  keys = jax.random.split(jax.random.key(3))
  return TextKV(*(jax.random.normal(key, shape, model.dtype) for key in keys))


def one_block(
  experiment: Experiment, ops: Ops, unrolled: bool
) -> Callable[[Any, Array, TextKV], PyTree]:
  """`((params, cache), noise, text) -> (latents, a few numbers of the cache)`."""
  sample, model = experiment.sample, experiment.model
  network = declare_dit(model, unrolled)
  plan = solvers.plan(sample.solver, sample.steps, model.shift)
  ops = quantised_ops(ops, experiment.quant, declare_dit(model).abstract)
  denoiser, tables = Denoiser(network, model, plan, ops=ops), full_window(experiment)

  def run(own: Any, noise: Array, text: TextKV) -> PyTree:
    params, cache = own
    known = jnp.zeros(noise.shape[:2], bool)
    texts, caches = (text,), (cache,)
    latents, caches = denoiser.denoise(params, noise, texts, caches, tables, noise, known)
    caches = denoiser.commit(params, latents, texts, caches, tables)
    return latents, jax.tree.map(lambda a: a.reshape(-1)[-8:], caches)

  return run


def cases(
  experiment: Experiment,
  ops: Ops,
  cast: Callable[[PyTree, str], PyTree],
  unrolls: Callable[[Experiment], bool],
) -> Iterator[Case]:
  """The one job of the suite.

  Args:
    experiment: gives all sizes; its `quant` says how, not whether.
    ops: attention of this device.
    cast: parameters to a dtype, see `build.cast_params`.
    unrolls: whether a variant has separate layers, see `build.unrolls`.
  """
  params = random_params(experiment, cast)
  variants = {name: varied(experiment, *precisions) for name, precisions in VARIANTS.items()}
  caches = {each: caches_of(experiment, each) for each in {*map(unrolls, variants.values())}}
  owned: dict[str, Any] = {}
  functions: dict[str, Callable[..., PyTree]] = {}
  more: dict[str, Record] = {}
  for name, variant in variants.items():
    weights, unrolled = quantise_params(params, variant.quant), unrolls(variant)
    cache = caches[unrolled][variant.quant.cache]
    more[name] = {
      "layer_bytes": size(weights["layers"]),
      "cache_bytes": size(cache),
      "unrolled": unrolled,
    }
    owned[name] = separate_layers(weights) if unrolled else weights, cache
    functions[name] = chosen(one_block(variant, ops, unrolled), name)
  noise = jax.random.normal(jax.random.key(4), block_shape(experiment, 1))
  model, sample = experiment.model, experiment.sample
  yield Case(
    "denoise and commit a block",
    {"layers": model.layers, "width": model.width, "steps": sample.steps},
    "random weights, normal cache, text and noise",
    functions,
    (owned, noise, random_text(experiment)),
    lambda out: out[0],
    BFLOAT16,
    more=more,
  )


def size(tree: PyTree) -> int:
  """Bytes of all arrays."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def chosen(run: Callable[..., PyTree], name: str) -> Callable[..., PyTree]:
  """A job that takes what a variant owns out of all there is."""

  def named(owned: Mapping[str, Any], noise: Array, text: TextKV) -> PyTree:
    return run(owned[name], noise, text)

  return named
