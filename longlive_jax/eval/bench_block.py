"""The jobs of the suites "block" and "step": passes over a block of a long video.

The window is full: denoising steps against the cache, then the clean pass that leaves the block in
it. Variants differ in the precision of linear layers, cache and attention; all come from the same
random weights, cache and text. A call takes its cache over and gives it back, as in a rollout.
"""

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Case, Record, compiled
from longlive_jax.eval.flops import cached_flops
from longlive_jax.kernels.matmul_choice import HOPPER, kernel_for, use_kernels
from longlive_jax.model import solvers
from longlive_jax.model.dit import TextKV, cast_params, declare_dit
from longlive_jax.model.kv_cache import KVCache, SlotState, stored_as
from longlive_jax.model.ops import Ops
from longlive_jax.quant.joint import joins, unrolled_params
from longlive_jax.quant.kv import QuantisedKVCache, Store
from longlive_jax.quant.nvfp4 import Spec, quantise
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.sample.block import Denoiser, stored_in
from longlive_jax.sample.latents import block_shape
from longlive_jax.sample.schedule import SampleState, Schedule, Tables
from longlive_jax.types import Array, PyTree

BFLOAT16 = "bfloat16"
INPUTS = "random weights, normal cache, text and noise"
# variant -> (quant.linears, quant.cache, model.attention, quant.kernels)
VARIANTS: dict[str, tuple[str, ...]] = {
  BFLOAT16: ("none", "none", "auto"),
  "fp8 linears": ("fp8", "none", "auto"),
  "fp8 both": ("fp8", "none", "fp8"),
  "fp8 all": ("fp8", "fp8", "fp8"),  # the cache too
  "nvfp4 linears": ("nvfp4", "none", "auto"),
  "nvfp4 cache": ("none", "nvfp4", "auto"),
  "nvfp4 both": ("nvfp4", "nvfp4", "auto"),
}
BY_XLA = {  # without kernels between products, where the device has them
  f"{name} by XLA": (*VARIANTS[name], "off")
  for name in (BFLOAT16, "fp8 linears", "fp8 both", "fp8 all")
}
# `(params, cache, noise or latents, text) -> (latents, cache)`
Run = Callable[[PyTree, PyTree, Array, TextKV], tuple[Array, PyTree]]
ChooseOps = Callable[[Experiment], Ops]
Unrolls = Callable[[Experiment], bool]


def variants() -> dict[str, tuple[str, ...]]:
  """What this device can run."""
  return VARIANTS | BY_XLA if kernel_for(jax.devices()[0]) == HOPPER else VARIANTS


def varied(
  experiment: Experiment, linears: str, cache: str, attention: str = "auto", kernels: str = "auto"
) -> Experiment:
  """The experiment with other precisions."""
  other = copy.deepcopy(dataclasses.replace(experiment))
  quant = dataclasses.replace(experiment.quant, linears=linears, cache=cache)
  other.quant = dataclasses.replace(quant, kernels=kernels)
  other.model = dataclasses.replace(experiment.model, attention=attention)
  return other


def with_steps(experiment: Experiment, steps: int) -> Experiment:
  """The experiment with another number of denoising steps."""
  other = copy.deepcopy(dataclasses.replace(experiment))
  other.sample = dataclasses.replace(experiment.sample, steps=steps)
  return other


def random_params(experiment: Experiment) -> PyTree:
  """Fresh weights of the transformer in `model.dtype`, with a head that is not zero."""
  params = cast_params(declare_dit(experiment.model).init(0), experiment.model.dtype)
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


def cache_of(experiment: Experiment, unrolled: bool) -> PyTree:
  """The random cache, as `quant.cache` stores it; unrolled a tuple with one a layer."""
  plain = random_cache(experiment)
  if experiment.quant.cache == "nvfp4":
    cache: PyTree = packed_cache(plain, experiment)
  else:
    dtype, seen = stored_in(experiment)
    cache = KVCache(stored_as(plain.k, dtype), stored_as(plain.v, dtype), seen)
  if not unrolled:
    return cache
  layers = range(experiment.model.layers)
  return tuple(jax.tree.map(lambda a, i=i: a[i : i + 1], cache) for i in layers)


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


def denoiser_of(experiment: Experiment, ops: Ops, unrolled: bool) -> Denoiser:
  """The transformer of a variant with its solver."""
  sample, model = experiment.sample, experiment.model
  plan = solvers.plan(sample.solver, sample.steps, model.shift)
  ops = quantised_ops(ops, experiment.quant, declare_dit(model).abstract)
  return Denoiser(declare_dit(model, unrolled), model, plan, ops=ops)


def denoising(experiment: Experiment, ops: Ops, unrolled: bool) -> Run:
  """All denoising steps of a block; its result is the latents."""
  denoiser, tables = denoiser_of(experiment, ops, unrolled), full_window(experiment)

  def run(params: PyTree, cache: PyTree, noise: Array, text: TextKV) -> tuple[Array, PyTree]:
    known = jnp.zeros(noise.shape[:2], bool)
    latents, (cache,) = denoiser.denoise(params, noise, (text,), (cache,), tables, noise, known)
    return latents, cache

  return run


def cleaning(experiment: Experiment, ops: Ops, unrolled: bool) -> Run:
  """The clean pass of latents; its result is in the cache."""
  denoiser, tables = denoiser_of(experiment, ops, unrolled), full_window(experiment)

  def run(params: PyTree, cache: PyTree, latents: Array, text: TextKV) -> tuple[Array, PyTree]:
    (cache,) = denoiser.commit(params, latents, (text,), (cache,), tables)
    return latents, cache

  return run


