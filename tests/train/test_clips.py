"""Training clips: the bank words, places and sees blocks as the sampler does."""

import dataclasses
import logging as std_logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Data, Experiment, Model, Sample, Text, Vae, Video
from longlive_jax.data import shapes
from longlive_jax.data.prompts import Script, Shot, expand
from longlive_jax.model.kv_cache import Window
from longlive_jax.model.tokenizer import load_tokenizer
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.sample.schedule import SampleState, Schedule
from longlive_jax.train import clips
from longlive_jax.types import Array

F = 2
EXPERIMENT = Experiment(
  model=Model(
    block_latents=F,
    width=24,
    heads=2,
    text=Text(vocabulary=260, length=112, tokenizer="bytes"),
    vae=Vae(latent_channels=3),
  ),
  video=Video(height=32, width=32, fps=24),
  sample=Sample(window_latents=4 * F, sink_latents=F, cut_prefix="Cut. "),
  data=Data(clips=5, clip_blocks=7, blocks=4, far_share=0.5, max_shots=3),
)


def encode(_: None, video: Array) -> Array:
  """Stands for the VAE: the mean colour of each latent's last frame, on a 2 x 2 grid."""
  last = video[:, ::4]
  batch, latents, height, width, channels = last.shape
  return last.reshape(batch, latents, 2, height // 2, 2, width // 2, channels).mean((3, 5))


@pytest.fixture(scope="module")
def bank() -> clips.Bank:
  return make_bank(EXPERIMENT)


def make_bank(experiment: Experiment) -> clips.Bank:
  return clips.make_bank(experiment, encode, None, load_tokenizer(experiment.model.text), group=2)


def with_changes(share: float) -> Experiment:
  data = dataclasses.replace(EXPERIMENT.data, change_share=share)
  return dataclasses.replace(EXPERIMENT, data=data)


def test_shots_fill_the_clip():
  rng = np.random.default_rng(0)
  drawn = [clips.random_shots(rng, 7, 3) for _ in range(200)]
  assert {len(shots) for shots in drawn} == {1, 2, 3}
  assert all(sum(shots) == 7 and min(shots) >= 1 for shots in drawn)
  assert clips.random_shots(rng, 1, 3) == [1]


@pytest.mark.parametrize("cuts", [[], [1], [3], [2, 5], [5, 6], [1, 2, 3]])
def test_late_blocks_see_sink_pin_and_recent(cuts: list[int]):
  rows = clips.visible_blocks(cuts, 9, Window(slots=4, sink=1), pin=True)
  for block in range(4, 9):
    seen = rows[block].tolist()
    assert seen[-1] == block and 0 in seen and len(set(seen)) == 4
    pins = [c for c in cuts if c < block]
    assert not pins or max(pins) in seen
  if not cuts:
    assert rows[4:].tolist() == [[0, b - 2, b - 1, b] for b in range(4, 9)]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_bank_agrees_with_the_sampler(share: float):
  """Prompts, positions and visible blocks are those a script of the same shots gets."""
  experiment = with_changes(share)
  bank = make_bank(experiment)
  specs, lengths = clips.make_clips(experiment, 5, experiment.data.seed)
  follows = [shot.follows for spec in specs for shot in spec.shots[1:]]
  assert set(follows) == {False, share > 0}
  tokenizer, schedule = load_tokenizer(experiment.model.text), Schedule.of(experiment)
  for row, (spec, shots) in enumerate(zip(specs, lengths, strict=True)):
    entries = [
      Shot(s.caption(), n, transition="keep" if s.follows else "cut")
      for s, n in zip(spec.shots, shots, strict=True)
    ]
    plan = expand(Script(tuple(entries)), 24, F, experiment.sample.cut_prefix)
    cuts = [block for block, entry in enumerate(plan) if entry.transition == "cut"]
    assert clips.find_cuts(spec, shots) == cuts
    ids, mask = tokenizer([entry.prompt for entry in plan])
    np.testing.assert_array_equal(bank.tokens[row], ids)
    np.testing.assert_array_equal(bank.masks[row], mask)
    states = (SampleState(),)
    for block, entry in enumerate(plan):
      cut = [entry.transition == "cut"]
      states, tables = schedule.enter(states, block, cut)
      slots = states[0].slots
      np.testing.assert_array_equal(tables.cos[0], bank.cos[row, block])
      np.testing.assert_array_equal(tables.sin[0], bank.sin[row, block])
      if block >= experiment.data.blocks:
        assert sorted(slots.blocks) == bank.visible[row, block].tolist()
      states, _ = schedule.settle(states, block, cut)


def test_latents_are_those_of_the_rendered_clips_also_in_a_short_last_group(bank: clips.Bank):
  specs, _ = clips.make_clips(EXPERIMENT, 5, EXPERIMENT.data.seed)
  for row in (0, 4):
    frames = shapes.render(specs[row], EXPERIMENT.video)
    video = jnp.asarray(frames, jnp.float32)[None] / 127.5 - 1.0
    expected = encode(None, video)[0].reshape(bank.latents.shape[1:])
    np.testing.assert_allclose(bank.latents[row].astype(jnp.float32), expected, atol=0.02)


def test_groups_are_compiled_once_and_waited_for(monkeypatch: pytest.MonkeyPatch, caplog):
  """Or a signal would be heard after the last one, and the bank be told of before it is made."""
  specs, _ = clips.make_clips(EXPERIMENT, 5, 0)
  traced, ready = [], []

  def slow(colours: np.ndarray) -> np.ndarray:
    time.sleep(0.05)
    return colours

  def counted(params: None, video: Array) -> Array:
    traced.append(video.shape)
    colours = encode(params, video)
    return jax.pure_callback(slow, colours, colours)

  def put_rows(array: Array, *others: Any) -> Array:
    ready.append(array.is_ready())
    return original(array, *others)

  original = clips.put_rows
  monkeypatch.setattr(clips, "put_rows", put_rows)
  monkeypatch.setattr(clips, "LOG_SECONDS", 0)
  with caplog.at_level(std_logging.INFO, logger="absl"):
    made = clips.encode_clips(EXPERIMENT, specs, counted, None, 2, 4)
  assert made.is_ready() and ready[1:] == [True, True]
  assert traced == [(2, 13, 32, 32, 3)]
  assert "encoding 5 clips" in caplog.text and "4 of 5 clips are encoded" in caplog.text
  whole = clips.encode_clips(EXPERIMENT, specs, encode, None, 5, 4)
  np.testing.assert_array_equal(made, whole)


def test_the_bank_grows_in_place():
  array, rows = jnp.zeros((5, 3)), jnp.ones((2, 3))
  grown = clips.put_rows(array, rows, np.int32(4), 1)
  assert array.is_deleted() and grown.tolist() == [[0.0] * 3] * 4 + [[1.0] * 3]


def test_clips_are_split_over_a_mesh_and_lie_on_all_devices():
  mesh = make_mesh(4, devices=jax.devices()[:4])
  specs, _ = clips.make_clips(EXPERIMENT, 5, 0)
  seen = []

  class Colours:
    """Stands for the VAE."""

    def bind(self, params: None) -> "Colours":
      return self

    def encode(self, video: Array, chunk: int | None) -> Array:
      jax.debug.inspect_array_sharding(video, callback=seen.append)
      return encode(None, video)

  made = clips.encode_clips(EXPERIMENT, specs, clips.mesh_encoder(Colours(), mesh), None, 4, 4)
  assert seen[0].shard_shape((4, 13, 32, 32, 3)) == (1, 13, 32, 32, 3)
  assert len(made.sharding.device_set) == 4 and made.is_fully_replicated
  alone = clips.encode_clips(EXPERIMENT, specs, encode, None, 4, 4)
  np.testing.assert_allclose(
    made.astype(jnp.float32), np.asarray(alone.astype(jnp.float32)), atol=0.01
  )


def test_half_of_the_samples_are_what_a_late_block_sees(bank: clips.Bank):
  clip, blocks = clips.choose(jax.random.key(0), bank, 2000, EXPERIMENT.data)
  first = (blocks == jnp.arange(4)).all(1)
  assert 0.45 < 1 - float(jnp.mean(first)) < 0.55
  late = np.asarray(bank.visible)[np.asarray(clip), np.asarray(blocks)[:, -1]]
  np.testing.assert_array_equal(np.asarray(blocks)[~first], late[~np.asarray(first)])
  assert set(np.asarray(blocks)[~np.asarray(first), -1].tolist()) == {4, 5, 6}
  near = dataclasses.replace(EXPERIMENT.data, far_share=0.0)
  _, blocks = clips.choose(jax.random.key(1), bank, 50, near)
  assert (blocks == jnp.arange(4)).all()


def test_clips_of_the_autoencoder_have_cuts_at_borders_of_latents():
  packed = clips.vae_clips(EXPERIMENT, 200)
  second = packed["first_frame"][:, 1]
  cut = second[second < shapes.NEVER]
  assert 70 < len(cut) < 130
  assert set(cut.tolist()) == {1, 5, 9, 13, 17}


def test_clips_of_the_autoencoder_have_no_other_changes():
  with_them = clips.vae_clips(with_changes(1.0), 20)
  jax.tree.map(np.testing.assert_array_equal, with_them, clips.vae_clips(EXPERIMENT, 20))
