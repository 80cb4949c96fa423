"""Decoding in strips of rows: the numbers of the whole, in less memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model.conv import FORMS
from longlive_jax.model.tiles import Strip, by_strips
from longlive_jax.model.vae import declare_vae
from longlive_jax.types import Array, PyTree
from tests.model.small_vae import SMALL, drawn, jit

LATENTS = np.random.default_rng(1).normal(size=(2, 6, 6, 2, 6)).astype(np.float32)
CALLS = (1, 1, 1, 2, 1)  # latents


@functools.cache
def decoded(form: str, tiles: int) -> tuple[list[Array], PyTree]:
  """Frames of every call, and the state after the last."""
  network = declare_vae(SMALL, form=form)
  step = jit(lambda p, z, s: network.bind(p).decode_next(z, s, tiles=tiles))
  params, state, frames = drawn(network.abstract), None, []
  for end, count in zip(np.cumsum(CALLS), CALLS, strict=True):
    video, state = step(params, LATENTS[:, end - count : end], state)
    frames.append(video)
  return frames, state


@pytest.mark.parametrize(("form", "tiles"), [("conv2d", 2), ("conv2d", 6), ("conv3d", 3)])
def test_strips_give_the_frames_and_the_state_of_the_whole(form, tiles):
  ours, whole = decoded(form, tiles), decoded(form, 1)
  assert [video.shape[1] for video in ours[0]] == [1, 4, 4, 8, 4]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, whole)


def test_tiles_that_do_not_divide_the_rows_are_refused():
  with pytest.raises(ValueError, match="rows of latents=6 must be .* multiple of tiles=4; use 4"):
    decoded("conv2d", 4)


def memory(form: str, tiles: int) -> int:
  """Bytes of temporary arrays of decoding one latent of many rows."""
  cfg = dataclasses.replace(SMALL, decoder_width=8)
  network = declare_vae(cfg, dtype="bfloat16", form=form)
  z = jax.ShapeDtypeStruct((1, 1, 32, 4, 6), jnp.float32)

  def step(params: PyTree, z: Array, state: Any) -> Any:
    return network.bind(params).decode_next(z, state, tiles=tiles)

  state = jax.eval_shape(step, network.abstract, z, None)[1]
  compiled = jit(step, donate_argnums=2).lower(network.abstract, z, state).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("form", FORMS)
def test_strips_take_less_memory(form):
  assert memory(form, 16) < 0.5 * memory(form, 1)


def test_a_strip_reads_the_rows_beside_it_and_zeros_outside():
  x = jnp.arange(1.0, 7.0).reshape(1, 1, 6, 1, 1)
  reads = [Strip(jnp.int32(start), 2).bordered(x)[0, 0, :, 0, 0].tolist() for start in (0, 2, 4)]
  assert reads == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]]
  given = Strip(jnp.int32(2), 2).bordered(x, jnp.full((1, 1, 1, 1, 1), 9.0))
  assert given[0, 0, :, 0, 0].tolist() == [9, 3, 4, 5]


def test_results_of_strips_stand_below_each_other():
  x = jnp.arange(6.0).reshape(1, 1, 6, 1, 1)

  def twice(strip: Strip, count: Array) -> tuple[Array, Array]:
    return jnp.repeat(strip.rows(x), 2, 2), count + 1

  y, count = by_strips(twice, x, 3, jnp.int32(0))
  assert y[0, 0, :, 0, 0].tolist() == np.repeat(np.arange(6.0), 2).tolist() and count == 3