def one_block(experiment: Experiment, ops: Ops, unrolled: bool) -> Run:
  """All denoising steps of a block and its clean pass; its result is the latents."""
  denoise, clean = denoising(experiment, ops, unrolled), cleaning(experiment, ops, unrolled)

  def run(params: PyTree, cache: PyTree, noise: Array, text: TextKV) -> tuple[Array, PyTree]:
    latents, cache = denoise(params, cache, noise, text)
    return clean(params, cache, latents, text)

  return run


@dataclasses.dataclass(frozen=True)
class Variant:
  """A job in one precision: `run` made of `kind(experiment, ops, unrolled)`."""

  experiment: Experiment
  kind: Callable[[Experiment, Ops, bool], Run]


class Held:
  """Weights and caches of the variants, each made once, when it is first needed.

  Args:
    experiment: gives all sizes; its `quant` says how, not whether.
    choose_ops: attention of a variant on this device, see `build.choose_ops`.
    unrolls: whether a variant has separate layers, see `build.unrolls`.
  """

  def __init__(self, experiment: Experiment, choose_ops: ChooseOps, unrolls: Unrolls):
    self.experiment, self.choose_ops, self.unrolls = experiment, choose_ops, unrolls
    self.drawn: PyTree = None
    self.params: dict[Hashable, PyTree] = {}
    self.caches: dict[Hashable, PyTree] = {}

  def weights(self, variant: Experiment, unrolled: bool) -> PyTree:
    """Of the transformer, in the precision of a variant."""
    quant, abstract = variant.quant, declare_dit(variant.model).abstract
    ops = quantised_ops(self.choose_ops(variant), quant, abstract)
    key = quant.linears, unrolled, joins(ops)
    if self.drawn is None:
      self.drawn = random_params(self.experiment)
    if key not in self.params:
      made = quantise_params(self.drawn, quant)
      self.params[key] = unrolled_params(made, ops) if unrolled else made
    return self.params[key]

  def made(
    self, variant: Variant, args: tuple[PyTree, ...]
  ) -> tuple[Callable[..., PyTree], Record]:
    """A function `(noise, text) -> (latents, cache)`; the cache is valid until the next call."""
    noise, text = args
    experiment, unrolled = variant.experiment, self.unrolls(variant.experiment)
    params = self.weights(experiment, unrolled)
    key = experiment.quant.cache, stored_in(experiment), unrolled
    if key not in self.caches:
      self.caches[key] = cache_of(experiment, unrolled)
    run = variant.kind(experiment, self.choose_ops(experiment), unrolled)
    text = TextKV(tuple(text.k), tuple(text.v)) if unrolled else text
    executable, known = compiled(run, (params, self.caches[key], noise, text), donated=(1,))

    def call(noise: Array, _: TextKV) -> tuple[Array, PyTree]:
      out, self.caches[key] = executable(params, self.caches[key], noise, text)
      return out, self.caches[key]

    held = {"layer_bytes": size(params["layers"]), "cache_bytes": size(self.caches[key])}
    return call, known | held | {"unrolled": unrolled}

  def case(
    self,
    name: str,
    kind: Callable[[Experiment, Ops, bool], Run],
    steps: int,
    value: Callable[[PyTree], Array],
    flops: float,
  ) -> Case:
    """A job in all precisions."""
    experiment = with_steps(self.experiment, steps)
    model = experiment.model
    return Case(
      name,
      {"layers": model.layers, "width": model.width, "steps": steps},
      INPUTS,
      {n: Variant(varied(experiment, *each), kind) for n, each in variants().items()},
      (jax.random.normal(jax.random.key(4), block_shape(experiment, 1)), random_text(experiment)),
      value,
      BFLOAT16,
      flops=flops,
      make=self.made,
    )


def size(tree: PyTree) -> int:
  """Bytes of all arrays."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def pass_flops(experiment: Experiment) -> float:
  """Operations of one pass over a block; keys and values of the prompt are given."""
  window = experiment.sample.window_latents
  counted = cached_flops(experiment.model, experiment.latent_tokens, window)
  return float(counted.forward - counted.text)


def stored(cache: PyTree) -> Array:
  """Keys `[B, S_b * N, D]` in the last slot of the last layer, as they are read from the cache."""
  last = cache[-1] if isinstance(cache, tuple) else cache
  if isinstance(last, KVCache):
    keys = last.k[-1, :, -1]
  else:
    layers, _, slots = last.k.amax.shape
    keys = last.k.read(layers - 1, slots, 1, jnp.dtype(jnp.bfloat16))[:, -1]
  return keys.reshape(keys.shape[0], -1, keys.shape[-1])


def cases(
  experiment: Experiment, choose_ops: ChooseOps, unrolls: Unrolls, steps: Sequence[int]
) -> Iterator[Case]:
  """The jobs of the suite "block", one for each number of denoising steps; see `Held`."""
  held = Held(experiment, choose_ops, unrolls)
  for count in steps:
    flops = (count + 1) * pass_flops(experiment)
    yield held.case("denoise and commit a block", one_block, count, lambda out: out[0], flops)


def passes(experiment: Experiment, choose_ops: ChooseOps, unrolls: Unrolls) -> Iterator[Case]:
  """The jobs of the suite "step": one pass of each kind; see `Held`."""
  held, flops = Held(experiment, choose_ops, unrolls), pass_flops(experiment)
  yield held.case("denoising pass", denoising, 1, lambda out: out[0], flops)
  yield held.case("clean pass", cleaning, 1, lambda out: stored(out[1]), flops)
