"""The convolutions of the VAE against loops over numpy arrays in float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.model.conv import (
  FORMS,
  CausalConv,
  ChannelNorm,
  Pointwise,
  SpatialConv,
  choose_form,
  patchify,
  time_conv,
  uniform,
  unpatchify,
)
from longlive_jax.types import Array

RNG = np.random.default_rng(0)
ATOL = 1e-5


def draw(*shape: int) -> Array:
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def filled(module: nnx.Module) -> nnx.Module:
  """The module with all its parameters drawn, so that biases and scales count."""
  graph, state = nnx.split(module)
  return nnx.merge(graph, jax.tree.map(lambda a: draw(*a.shape), state))


def slow_conv(x: Array, kernel: Array, steps: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
  """Unpadded convolution of `[B, T, H, W, C]` with `[t, h, w, C, O]`, tap by tap."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  ends = [x.shape[i + 1] - kernel.shape[i] + 1 for i in range(3)]
  y: np.ndarray | float = 0.0
  for tap in product(*map(range, kernel.shape[:3])):
    t, h, w = (slice(a, a + e, s) for a, e, s in zip(tap, ends, steps, strict=True))
    y = y + np.einsum("bthwc,co->bthwo", x[:, t, h, w], kernel[tap])
  return np.asarray(y)


def padded(x: Array, *widths: tuple[int, int]) -> np.ndarray:
  """Zeros around the frames, rows and columns of x."""
  return np.pad(np.asarray(x), ((0, 0), *widths, (0, 0)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("extent", "stride"), [(3, 1), (1, 1), (1, 2)])
def test_time_conv_is_the_sum_over_taps(form, extent, stride):
  x, kernel = draw(2, 7, 3, 5, 4), draw(3, extent, extent, 4, 6)
  edge = (extent // 2,) * 2
  wanted = slow_conv(padded(x, (0, 0), edge, edge), kernel, (stride, 1, 1))
  np.testing.assert_allclose(time_conv(x, kernel, form, stride), wanted, atol=ATOL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extent", [3, 1])
def test_causal_conv_sees_two_frames_back_and_zeros_before_the_video(form, extent):
  conv = filled(CausalConv(4, 6, form, nnx.Rngs(0), extent))
  x, edge = draw(2, 6, 3, 5, 4), (extent // 2,) * 2
  wanted = slow_conv(padded(x, (2, 0), edge, edge), conv.kernel[...]) + np.asarray(conv.bias[...])
  for pieces in ((1, 5), (1, 1, 1, 3), (1, 2, 3)):
    outs, state, at = [], None, 0
    for size in pieces:
      out, state = conv(x[:, at : at + size], state)
      outs.append(out)
      at += size
    np.testing.assert_allclose(np.concatenate(outs, 1), wanted, atol=ATOL)
    np.testing.assert_array_equal(state, x[:, -2:])


def test_the_state_after_one_frame_already_has_two():
  conv = CausalConv(4, 6, "conv2d", nnx.Rngs(0))
  x = draw(2, 1, 3, 5, 4)
  np.testing.assert_array_equal(conv(x, None)[1], padded(x, (1, 0), (0, 0), (0, 0)))


@pytest.mark.parametrize("form", FORMS)
def test_halving_frames_reads_the_last_frame_before(form):
  conv = filled(CausalConv(4, 4, form, nnx.Rngs(0), extent=1))
  x = draw(2, 9, 3, 5, 4)
  wanted = slow_conv(x, conv.kernel[...], (2, 1, 1)) + np.asarray(conv.bias[...])
  first, state = conv.halve(x[:, 1:3], x[:, :1])
  second, state = conv.halve(x[:, 3:], state)
  np.testing.assert_allclose(np.concatenate([first, second], 1), wanted, atol=ATOL)
  np.testing.assert_array_equal(state, x[:, -1:])


def test_halving_pixels_pads_right_and_below():
  conv = filled(SpatialConv(4, nnx.Rngs(0)))
  x = draw(2, 3, 4, 6, 4)
  x_padded = padded(x, (0, 0), (0, 1), (0, 1))
  wanted = slow_conv(x_padded, conv.kernel[...][None], (1, 2, 2)) + np.asarray(conv.bias[...])
  np.testing.assert_allclose(conv.halve(x), wanted, atol=ATOL)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5)])
def test_doubling_pixels_repeats_them_before_the_convolution(size):
  conv = filled(SpatialConv(4, nnx.Rngs(0)))
  x = draw(2, 3, *size, 4)
  doubled = np.repeat(np.repeat(x, 2, 2), 2, 3)
  x_padded = padded(doubled, (0, 0), (1, 1), (1, 1))
  wanted = slow_conv(x_padded, conv.kernel[...][None]) + np.asarray(conv.bias[...])
  np.testing.assert_allclose(conv.double(x), wanted, atol=ATOL)


def test_pointwise_is_a_matrix_product():
  layer = filled(Pointwise(4, 6, nnx.Rngs(0)))
  x = draw(2, 1, 3, 5, 4)
  wanted = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
  np.testing.assert_allclose(layer(x), wanted, atol=ATOL)


def test_channel_norm_makes_the_mean_square_one():
  norm = filled(ChannelNorm(5))
  x = draw(2, 1, 3, 4, 5)
  wide = np.asarray(x, np.float64)
  wanted = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True)) * np.asarray(norm.scale[...])
  np.testing.assert_allclose(norm(x), wanted, atol=ATOL)
  np.testing.assert_allclose(norm(1e-9 * x), wanted, atol=ATOL)


