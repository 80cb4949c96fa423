"""Counts of operations: known figures of the 5B model, traces, and the compiler's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.config.load import load_config
from longlive_jax.config.schema import Model, Text, Vae
from longlive_jax.eval import flops
from longlive_jax.eval.trace import work
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.rope import Rope
from longlive_jax.model.text import declare_text
from longlive_jax.model.vae import declare_vae

TEXT = Text(vocabulary=32, width=32, attention_width=16, ffn_width=48, heads=2, layers=2, length=8)
VAE = Vae(latent_channels=8, encoder_width=6, decoder_width=5, multipliers=(1, 2, 2, 1))
MODEL = Model(
  width=96,
  ffn_width=160,
  heads=4,
  layers=3,
  frequency_width=16,
  block_latents=2,
  dtype="float32",
  text=TEXT,
  vae=VAE,
)


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, dtype)


def teacher_forcing(latents: int, rows: int, columns: int, cfg: Model = MODEL):
  """A forward of one clip and its arguments; tokens are 2x2 latents."""
  network, tokens = declare_dit(cfg), rows * columns // 4
  blocks = latents // cfg.block_latents
  borders = block_borders(latents, cfg.block_latents, tokens)

  def forward(params, x, times, prompts, turn):
    model = network.bind(params)
    plan = TeacherForcing(Rope(turn, turn), borders)
    out = model(x, times, model.text_kv(prompts), plan, context=x, pieces=blocks)[0]
    return jnp.sum(out**2)

  return forward, (
    network.abstract,
    shape(1, latents, rows, columns, VAE.latent_channels),
    shape(1, latents),
    shape(blocks, TEXT.length, TEXT.width),
    shape(1, latents * tokens, cfg.head_dim // 2),
  )


@pytest.fixture(scope="module")
def wan():
  return load_config("configs/wan5b_train.py")


def test_known_figures_of_the_transformer(wan):
  clip = flops.teacher_forcing_flops(wan.model, 96, 880)
  assert clip.linear / 30 == pytest.approx(48.9e12, rel=1e-3)
  assert clip.self_attention / 30 == pytest.approx(95.0e12, rel=1e-3)
  assert 3 * (clip.linear + clip.self_attention) == pytest.approx(12.95e15, rel=1e-3)
  long = flops.teacher_forcing_flops(wan.model, 384, 880)
  assert long.linear / 30 == pytest.approx(195.6e12, rel=1e-3)
  assert long.self_attention / 30 == pytest.approx(1432e12, rel=1e-3)
  cached = flops.cached_flops(wan.model, 880, 32)
  assert cached.forward == pytest.approx(136.15e12, rel=1e-4)
  assert cached.self_attention == pytest.approx(73.1e12, rel=1e-3)


def test_known_figure_of_the_decoder(wan):
  full = flops.decode_flops(wan.model.vae, 8, 704, 1280, folded=False)
  assert full == pytest.approx(530.8e12, rel=1e-4)
  assert flops.decode_flops(wan.model.vae, 8, 704, 1280) < full


def test_a_step_counts_the_batch_three_times(wan):
  clip = flops.teacher_forcing_flops(wan.model, 96, 880)
  assert flops.step_flops(wan) == wan.train.batch * 3 * clip.forward


def test_the_count_is_that_of_the_trace():
  forward, arguments = teacher_forcing(6, 4, 8)
  counted = flops.teacher_forcing_flops(MODEL, 6, 8)
  assert work(forward, *arguments).flops == counted.forward
  gradient = work(jax.grad(forward), *arguments).flops
  assert gradient == counted.forward + counted.backward


def test_the_count_is_near_that_of_the_compiler():
  """Of one layer: the compiler counts the body of a loop once. It also counts single operations."""
  one = dataclasses.replace(MODEL, layers=1, width=256, ffn_width=512)
  forward, arguments = teacher_forcing(8, 16, 16, one)
  counted = flops.teacher_forcing_flops(one, 8, 64).forward
  found = jax.jit(forward).lower(*arguments).compile().cost_analysis()["flops"]
  assert counted < found < 1.03 * counted


def test_the_text_encoder_is_counted():
  network = declare_text(TEXT)
  ids = shape(3, TEXT.length, dtype="int32")
  found = work(lambda p, i: network.bind(p)(i, None), network.abstract, ids)
  assert found.flops == flops.text_flops(TEXT, 3)


@pytest.mark.parametrize("latents", [1, 4])
def test_the_encoder_is_counted(latents):
  network = declare_vae(VAE, form="conv3d")
  video = shape(1, 4 * latents - 3, 32, 48, 3)
  found = work(lambda p, v: network.bind(p).encode(v, 2), network.abstract, video)
  assert found.flops == flops.encode_flops(VAE, latents, 32, 48)


def test_the_decoder_is_counted():
  network, size = declare_vae(VAE, form="conv3d"), (128, 192)

  def later(params, first, latents):
    model = network.bind(params)
    state = model.decode_next(first, None)[1]
    return model.decode_next(latents, state)[0]

  latents = [shape(1, n, size[0] // 16, size[1] // 16, VAE.latent_channels) for n in (1, 3)]
  both = work(later, network.abstract, *latents).flops
  first = work(lambda p, x: network.bind(p).decode(x), network.abstract, latents[0]).flops
  # folded kernels also run over one more row and column
  found = flops.decode_flops(VAE, 3, *size)
  assert found < both and both == pytest.approx(found + first, rel=0.05)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA L40S", 362e12),
    ("cpu", None),
  ],
)
def test_the_peak_of_a_device(kind, peak):
  assert flops.peak_flops(kind) == peak


def test_mfu():
  assert flops.mfu(2 * 989e12, 4.0, 2, "NVIDIA H200") == pytest.approx(0.25)
  assert flops.mfu(1e15, 1.0, 1, "cpu") is None


def test_a_clip_of_part_of_a_block_is_refused():
  with pytest.raises(ValueError, match="model.block_latents=2"):
    flops.teacher_forcing_flops(MODEL, 5, 8)
