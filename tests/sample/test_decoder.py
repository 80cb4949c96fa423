"""The VAE around a rollout: blocks as they come equal the clip, nothing compiles after start."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longlive_jax.model.vae import declare_vae, from_uint8
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.sample.decoder import Decoder, encode_frames
from tests.model.small_vae import SMALL, drawn, jit

BLOCK = (2, 2, 2, 1, 6)  # B, F, h, w, C
COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
  """A list that grows by one with every compilation (also those found in the disk cache)."""
  seen: list[str] = []

  def listen(event: str, seconds: float, **_: object) -> None:
    if event == COMPILED:
      seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def network():
  return declare_vae(SMALL, form="conv2d")


@pytest.fixture(scope="module")
def params(network):
  return drawn(network.abstract)


@pytest.fixture(scope="module")
def latents():
  return jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 2, 1, 6)), jnp.float32)


@pytest.fixture(scope="module")
def made(network, params):
  """(decoder, number of compilations that making it took)."""
  with counted() as compilations:
    decoder = Decoder(network, params, BLOCK)
  return decoder, len(compilations)


def bytes_of(video: np.ndarray) -> np.ndarray:
  """Levels of a float video, not yet rounded."""
  return (np.clip(np.asarray(video, np.float64), -1, 1) + 1) * 127.5


def test_blocks_as_they_come_are_the_clip(made, network, params, latents):
  frames, state = [], None
  for start in (0, 2, 4):
    block, state = made[0].decode(latents[:, start : start + 2], state)
    assert block.dtype == jnp.uint8
    frames.append(np.asarray(block))
  assert [block.shape for block in frames] == [(2, t, 32, 16, 3) for t in (5, 8, 8)]
  whole = jit(lambda p, z: network.bind(p).decode(z))(params, latents)
  video = np.concatenate(frames, 1)
  assert len(np.unique(video)) > 100
  assert np.abs(video - bytes_of(whole)).max() < 0.5 + 1e-3


def test_both_executables_are_compiled_at_once_and_nothing_later(made, latents):
  decoder, compilations = made
  blocks = [latents[:, start : start + 2] for start in (0, 2, 4)]
  with counted() as control:
    jax.jit(lambda x: x * 3 + len(blocks))(1.0)
  assert compilations == 2 and len(control) == 1
  with counted() as later:
    state = None
    for block in (*blocks, *blocks):
      _, state = decoder.decode(block, state)
    decoder.decode(np.asarray(blocks[0]), None)
  assert not later


def test_the_state_is_donated_and_never_grows(made, latents):
  _, state = made[0].decode(latents[:, :2], None)
  shapes = [(a.shape, a.dtype) for a in jax.tree.leaves(state)]
  for _ in range(2):
    before = jax.tree.leaves(state)
    _, state = made[0].decode(latents[:, 2:4], state)
    assert all(a.is_deleted() for a in before)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(state)] == shapes


def test_a_new_video_starts_from_nothing(made, latents):
  first, state = made[0].decode(latents[:, :2], None)
  made[0].decode(latents[:, 2:4], state)
  np.testing.assert_array_equal(made[0].decode(latents[:, :2], None)[0], first)


def test_strips_of_rows_give_the_same_frames(made, network, params, latents):
  decoder, states = Decoder(network, params, BLOCK, 1, tiles=2), [None, None]
  for start in (0, 2, 4):
    block = latents[:, start : start + 2]
    ours, states[0] = decoder.decode(block, states[0])
    whole, states[1] = made[0].decode(block, states[1])
    assert np.abs(np.asarray(ours, np.int32) - np.asarray(whole, np.int32)).max() <= 1


def test_strips_of_rows_that_devices_share_are_refused(network, params):
  mesh = make_mesh(1, seq=2, devices=jax.devices()[:2])
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  with pytest.raises(ValueError, match="sample.decode_tiles=2 is for one device.*parallel.seq=1"):
    Decoder(network, params, BLOCK, tiles=2)


def test_nan_latents_give_black_frames(made, latents):
  frames, _ = made[0].decode(latents[:, :2].at[0, 1].set(jnp.nan), None)
  assert np.all(np.asarray(frames)[0, 1:] == 0) and np.any(np.asarray(frames)[1] != 0)


def frames_of(count: int, seed: int = 0) -> np.ndarray:
  """Noise around another colour in every frame."""
  rng = np.random.default_rng(seed)
  colours = rng.integers(0, 192, (count, 1, 1, 3), np.uint8)
  return colours + rng.integers(0, 64, (count, 32, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def encoded(network, params):
  """Normalised latents of 21 frames, encoded at once."""
  encode = jit(lambda p, x: network.bind(p).encode(x))
  return np.asarray(encode(params, from_uint8(jnp.asarray(frames_of(21)))[None]))[0]


def test_images_become_the_first_latent_of_a_video(made, encoded):
  images = np.stack([frames_of(21)[0], frames_of(1, seed=7)[0]])
  first = made[0].encode_images(images)
  assert first.shape == (2, 1, 2, 1, 6)
  np.testing.assert_allclose(first[0], encoded[:1], atol=1e-5)
  assert np.abs(first[1] - first[0]).max() > 1e-2
  with counted() as later:
    made[0].encode_images(images[::-1])
  assert not later


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 32, 16, 3), np.uint8),
    ((2, 16, 32, 3), np.uint8),
    ((2, 32, 16, 4), np.uint8),
    ((32, 16, 3), np.uint8),
    ((2, 32, 16, 3), np.float32),
  ],
)
def test_images_that_do_not_fit_are_refused(made, shape, dtype):
  message = rf"images are {np.dtype(dtype)} \(.*\); they must be uint8 \(2, 32, 16, 3\)"
  with pytest.raises(ValueError, match=message):
    made[0].encode_images(np.zeros(shape, dtype))


@pytest.mark.parametrize("group", [4, 12, 32])  # 4 is even, 12 leaves 8, 32 takes all
def test_a_video_encoded_in_groups_is_the_video_encoded_at_once(network, params, encoded, group):
  ours = encode_frames(network, params, frames_of(21), group)
  assert ours.shape == (6, 2, 1, 6)
  np.testing.assert_allclose(ours, encoded, atol=1e-5)


def test_one_frame_is_one_latent(network, params, encoded):
  ours = encode_frames(network, params, frames_of(21)[:1])
  np.testing.assert_allclose(ours, encoded[:1], atol=1e-5)


@pytest.mark.parametrize(
  ("frames", "group", "message"),
  [
    (np.zeros((5, 32, 16, 3), np.float32), 4, "frames are float32; they must be uint8"),
    (np.zeros((6, 32, 16, 3), np.uint8), 4, r"number of frames=6 must be 1 \+ .*; use 5 or 9"),
    (np.zeros((0, 32, 16, 3), np.uint8), 4, r"number of frames=0 must be 1 \+ .*; use 1"),
    (np.zeros((5, 32, 16, 3), np.uint8), 6, "group=6 must be a positive multiple .*=4"),
    (np.zeros((5, 40, 16, 3), np.uint8), 4, "height of video=40 must be a positive multiple"),
  ],
)
def test_videos_that_do_not_fit_are_refused(network, params, frames, group, message):
  with pytest.raises(ValueError, match=message):
    encode_frames(network, params, frames, group)
