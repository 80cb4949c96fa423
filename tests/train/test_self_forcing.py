"""The rollout of distillation is the sampler's, and keeps little for its backward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Experiment, Model, Sample, Text, Vae, Video
from longlive_jax.model import solvers
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.lora import adapted, adapted_ops, adapter_shapes, init_adapters, merge
from longlive_jax.model.ops import REFERENCE
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.rollout import Engine
from longlive_jax.sample.schedule import Schedule
from longlive_jax.train.passes import last_seen, plan_passes
from longlive_jax.train.self_forcing import SelfForcing
from longlive_jax.types import Array, PyTree

CFG = Model(
  width=24,
  ffn_width=32,
  heads=2,
  layers=2,
  frequency_width=16,
  block_latents=2,
  dtype="float32",
  text=Text(width=16, length=5),
  vae=Vae(latent_channels=4),
)
NETWORK = declare_dit(CFG)
STEPS, BLOCKS, BATCH = 3, 5, 2
SOLVER = solvers.plan("unipc", STEPS, CFG.shift)
SHAPE = (BATCH, BLOCKS * 2, 4, 4, 4)
# the two samples are cut at different blocks; the window has room for three
CUTS = [[False, False], [False, True], [True, False], [False, False], [False, False]]
LAST = jnp.full(BLOCKS, STEPS - 1, jnp.int32)


def shaken(tree: PyTree) -> PyTree:
  """The tree with noise, for fresh heads and adapters are 0."""
  return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), tree)


PARAMS = shaken(NETWORK.init(0))
NOISE = jax.random.normal(jax.random.key(1), SHAPE)
PROMPTS = jax.random.normal(jax.random.key(2), (BLOCKS, BATCH, 5, 16))
FIRST = jax.random.normal(jax.random.key(3), (BATCH, 1, 4, 4, 4))


def experiment(relative: bool) -> Experiment:
  return Experiment(
    model=CFG,
    video=Video(height=64, width=64),
    sample=Sample(
      steps=STEPS,
      window_latents=6,
      sink_latents=2,
      pin_shots=True,
      shot_offset_latents=8.0,
      relative_rope=relative,
    ),
  )


def sampled(relative: bool, first: Array | None) -> np.ndarray:
  """The clip that the sampler makes."""
  engine = Engine(Denoiser(NETWORK, CFG, SOLVER), experiment(relative), PARAMS, BATCH)
  state, outs = engine.start(), []
  for block, cut in enumerate(CUTS):
    known, mask = np.zeros(engine.block_shape, np.float32), np.zeros((BATCH, 2), bool)
    if first is not None and block == 0:
      known[:, :1], mask[:, 0] = first, True
    texts = (engine.text_kv(PARAMS, PROMPTS[block]),)
    noise = NOISE[:, 2 * block : 2 * block + 2]
    latents, state = engine.next_block(PARAMS, state, noise, texts, cut, known, mask)
    outs.append(np.asarray(latents))
  return np.concatenate(outs, 1)


def trained(
  params: PyTree,
  exits: Array = LAST,
  *,
  relative: bool = False,
  first: Array | None = None,
  given: Array | None = None,
  count: int = BLOCKS,
  noise: Array = NOISE,
  student: SelfForcing | None = None,
) -> Array:
  """The clip that the rollout of training makes."""
  student = student or SelfForcing(Denoiser(NETWORK, CFG, SOLVER))
  passes = plan_passes(Schedule.of(experiment(relative)), CUTS, count)
  model = NETWORK.bind(params)
  texts = [model.text_kv(prompts, student.denoiser.ops) for prompts in PROMPTS]
  return student.rollout(
    params, noise, texts, passes, exits, trained=count, first=first, given=given
  )


@pytest.mark.parametrize("relative", [False, True])
def test_the_clip_is_that_of_the_sampler(relative: bool):
  """With eviction, sink, pins and cuts that differ between samples; image-to-video, too."""
  for first in (None, FIRST):
    run = jax.jit(functools.partial(trained, relative=relative, first=first))
    np.testing.assert_array_equal(run(PARAMS), sampled(relative, first))


def test_a_long_clip_that_keeps_its_slots_alone_is_the_same():
  """Before the trained blocks; pins and cuts differ between the samples."""
  run = jax.jit(functools.partial(trained, first=FIRST, count=1))
  np.testing.assert_array_equal(run(PARAMS), sampled(False, FIRST))
  passes = plan_passes(Schedule.of(experiment(False)), CUTS, 1)
  assert [settling.keeps_slots for _, settling in passes] == [False] * 3 + [True, False]
  np.testing.assert_array_equal(passes[-1][0].order, [[0, 3, 2], [0, 1, 3]])


def test_only_some_samples_are_given_their_first_latent():
  given = jnp.asarray([False, True])
  run = jax.jit(functools.partial(trained, first=FIRST, given=given))(PARAMS)
  np.testing.assert_array_equal(run[0], sampled(False, None)[0])
  np.testing.assert_array_equal(run[1], sampled(False, FIRST)[1])


def test_the_blocks_that_are_seen_at_the_end():
  """Sink, pin (block 2 of one sample) and the newest; all of a clip that fits the window."""
  schedule = Schedule.of(experiment(False))
  np.testing.assert_array_equal(last_seen(schedule, CUTS), [[0, 2, 4], [0, 1, 4]])
  assert last_seen(schedule, CUTS[:3]) is None


@pytest.fixture(scope="module")
def gradient():
  """The gradient of a sum over the clip for any exit and number of trained blocks."""

  @functools.partial(jax.jit, static_argnames=("count", "attached", "remat"))
  def run(exits: Array, noise: Array, count: int, attached: bool = False, remat: str = "none"):
    student = SelfForcing(Denoiser(NETWORK, CFG, SOLVER), remat=remat, attached=attached)

    def loss(params: PyTree, noise: Array) -> tuple[Array, Array]:
      out = trained(params, exits, count=count, noise=noise, student=student)
      return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.grad(loss, (0, 1), has_aux=True)(PARAMS, noise)

  return run


def test_only_the_last_pass_has_a_gradient(gradient):
  """A block that ends at once passes on the gradient of its noise; others do not."""
  exits = jnp.asarray([1, 0, 2, 1, 2], jnp.int32)
  (_, of_noise), _ = gradient(exits, NOISE, BLOCKS)
  each = jnp.abs(of_noise).reshape(BATCH, BLOCKS, -1).max((0, 2))
  assert (each > 0).tolist() == [False, True, False, False, False]


def test_untrained_blocks_have_none(gradient):
  (of_params, of_noise), _ = gradient(jnp.zeros(BLOCKS, jnp.int32), NOISE, 1)
  each = jnp.abs(of_noise).reshape(BATCH, BLOCKS, -1).max((0, 2))
  assert (each > 0).tolist() == [False] * (BLOCKS - 1) + [True]
  assert float(jnp.abs(of_params["layers"]["ffn"]["up"]["kernel"]).max()) > 0


def test_attached_keys_change_the_gradient_and_not_the_clip(gradient):
  (apart, _), out = gradient(LAST, NOISE, BLOCKS)
  (attached, _), same = gradient(LAST, NOISE, BLOCKS, attached=True)
  np.testing.assert_allclose(out, same, atol=1e-5)
  a, b = (tree["layers"]["self_attn"]["k"]["kernel"] for tree in (apart, attached))
  assert float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.abs(a).max())


def test_recomputing_changes_nothing(gradient):
  (plain, _), _ = gradient(LAST, NOISE, BLOCKS)
  (again, _), _ = gradient(LAST, NOISE, BLOCKS, remat="full")
  for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
    scale = max(float(jnp.abs(theirs).max()), 1e-6)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)


def test_live_adapters_make_the_clip_of_merged_ones():
  adapters = shaken(init_adapters(jax.random.key(0), adapter_shapes(PARAMS, 2)))
  student = SelfForcing(Denoiser(NETWORK, CFG, SOLVER, ops=adapted_ops(REFERENCE)))
  live = jax.jit(lambda p: trained(p, student=student))(adapted(PARAMS, adapters, 2.0))
  merged = jax.jit(trained)(merge(PARAMS, adapters, 2.0))
  np.testing.assert_allclose(live, merged, atol=2e-3)


def residuals(blocks: int) -> int:
  """Bytes that the backward pass of a rollout of so many blocks keeps, besides its arguments."""
  passes = plan_passes(Schedule.of(experiment(False)), [[False, False]] * blocks)
  student = SelfForcing(Denoiser(NETWORK, CFG, SOLVER), remat="full")

  def clip(params: PyTree) -> Array:
    texts = [NETWORK.bind(params).text_kv(PROMPTS[0])] * blocks
    noise = NOISE[:, : 2 * blocks]
    return student.rollout(
      params, noise, texts, passes, jnp.zeros(blocks, jnp.int32), trained=blocks
    )

  _, pull = jax.eval_shape(lambda p: jax.vjp(clip, p), PARAMS)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def test_a_block_keeps_its_own_keys_and_values_and_never_the_cache():
  """What each further block adds is the same; a cache of its own would add more and more."""
  bytes_of = [residuals(n) for n in (2, 3, 4, 5)]
  added = [after - before for before, after in itertools.pairwise(bytes_of)]
  assert max(added) - min(added) <= 64
  tokens = 2 * 2 * 2 * BATCH
  keys_values = inputs = 2 * CFG.layers * tokens * CFG.width * 4
  assert keys_values < added[0] <= 2 * (keys_values + inputs)
