"""Several devices that share each block make the video of one: two exchanges a layer, no copies."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax.build import Pipeline
from longlive_jax.config import Experiment, Quant
from longlive_jax.config.load import from_flags, from_json, to_json
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.model import solvers
from longlive_jax.model.dit import declare_dit, separate_layers
from longlive_jax.model.ops import REFERENCE, Ops, dense_attention
from longlive_jax.parallel import share
from longlive_jax.parallel.mesh import make_mesh, replicate, sampling_mesh
from longlive_jax.parallel.share import LATENTS, Travel, island, shared_ops
from longlive_jax.quant.fp8 import from_bytes, to_bytes
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.rollout import Engine, RolloutState
from longlive_jax.sample.sampler import Sampler
from longlive_jax.types import SEQ, Array, PyTree
from tests.sample.compiles import counting
from tests.sample.tiny import experiment, models, shaken

BLOCK, BLOCKS = 4, 6
RNG = np.random.default_rng(3)
PROMPTS = RNG.standard_normal((4, 24, 16)).astype(np.float32)
NOISE = RNG.standard_normal((BLOCKS, 2, BLOCK, 2, 4, 4)).astype(np.float32)
# of each block: prompts, cuts and what is computed again, for two samples
STORY = [
  ([0, 1], [False, False], [False, False]),
  ([0, 1], [False, True], [False, False]),
  ([2, 1], [True, False], [False, False]),
  ([2, 1], [False, False], [False, False]),
  ([2, 0], [False, False], [True, False]),
  ([1, 0], [True, False], [False, False]),
]
# name -> devices, settings of the sampler, of quantisation, whether layers are separate, samples.
# Three slots hold sink, pin and own block, two sink or pin and own: there is always an eviction.
CASES = {
  "two samples, guidance, pins, NVFP4 cache": (
    4,
    {"guidance": 2.5, "window_latents": 3 * BLOCK, "sink_latents": BLOCK},
    {"cache": "nvfp4", "cache_smoothing": "tokens"},
    False,
    2,
  ),
  "relative positions, separate layers": (
    2,
    {
      "relative_rope": True,
      "recache_cuts": True,
      "pin_shots": False,
      "window_latents": 2 * BLOCK,
      "sink_latents": BLOCK,
    },
    {"linears": "fp8"},
    True,
    1,
  ),
}
Made = tuple[Engine, PyTree]


def settings(seq: int, sample: dict, quant: dict) -> Experiment:
  """Blocks of 4 latents, 4 heads of 16, shared by `seq` devices."""
  config = from_json(to_json(experiment(**sample)))
  config.model.width, config.model.heads, config.model.block_latents = 64, 4, BLOCK
  config.parallel.seq, config.quant = seq, Quant(**quant)
  return from_flags(config)


@functools.cache
def made(name: str, shared: bool) -> Made:
  """An engine whose blocks are shared by devices, or that of one device; and its weights."""
  seq, sample, quant, unrolled, batch = CASES[name]
  config = settings(seq if shared else 1, sample, quant)
  network, ops = declare_dit(config.model, unrolled), REFERENCE
  params = quantise_params(shaken(declare_dit(config.model).init(0)), config.quant)
  params = separate_layers(params) if unrolled else params
  if shared:
    mesh = sampling_mesh(config)
    params, ops = replicate(params, mesh), shared_ops(ops, mesh)
  ops = quantised_ops(ops, config.quant, declare_dit(config.model).abstract)
  plan = solvers.plan(config.sample.solver, config.sample.steps, config.model.shift)
  denoiser = Denoiser(network, config.model, plan, config.sample.guidance, ops)
  return Engine(denoiser, config, params, batch), params


def played(made: Made) -> tuple[np.ndarray, RolloutState]:
  """Latents of the story, whose first latent and second block are given, and the last state."""
  engine, params = made
  state, outs = engine.start(), []
  known, mask = np.zeros(engine.block_shape, np.float32), np.zeros(engine.block_shape[:2], bool)
  known[:, 0], mask[:, 0] = NOISE[1, : engine.batch, 0], True
  for block, entry in enumerate(STORY):
    prompts, cut, again = (part[: engine.batch] for part in entry)
    texts = [engine.text_kv(params, PROMPTS[prompts])]
    if engine.branches > 1:
      texts.append(engine.text_kv(params, PROMPTS[[3] * engine.batch]))
    if any(again):
      state = engine.recache(params, state, tuple(texts), again)
    noise = NOISE[block, : engine.batch]
    if block == 1:
      state = engine.absorb(params, state, noise, tuple(texts), cut)
      continue
    latents, state = engine.next_block(params, state, noise, tuple(texts), cut, known, mask)
    outs.append(np.asarray(latents))
    mask = np.zeros_like(mask)
  return np.stack(outs), state


@pytest.mark.parametrize("name", CASES)
def test_the_video_is_that_of_one_device(name: str):
  (expected, alone), (ours, state) = (played(made(name, shared)) for shared in (False, True))
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert state.states == alone.states and np.std(expected) > 0.3


class Window:
  """A plan of attention to keys and values that are there already; hands back the block's own."""

  def attend(self, dense, q, k, v, cache, layer):
    return dense(q, *cache), (k, v)