def test_channel_norm_of_zeros_is_zero_with_a_finite_gradient():
  norm = ChannelNorm(5)
  zeros = jnp.zeros((1, 1, 1, 1, 5))
  assert np.all(norm(zeros) == 0)
  assert np.all(np.isfinite(jax.grad(lambda x: norm(x).sum())(zeros)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_layers_keep_the_dtype_of_their_input(dtype):
  x = draw(1, 1, 4, 4, 4).astype(dtype)
  rngs = nnx.Rngs(0)
  causal, spatial = CausalConv(4, 4, "conv2d", rngs), SpatialConv(4, rngs)
  y, state = causal(x, None)
  outs = (y, state, causal(x, state)[0], spatial.halve(x), spatial.double(x))
  assert {a.dtype for a in (*outs, ChannelNorm(4)(x), Pointwise(4, 4, rngs)(x))} == {
    jnp.dtype(dtype)
  }


def test_patches_order_colour_then_column_then_row():
  video = draw(2, 3, 4, 6, 3)
  patches = np.asarray(patchify(video))
  assert patches.shape == (2, 3, 2, 3, 12)
  for q, r, colour in product(range(2), range(2), range(3)):
    np.testing.assert_array_equal(
      patches[..., colour * 4 + r * 2 + q], video[:, :, q::2, r::2, colour]
    )
  np.testing.assert_array_equal(unpatchify(jnp.asarray(patches)), video)


def test_kernels_are_drawn_up_to_one_over_the_root_of_the_fan_in():
  kernel = np.asarray(uniform(nnx.Rngs(0), (3, 3, 3, 8, 64)))
  bound = (3 * 3 * 3 * 8) ** -0.5
  assert 0.99 * bound < kernel.max() <= bound and -bound <= kernel.min() < -0.99 * bound
  assert abs(kernel.mean()) < 0.01 * bound
  np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)


def test_the_form_follows_the_backend_and_unknown_ones_are_refused():
  assert choose_form() == ("conv2d" if jax.default_backend() == "cpu" else "conv3d")
  assert [choose_form(form) for form in FORMS] == list(FORMS)
  with pytest.raises(ValueError, match=r"form='conv4d' must be one of conv2d, conv3d"):
    choose_form("conv4d")
