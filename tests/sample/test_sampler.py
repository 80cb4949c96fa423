"""Scripts in, frames out: against a rollout without a cache and a decoder without pieces."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from longlive_jax.data.prompts import Script, Shot
from longlive_jax.model.vae import to_uint8
from longlive_jax.sample import embed
from longlive_jax.sample import sampler as module
from longlive_jax.sample.latents import block_noise
from longlive_jax.sample.sampler import Sampler
from longlive_jax.types import Array, PyTree
from tests.sample.tiny import BLOCK, experiment, models
from tests.sample.uncached import Uncached

TOLERANCE = dict(atol=2e-5, rtol=1e-5)
SEED = 5
SMALL = dict(window_latents=4, sink_latents=0, pin_shots=False)  # two fill levels to compile
SCRIPT = Script(
  (
    Shot("a red circle", blocks=2),
    Shot("a blue square", blocks=2),
    Shot("it rises", blocks=1, transition="keep"),
    Shot("it falls", blocks=2, transition="recache"),
    Shot("a red circle", blocks=1),
  ),
  seed=11,
)
# the same by hand: (prompt, cut, recache) of each block
BY_HAND = [
  ("a red circle", False, False),
  ("a red circle", False, False),
  ("Cut. a blue square", True, False),
  ("a blue square", False, False),
  ("it rises", False, False),
  ("it falls", False, True),
  ("it falls", False, False),
  ("Cut. a red circle", True, False),
]
OTHER = Script(
  (Shot("one", blocks=1), Shot("two", blocks=5), Shot("three", blocks=2, transition="recache"))
)
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
  return Sampler(models(experiment(**SMALL, seed=SEED)))


@pytest.fixture(scope="module")
def latents(sampler: Sampler) -> np.ndarray:
  """Latents `[F, H, W, C]` of the script."""
  return one(sampler, SCRIPT)


@pytest.fixture(scope="module")
def video(sampler: Sampler) -> list[np.ndarray]:
  """Frames of the script, block by block."""
  return list(sampler.stream(SCRIPT))


def one(sampler: Sampler, script: Script, **options: object) -> np.ndarray:
  return np.concatenate([np.asarray(b)[0] for b in sampler.latent_blocks([script], **options)])


def several(sampler: Sampler, scripts: list[Script], **options: object) -> np.ndarray:
  """Latents `[B, F, H, W, C]`."""
  return np.concatenate([np.asarray(b) for b in sampler.latent_blocks(scripts, **options)], 1)


def noise_of(seed: int, index: int, block: int, *shape: int) -> np.ndarray:
  key = jax.random.key(seed)
  for number in (index, block):
    key = jax.random.fold_in(key, number)
  return np.asarray(jax.random.normal(key, shape))


def embedded(sampler: Sampler, prompts: list[str]) -> np.ndarray:
  """Embeddings `[count, L, E]` of the text network itself."""
  parts = sampler.models
  ids, mask = parts.tokenizer(prompts)
  return np.asarray(parts.text.bind(parts.params["text"])(ids, mask))


def by_hand(
  sampler: Sampler, blocks: list, seed: int, index: int = 0, first: Array | None = None
) -> np.ndarray:
  """Latents of a story without a cache."""
  config = sampler.experiment
  names = [*dict.fromkeys(prompt for prompt, _, _ in blocks), config.sample.negative_prompt]
  parts = sampler.models
  naive = Uncached(config, parts.dit, parts.params["dit"], embedded(sampler, names), len(blocks))
  outs = []
  for block, (prompt, cut, recache) in enumerate(blocks):
    noise = noise_of(seed, index, block, BLOCK, 2, 4, 4)
    given = first if block == 0 else None
    outs.append(naive.block(noise, names.index(prompt), cut, recache, given))
  return np.concatenate(outs)


def check_frames(ours: np.ndarray, theirs: np.ndarray) -> None:
  """Equal, but for a rounding that fell to the other side."""
  assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
  difference = np.abs(ours.astype(int) - theirs.astype(int))
  assert difference.max() <= 1 and np.mean(difference) < 1e-2


def test_a_script_equals_the_same_story_by_hand(sampler: Sampler, latents: np.ndarray):
  np.testing.assert_allclose(latents, by_hand(sampler, BY_HAND, seed=11), **TOLERANCE)


def test_the_frames_are_those_of_the_whole_clip(
  sampler: Sampler, latents: np.ndarray, video: list[np.ndarray]
):
  parts = sampler.models
  decode = jax.jit(lambda params, x: to_uint8(parts.vae.bind(params).decode(x)))
  whole = np.asarray(decode(parts.params["vae"], latents[None, : 4 * BLOCK]))[0]
  check_frames(np.concatenate(video[:4]), whole)


def test_the_first_block_has_three_frames_fewer(sampler: Sampler, video: list[np.ndarray]):
  assert [len(frames) for frames in video] == [4 * BLOCK - 3] + [4 * BLOCK] * 7
  assert all(frames.shape[1:] == (32, 64, 3) for frames in video)
  again = sampler.generate(SCRIPT)
  assert again.dtype == np.uint8 and len(again) == 4 * BLOCK * 8 - 3
  np.testing.assert_array_equal(again, np.concatenate(video))


def test_the_seed_of_the_configuration_is_used_when_the_script_has_none(sampler: Sampler):
  script = Script.of("one", blocks=2)
  expected = by_hand(sampler, [("one", False, False)] * 2, SEED)
  np.testing.assert_allclose(one(sampler, script), expected, **TOLERANCE)


def test_a_video_is_the_same_alone_and_in_any_batch(sampler: Sampler, latents: np.ndarray):
  assert np.abs(several(sampler, [SCRIPT, OTHER])[0] - latents).max() < 2e-5
  second = several(sampler, [OTHER, SCRIPT])[1]
  alone = one(sampler, SCRIPT, first_index=1)
  np.testing.assert_allclose(second, alone, **TOLERANCE)
  np.testing.assert_allclose(alone, by_hand(sampler, BY_HAND, 11, index=1), **TOLERANCE)
  other = one(sampler, dataclasses.replace(SCRIPT, seed=12))
  for different in (alone, other):
    assert np.abs(different - latents).max() > 0.1


def test_frames_of_a_batch_are_those_of_each_script(sampler: Sampler, video: list[np.ndarray]):
  blocks = list(sampler.stream_batch([SCRIPT, OTHER]))
  for ours, alone in zip(blocks, video, strict=True):
    check_frames(ours[0], alone)


def test_a_run_is_repeated_to_the_bit(sampler: Sampler, latents: np.ndarray):
  several(sampler, [OTHER, OTHER])
  np.testing.assert_array_equal(one(sampler, SCRIPT), latents)


def test_a_longer_script_begins_like_a_shorter_one(sampler: Sampler):
  short, long = (one(sampler, Script.of("one", blocks=n, seed=1)) for n in (2, 5))
  np.testing.assert_array_equal(long[: len(short)], short)


def test_noise_is_keyed_by_seed_index_and_block():
  seeds, indices = np.array([7, 7, 8], np.uint32), np.array([0, 1, 0], np.uint32)
  noise = block_noise(seeds, indices, np.int32(4), (2, 3))
  for row, (seed, index) in enumerate(zip(seeds.tolist(), indices.tolist(), strict=True)):
    np.testing.assert_array_equal(noise[row], noise_of(seed, index, 4, 2, 3))
  assert len({float(value) for value in noise[:, 0, 0]}) == 3


def test_an_image_is_the_first_latent(sampler: Sampler):
  first = sampler.prepare().decoder.encode_images(IMAGE[None])[0]
  ours = one(sampler, Script.of("one", blocks=3), images=IMAGE[None])
  np.testing.assert_array_equal(ours[:1], first)
  expected = by_hand(sampler, [("one", False, False)] * 3, SEED, first=first)
  np.testing.assert_allclose(ours, expected, **TOLERANCE)


def test_an_extended_video_equals_one_that_was_never_interrupted(
  sampler: Sampler, latents: np.ndarray
):
  whole = Script.of("one", blocks=5, seed=3)
  expected = one(sampler, whole)
  rest = one(sampler, Script.of("one", blocks=3, seed=3), prefix=expected[None, : 2 * BLOCK])
  np.testing.assert_array_equal(rest[: 2 * BLOCK], expected[: 2 * BLOCK])
  np.testing.assert_allclose(rest, expected, **TOLERANCE)
  frames = sampler.generate(
    Script.of("one", blocks=3, seed=3), prefix=jax.numpy.asarray(expected[None, : 2 * BLOCK])
  )
  check_frames(frames, sampler.generate(whole))


def test_guidance_and_the_negative_prompt():
  guided = Sampler(models(experiment(**SMALL, guidance=2.0, negative_prompt="blurred")))
  ours = one(guided, SCRIPT)
  np.testing.assert_allclose(ours, by_hand(guided, BY_HAND, 11), atol=5e-5, rtol=1e-5)


def test_embeddings_are_those_of_the_encoder_and_only_the_last_are_kept(
  sampler: Sampler, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(embed, "PROMPTS_KEPT", 3)
  names = [f"prompt {i}" for i in range(5)]
  for name in (*names, names[3], "last"):
    np.testing.assert_allclose(sampler.embed(name), embedded(sampler, [name])[0], atol=1e-6)
  assert list(sampler.embed._kept) == [names[4], names[3], "last"]


def test_a_prompt_can_be_embedded_before_anything_is_prepared(sampler: Sampler):
  fresh = Sampler(sampler.models)
  np.testing.assert_array_equal(fresh.embed("one"), sampler.embed("one"))


def broken(sampler: Sampler, **params: PyTree) -> Sampler:
  """The same executables with other parameters."""
  other = Sampler(dataclasses.replace(sampler.models, params={**sampler.models.params, **params}))
  other._compiled = sampler._compiled
  return other


def test_weights_that_are_not_finite_are_noticed_before_a_frame_is_shown(sampler: Sampler):
  dit = jax.tree.map(np.array, sampler.models.params["dit"])
  dit["head"]["proj"]["bias"][0] = np.nan
  with pytest.raises(FloatingPointError, match="block 1 of the video .* not finite"):
    next(broken(sampler, dit=dit).stream(SCRIPT))


def test_the_first_frames_come_before_the_second_block_begins(
  sampler: Sampler, monkeypatch: pytest.MonkeyPatch
):
  run, begun = sampler.prepare(), []
  step = run.engine.next_block
  monkeypatch.setattr(run.engine, "next_block", lambda *args: begun.append(1) or step(*args))
  seen = [(len(frames), len(begun)) for frames in sampler.stream(Script.of("one", blocks=4))]
  assert seen == [(5, 1), (8, 3), (8, 4), (8, 4)]  # later ones when the next is under way


def test_a_block_that_goes_bad_is_named_and_those_before_it_are_shown(
  sampler: Sampler, monkeypatch: pytest.MonkeyPatch
):
  run, count = sampler.prepare(), []
  step = run.engine.next_block

  def bad_third(*args: object) -> tuple[Array, object]:
    count.append(1)
    latents, state = step(*args)
    return (latents * np.nan if len(count) == 3 else latents), state

  monkeypatch.setattr(run.engine, "next_block", bad_third)
  shown = []
  with pytest.raises(FloatingPointError, match="block 3"):
    for frames in sampler.stream(Script.of("one", blocks=3)):
      shown.append(len(frames))
  assert shown == [5, 8]


SHAPE = (1, 2 * BLOCK, 2, 4, 4)
REFUSED = {
  "unequal blocks": (
    dict(scripts=[SCRIPT, Script.of("one", blocks=2)]),
    "equal numbers of blocks, found [2, 8]",
  ),
  "no script": (dict(scripts=[]), "at least one script"),
  "a long prompt": (dict(scripts=[Script.of("x" * 40)]), "model.text.length=24"),
  "a small image": (
    dict(images=np.zeros((1, 16, 64, 3), np.uint8)),
    "they must be uint8 (1, 32, 64, 3)",
  ),
  "a float image": (dict(images=np.zeros((1, 32, 64, 3))), "images are float64"),
  "no batch axis": (dict(images=IMAGE), "they must be uint8 (1, 32, 64, 3)"),
  "two images": (dict(images=np.stack([IMAGE] * 2)), "they must be uint8 (1, 32, 64, 3)"),
  "half a block": (dict(prefix=np.zeros((1, 3, 2, 4, 4))), "a multiple of model.block_latents=2"),
  "an empty prefix": (dict(prefix=np.zeros((1, 0, 2, 4, 4))), "prefix has shape (1, 0, 2, 4, 4)"),
  "a prefix of frames": (dict(prefix=np.zeros((1, 8, 32, 64, 3))), "prefix has shape"),
  "a prefix of another batch": (dict(prefix=np.zeros((2, *SHAPE[1:]))), "it must be (1, "),
  "a prefix without batch": (dict(prefix=np.zeros(SHAPE[1:])), "prefix has shape (4, 2, 4, 4)"),
  "a prefix with nan": (dict(prefix=np.full(SHAPE, np.nan)), "prefix has numbers that are not"),
  "image and prefix": (dict(images=IMAGE[None], prefix=np.zeros(SHAPE)), "both given"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_do_not_fit_are_refused(sampler: Sampler, name: str):
  options, message = REFUSED[name]
  scripts = options.get("scripts", [Script.of("one", blocks=2)])
  rest = {key: value for key, value in options.items() if key != "scripts"}
  with pytest.raises(ValueError, match=re.escape(message)):
    next(sampler.stream_batch(scripts, **rest))


def test_an_empty_script_is_refused():
  with pytest.raises(ValueError, match="at least one shot"):
    Script(())


def test_a_video_to_extend_must_fill_a_block(sampler: Sampler):
  with pytest.raises(ValueError, match="has 4 frames; it must have at least 5"):
    sampler.encode_video(np.zeros((4, 32, 64, 3), np.uint8))


@pytest.mark.parametrize(("given", "used"), [(5, 5), (12, 5), (13, 13), (20, 13), (21, 21)])
def test_a_video_is_encoded_in_whole_blocks(
  sampler: Sampler, monkeypatch: pytest.MonkeyPatch, given: int, used: int
):
  monkeypatch.setattr(module, "encode_frames", lambda network, params, frames: frames)
  frames = np.arange(given)
  np.testing.assert_array_equal(sampler.encode_video(frames), frames[:used])