def attended(travel: Travel) -> tuple[list[np.ndarray], list[tuple[str, int]]]:
  """Attention on two devices, its keys and values; dtype and elements of what they send."""
  mesh = make_mesh(1, seq=2, devices=jax.devices()[:2])
  q, k, v, *cache = (
    jax.random.normal(jax.random.key(s), (1, 8 if s < 3 else 24, 4, 128), jnp.bfloat16)
    for s in range(5)
  )
  attend, heads = share.exchanged(dense_attention, travel), P(None, None, SEQ)

  def run(q, k, v, cache):
    return attend(q, k, v, cache, 0, Window())

  run = island(run, mesh, (*[LATENTS] * 3, heads), (LATENTS, heads))
  compiled = jax.jit(run).lower(q, k, v, cache).compile()
  found = [np.asarray(a, np.float32) for a in jax.tree.leaves(compiled(q, k, v, cache))]
  sent = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S*.*? all-to-all\(", compiled.as_text())
  return found, [(kind, int(np.prod([int(n) for n in sizes.split(",")]))) for kind, sizes in sent]


def test_an_exchange_in_fp8_sends_half_the_bytes_and_changes_little():
  (found, sent), (wanted, plain) = (
    attended(travel) for travel in (Travel(to_bytes, from_bytes), share.AS_THEY_ARE)
  )
  assert [kind for kind, _ in sent] == ["u8"] * 4 and len(plain) == 4
  for (_, numbers), (_, elements) in zip(sent, plain, strict=True):
    assert numbers == elements * (128 + 4) / 128
  for ours, exact in zip(found, wanted, strict=True):
    assert 1e-3 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.06


@pytest.mark.parametrize("name", CASES)
def test_latents_are_whole_and_caches_are_split_over_heads(name: str):
  engine, seq = made(name, True)[0], CASES[name][0]
  state = engine.start()
  assert len(engine.latents.sharding.device_set) == seq
  assert engine.latents.sharding.is_fully_replicated
  for leaf in jax.tree.leaves(state.caches):
    held = leaf.addressable_shards[0].data.nbytes
    assert held * (seq if leaf.ndim > 3 else 1) == leaf.nbytes  # an amax is whole


@pytest.mark.parametrize("name", CASES)
def test_four_exchanges_a_layer_and_nothing_is_gathered_or_copied(name: str):
  engine, (_, _, _, unrolled, batch) = made(name, True)[0], CASES[name]
  layers = engine.experiment.model.layers if unrolled else 1  # one in the body of the scan
  exchanges, level = 4 * layers * engine.branches, max(engine.denoise)
  # queries and results of the last layer of a clean pass
  unused = 2 * engine.branches if unrolled else 0
  caches = jax.tree.leaves(engine.start().caches)
  runs = (engine.denoise[level], exchanges, 1), (engine.commit[level], exchanges - unused, 0)
  for run, exchanged, latents in runs:
    text = run.as_text()
    assert len(re.findall(r" all-to-all\(", text)) == exchanged
    assert len(re.findall(r" all-gather\(", text)) == latents  # the latents that come out
    assert "collective-permute" not in text
    assert not [
      s for s in re.findall(r"= \w+\[([\d,]*)\]\S* all-reduce\(", text) if s != str(batch)
    ]
    assert text.count("may-alias") == len(caches)  # written in place
    for leaf in caches:
      shape = ",".join(map(str, leaf.addressable_shards[0].data.shape))
      whole = ",".join(map(str, leaf.shape))
      assert not re.search(rf"= \w+\[{shape}\]\S* copy\(", text), shape
      assert leaf.ndim <= 3 or f"[{whole}]" not in text


def test_products_in_nvfp4_have_the_scale_of_all_devices():
  """One token is far larger than the others, and only one device has it."""
  mesh = make_mesh(1, seq=4, devices=jax.devices()[:4])
  network = declare_dit(experiment().model)
  x = jax.random.normal(jax.random.key(1), (2, 8, 64)).at[1, 5, 3].set(40.0)
  w = jax.random.normal(jax.random.key(2), (64, 64))

  def product(ops: Ops, x: Array) -> tuple[Array, Array]:
    paths = tuple(f"layers/self_attn/{name}" for name in "qk")
    shared = ops.prepare(x, paths)
    return tuple(ops.matmul(a, w, None, path=paths[0], key=None) for a in (x, shared))

  alone, ours = (
    quantised_ops(ops, Quant(linears="nvfp4"), network.abstract)
    for ops in (REFERENCE, shared_ops(REFERENCE, mesh))
  )
  run = jax.jit(island(functools.partial(product, ours), mesh, LATENTS, LATENTS))
  for a, b in zip(run(x), jax.jit(functools.partial(product, alone))(x), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


SCRIPT = Script((Shot("one", blocks=2), Shot("two", blocks=2), Shot("three", 1, None, "recache")))


def test_a_pipeline_makes_the_video_of_one_device():
  """Weights are whole on all devices, and after the start nothing compiles."""
  parts = models(experiment(window_latents=4, pin_shots=False))
  expected = Sampler(parts).generate(SCRIPT)
  config = from_json(to_json(parts.experiment))
  config.parallel.seq = 2
  pipeline = Pipeline.from_config(from_flags(config))
  for leaf in jax.tree.leaves(pipeline.models.params):
    assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == 2
  params = replicate(parts.params, sampling_mesh(pipeline.experiment))
  shared = Sampler(dataclasses.replace(pipeline.models, params=params))
  shared.prepare()
  with counting() as counts:
    frames = shared.generate(SCRIPT)
    first = next(shared.latent_blocks([SCRIPT]))
  assert not counts and first.sharding.is_fully_replicated
  assert np.abs(frames.astype(int) - expected).max() <= 1


def test_the_exchange_is_a_setting():
  parts = models(experiment(window_latents=4, pin_shots=False))
  made = {}
  for exchange in ("none", "fp8"):
    config = from_json(to_json(parts.experiment))
    config.parallel.seq, config.parallel.exchange = 2, exchange
    pipeline = Pipeline.from_config(from_flags(config))
    params = replicate(parts.params, sampling_mesh(pipeline.experiment))
    made[exchange] = Sampler(dataclasses.replace(pipeline.models, params=params))
  exact, near = (np.asarray(next(made[each].latent_blocks([SCRIPT]))) for each in ("none", "fp8"))
  assert 1e-5 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.1
  config.parallel.exchange = "fp4"
  with pytest.raises(ValueError, match=r"parallel\.exchange='fp4' must be one of fp8, none"):
    Pipeline.from_config(from_flags(config))


@pytest.mark.parametrize(
  ("heads", "blocks", "seq", "message"),
  [
    (4, 4, 3, r"parallel\.seq=3 must divide .* model\.block_latents=4: 1, 2, 4\)"),
    (4, 3, 3, r"parallel\.seq=3 must divide model\.heads=4 "),
    (12, 3, 3, r"model\.block_latents=4 in sampling; use one of 1, 2, 4"),
    (16, 16, 16, r"parallel\.seq=16 needs 16 devices; there are 8"),
  ],
)
def test_a_number_of_devices_that_cannot_be_is_refused_before_anything_is_loaded(
  heads: int, blocks: int, seq: int, message: str
):
  config = from_json(to_json(experiment(window_latents=32, sink_latents=0)))
  config.model.width, config.model.heads = 16 * heads, heads
  config.model.block_latents = 16 if seq == 16 else BLOCK
  config.data.blocks = config.data.clip_blocks = blocks
  config.parallel.seq, config.io.checkpoint = seq, "/nowhere"
  with pytest.raises(ValueError, match=message):
    Pipeline.from_config(from_flags(config))
