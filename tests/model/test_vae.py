"""The VAE: sizes, streaming in pieces, causality, carried state, conversion of foreign tensors."""

from itertools import pairwise, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import Vae
from longlive_jax.config.rules import check_vae
from longlive_jax.convert.keys_vae import vae_rows
from longlive_jax.convert.torch_import import import_params, leaf_at
from longlive_jax.model.module import Network, count_parameters
from longlive_jax.model.vae import (
  declare_vae,
  from_uint8,
  latents_per_call,
  to_uint8,
)
from longlive_jax.model.vae_blocks import average_down, duplicate_up
from longlive_jax.types import Array, PyTree
from tests.model.small_vae import SMALL, drawn, jit

F = 7  # latents of the clips
LIGHT, LIGHTER = ({"encoder_width": e, "decoder_width": d} for e, d in ((80, 128), (40, 64)))


class Clip:
  """A small VAE, a clip of latents and one of frames, and compiled functions shared by all tests.

  The batch is 2, so that a mistake which mixes videos shows.
  """

  def __init__(self) -> None:
    network = self.network = declare_vae(SMALL, form="conv2d")
    self.params = drawn(network.abstract)
    rng = np.random.default_rng(1)
    self.latents = jnp.asarray(rng.normal(size=(2, F, 2, 1, 6)), jnp.float32)
    self.video = jnp.asarray(rng.uniform(-1, 1, (2, 4 * F - 3, 32, 16, 3)), jnp.float32)
    decode = jit(lambda p, z, s: network.bind(p).decode_next(z, s))
    encode = jit(lambda p, x, s: network.bind(p).encode_next(x, s))
    self.decode_next = lambda z, state: decode(self.params, z, state)
    self.encode_next = lambda x, state: encode(self.params, x, state)
    self.decoded, self.decoder_state = self.decode_next(self.latents, None)
    self.mean, self.log_variance, self.encoder_state = self.encode_next(self.video, None)


@pytest.fixture(scope="module")
def clip() -> Clip:
  return Clip()


def shapes_of(cfg: Vae, method: str, *shapes: tuple[int, ...]) -> Any:
  """Shapes of what a method of the VAE gives, without computing anything."""
  network = declare_vae(cfg)
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.eval_shape(
    lambda p, *a: getattr(network.bind(p), method)(*a, None), network.abstract, *arguments
  )


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (96, 160), (48, 16)])
@pytest.mark.parametrize("latents", [1, 2, 4])
def test_frames_are_four_a_latent_but_for_the_first(size, latents):
  height, width = size
  small, large = (2, latents, height // 16, width // 16, 6), (2, 4 * latents - 3, height, width, 3)
  mean, log_variance, _ = shapes_of(SMALL, "encode_next", large)
  assert mean.shape == log_variance.shape == shapes_of(SMALL, "encode", large).shape == small
  assert shapes_of(SMALL, "decode", small).shape == large


@pytest.mark.parametrize("size", [1, 2, 3])
def test_decoding_in_pieces_is_decoding_the_clip(clip, size):
  frames, state = [], None
  for start, end in pairwise((0, *range(1, F + 1, size))):
    video, state = clip.decode_next(clip.latents[:, start:end], state)
    frames.append(video)
  assert [video.shape[1] for video in frames] == [1] + [4 * size] * (6 // size)
  np.testing.assert_allclose(np.concatenate(frames, 1), clip.decoded, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, clip.decoder_state)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_encoding_in_pieces_is_encoding_the_clip(clip, size):
  means, variances, state = [], [], None
  for start, end in pairwise((0, *range(1, 4 * F - 2, 4 * size))):
    mean, log_variance, state = clip.encode_next(clip.video[:, start:end], state)
    means.append(mean)
    variances.append(log_variance)
  assert [mean.shape[1] for mean in means] == [1] + [size] * (6 // size)
  np.testing.assert_allclose(np.concatenate(means, 1), clip.mean, atol=1e-5)
  np.testing.assert_allclose(np.concatenate(variances, 1), clip.log_variance, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, clip.encoder_state)


def test_latents_per_step_bounds_memory_and_changes_nothing_else(clip):
  bind = clip.network.bind
  decode = jit(lambda p, z, s: bind(p).decode_next(z, s, 4)[0])  # 4 in a scan, 2
  encode = jit(lambda p, x, s: bind(p).encode_next(x, s, 2)[0])  # three times 2 in a scan
  decoded = decode(clip.params, clip.latents[:, 1:], clip.decode_next(clip.latents[:, :1], None)[1])
  np.testing.assert_allclose(decoded, clip.decoded[:, 1:], atol=1e-5)
  mean = encode(clip.params, clip.video[:, 1:], clip.encode_next(clip.video[:, :1], None)[2])
  np.testing.assert_allclose(mean, clip.mean[:, 1:], atol=1e-5)


@pytest.mark.parametrize("latent", range(F))
def test_a_later_latent_changes_no_earlier_frame(clip, latent):
  frames = clip.decode_next(clip.latents.at[0, latent, 0, 0, 2].add(1.0), None)[0]
  changed = np.any(np.asarray(frames != clip.decoded), (2, 3, 4))
  first = max(4 * latent - 3, 0)
  assert not changed[1].any() and not changed[0, :first].any() and changed[0, first:].all()


@pytest.mark.parametrize("frame", [0, 1, 4, 5, 10, 4 * F - 4])
def test_a_later_frame_changes_no_earlier_latent(clip, frame):
  mean = clip.encode_next(clip.video.at[0, frame, 3, 5, 1].add(1.0), None)[0]
  changed = np.any(np.asarray(mean != clip.mean), (2, 3, 4))
  first = (frame + 3) // 4
  assert not changed[1].any() and not changed[0, :first].any() and changed[0, first:].all()


def test_the_other_form_of_convolution_agrees_raw_and_normalised(clip):
  other, params = declare_vae(SMALL, form="conv3d"), clip.params
  raw = clip.latents * params["latent_std"] + params["latent_mean"]
  both = jit(lambda p, z, x: (other.bind(p).decode_raw(z), other.bind(p).encode(x)))
  decoded, latents = both(params, raw, clip.video)
  np.testing.assert_allclose(decoded, clip.decoded, atol=1e-5)
  wanted = (clip.mean - params["latent_mean"]) / params["latent_std"]
  np.testing.assert_allclose(latents, wanted, atol=1e-5)


def test_bfloat16_is_close_and_gives_float32(clip):
  narrow = declare_vae(SMALL, dtype="bfloat16", form="conv2d")
  decoded = jit(lambda p, z: narrow.bind(p).decode(z))(clip.params, clip.latents[:, :1])
  wide = clip.decoded[:, :1]
  assert decoded.dtype == jnp.float32
  assert 1e-4 < np.linalg.norm(decoded - wide) / np.linalg.norm(wide) < 0.05


def carried(network: Network, method: str, shape: tuple[int, ...], state: Any = None) -> Any:
  """Shapes of the state after a call of `method`."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  step = jax.eval_shape(
    lambda p, x, s: getattr(network.bind(p), method)(x, s), network.abstract, x, state
  )
  return step[-1]


def test_what_is_carried_has_one_size_from_the_first_latent_on():
  network = declare_vae(SMALL)
  state = carried(network, "decode_next", (1, 1, 2, 2, 6))
  assert carried(network, "decode_next", (1, 3, 2, 2, 6), state) == state
  assert carried(network, "decode_next", (1, 4, 2, 2, 6)) == state
  state = carried(network, "encode_next", (1, 1, 32, 32, 3))
  assert carried(network, "encode_next", (1, 8, 32, 32, 3), state) == state
  assert carried(network, "encode_next", (1, 13, 32, 32, 3)) == state


@pytest.mark.parametrize(
  ("method", "shape", "arrays", "gib"),
  [
    ("decode_next", (1, 1, 44, 80, 48), 32, 3.00),
    ("encode_next", (1, 1, 704, 1280, 3), 24, 0.99),
  ],
)
def test_what_the_released_size_carries_is_the_recorded_memory(method, shape, arrays, gib):
  state = jax.tree.leaves(carried(declare_vae(Vae(), dtype="bfloat16"), method, shape))
  assert len(state) == arrays and {a.dtype for a in state} == {jnp.dtype(jnp.bfloat16)}
  assert round(sum(2 * a.size for a in state) / 2**30, 2) == gib


def largest_array(cfg: Vae, latents: int, batch: int) -> int:
  """Elements of the largest array when the decoder takes `latents` at once at 704x1280."""
  network = declare_vae(cfg, dtype="bfloat16", form="conv3d")
  shape = jax.ShapeDtypeStruct((batch, latents, 44, 80, 48), jnp.float32)
  one = jax.ShapeDtypeStruct((batch, 1, 44, 80, 48), jnp.float32)

  def step(params: PyTree, z: Array, state: Any) -> Any:
    return network.bind(params).decode_next(z, state, latents)

  state = jax.eval_shape(step, network.abstract, one, None)[1]
  jaxpr = jax.make_jaxpr(step)(network.abstract, shape, state)
  todo, most = [jaxpr.jaxpr], 0
  while todo:
    for equation in todo.pop().eqns:
      most = max(most, *(v.aval.size for v in equation.outvars))
      inner = (getattr(v, "jaxpr", v) for v in equation.params.values())
      todo += [v for v in inner if hasattr(v, "eqns")]
  return most


@pytest.mark.parametrize(("widths", "batch", "latents"), [({}, 1, 4), ({}, 2, 1), (LIGHT, 1, 8)])
def test_a_call_keeps_every_array_under_two_to_the_31(widths, batch, latents):
  cfg = Vae(**widths)
  assert latents_per_call(cfg, batch, 704, 1280) == latents
  assert largest_array(cfg, latents, batch) < 2**31
  assert largest_array(cfg, latents + 1, batch) > 2**31


@pytest.mark.parametrize(
  ("widths", "parameters"), [({}, 704_688_668), (LIGHT, 176_981_772), (LIGHTER, 44_654_660)]
)
def test_the_released_sizes_have_their_recorded_number_of_parameters(widths, parameters):
  cfg = Vae(**widths)
  abstract, rows = declare_vae(cfg).abstract, vae_rows(cfg)
  weights = {name: abstract[name] for name in abstract if not name.startswith("latent_")}
  assert count_parameters(weights) == parameters
  assert len(rows) == len({row.key for row in rows}) == 196
  assert len(jax.tree.leaves(weights)) == 196
  for row in rows:
    leaf_at(weights, row.path)
  if not widths:
    assert count_parameters(weights["encoder"]) == 149_627_776
    assert count_parameters(weights["decoder"]) == 555_049_228


def foreign_tensors(seed: int = 0) -> dict[str, np.ndarray]:
  """Tensors of the small VAE under the original's names, in its order of axes."""
  rng, shapes = np.random.default_rng(seed), foreign_shapes(SMALL)
  return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def foreign_shapes(cfg: Vae) -> dict[str, tuple[int, ...]]:
  """The table of section 6.3, written out for any widths."""
  shapes: dict[str, tuple[int, ...]] = {}

  def conv(key: str, size_in: int, out: int, *kernel: int) -> None:
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, size_in, *kernel), (out,)

  def residual(key: str, size_in: int, out: int) -> None:
    shapes[f"{key}.residual.0.gamma"] = (size_in, 1, 1, 1)
    shapes[f"{key}.residual.3.gamma"] = (out, 1, 1, 1)
    conv(f"{key}.residual.2", size_in, out, 3, 3, 3)
    conv(f"{key}.residual.6", out, out, 3, 3, 3)
    if size_in != out:
      conv(f"{key}.shortcut", size_in, out, 1, 1, 1)

  def ends(side: str, first: tuple[int, int], middle: int, head: tuple[int, int]) -> None:
    conv(f"{side}.conv1", *first, 3, 3, 3)
    residual(f"{side}.middle.0", middle, middle)
    residual(f"{side}.middle.2", middle, middle)
    shapes[f"{side}.middle.1.norm.gamma"] = (middle, 1, 1)
    conv(f"{side}.middle.1.to_qkv", middle, 3 * middle, 1, 1)
    conv(f"{side}.middle.1.proj", middle, middle, 1, 1)
    shapes[f"{side}.head.0.gamma"] = (head[0], 1, 1, 1)
    conv(f"{side}.head.2", *head, 3, 3, 3)

  def stages(side: str, word: str, sizes: list[int], blocks: int, times: tuple, grow: int) -> None:
    for i, (size_in, out) in enumerate(pairwise(sizes)):
      key = f"{side}.{word}.{i}.{word}"
      for j in range(blocks):
        residual(f"{key}.{j}", out if j else size_in, out)
      if i < 3:
        conv(f"{key}.{blocks}.resample.1", out, out, 3, 3)
      if i < 3 and times[i]:
        conv(f"{key}.{blocks}.time_conv", out, grow * out, 3, 1, 1)

  e, d, z, blocks = cfg.encoder_width, cfg.decoder_width, cfg.latent_channels, cfg.residual_blocks
  ends("encoder", (12, e), 4 * e, (4 * e, 2 * z))
  stages("encoder", "downsamples", [e, e, 2 * e, 4 * e, 4 * e], blocks, (False, True, True), 1)
  conv("conv1", 2 * z, 2 * z, 1, 1, 1)
  conv("conv2", z, z, 1, 1, 1)
  ends("decoder", (z, 4 * d), 4 * d, (d, 12))
  stages(
    "decoder", "upsamples", [4 * d, 4 * d, 4 * d, 2 * d, d], blocks + 1, (True, True, False), 2
  )
  return shapes


def test_foreign_keys_and_shapes_are_those_of_the_table():
  wanted = foreign_shapes(Vae())
  assert {row.key for row in vae_rows(Vae())} == set(wanted) and len(wanted) == 196
  assert sum(int(np.prod(shape)) for shape in wanted.values()) == 704_688_668


def test_foreign_tensors_land_with_their_axes_in_order():
  tensors, rows = foreign_tensors(), vae_rows(SMALL)
  params = import_params(rows, tensors, declare_vae(SMALL).abstract)
  at = {row.path: np.asarray(leaf_at(params, row.path)) for row in rows}
  conv = tensors["decoder.upsamples.0.upsamples.1.residual.6.weight"]
  flat = tensors["encoder.middle.1.to_qkv.weight"]
  plane = tensors["encoder.downsamples.2.downsamples.1.resample.1.weight"]
  assert at["decoder/stages/0/blocks/1/conv2/kernel"][2, 0, 1, 5, 7] == conv[7, 5, 2, 0, 1]
  assert at["encoder/middle/attention/qkv/kernel"][3, 20] == flat[20, 3, 0, 0]
  assert at["encoder/stages/2/resample/spatial/kernel"][0, 2, 4, 9] == plane[9, 4, 0, 2]
  gamma = tensors["decoder.head.0.gamma"]
  np.testing.assert_array_equal(at["decoder/head/norm/scale"], gamma[:, 0, 0, 0])
  assert sum(a.size for a in at.values()) == sum(a.size for a in tensors.values())


def test_a_foreign_tensor_of_another_shape_is_refused_by_its_key():
  key = "decoder.conv1.weight"
  tensors = foreign_tensors()
  tensors[key] = tensors[key][:-1]
  with pytest.raises(ValueError, match=rf"^'{key}' has shape .*; by the configuration it must be "):
    import_params(vae_rows(SMALL), tensors, declare_vae(SMALL).abstract)


def test_missing_and_unknown_foreign_tensors_are_refused_by_their_key():
  key, network = "encoder.middle.1.proj.bias", declare_vae(SMALL)
  tensors = foreign_tensors()
  value = tensors.pop(key)
  with pytest.raises(ValueError, match=rf"^missing tensor '{key}'"):
    import_params(vae_rows(SMALL), tensors, network.abstract)
  tensors |= {key: value, "encoder.middle.1.proj.bias2": value}
  with pytest.raises(ValueError, match=rf"^unknown tensor '{key}2' \(did you mean '{key}'\?\)"):
    import_params(vae_rows(SMALL), tensors, network.abstract)


@pytest.mark.parametrize(
  ("size_out", "time", "space"), [(6, 1, 2), (12, 2, 2), (3, 2, 2), (6, 1, 1)]
)
def test_the_averaging_shortcut_takes_groups_of_the_flat_index(size_out, time, space):
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 6)).astype(np.float32)
  frames = np.concatenate([np.zeros_like(x[:, : -3 % time]), x], 1)
  group = 6 * time * space**2 // size_out
  wanted = np.zeros((2, frames.shape[1] // time, 4 // space, 6 // space, size_out))
  for flat, element in enumerate(product(range(6), range(time), range(space), range(space))):
    c, t, h, w = element
    wanted[..., flat // group] += frames[:, t::time, h::space, w::space, c] / group
  ours = average_down(jnp.asarray(x), size_out, time, space)
  np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize(("size_out", "time", "first"), [(8, 2, True), (8, 2, False), (4, 1, True)])
def test_the_duplicating_shortcut_copies_groups_of_the_flat_index(size_out, time, first):
  x = np.random.default_rng(0).normal(size=(2, 3, 2, 3, 8)).astype(np.float32)
  repeats = size_out * time * 4 // 8
  wanted = np.zeros((2, 3 * time, 4, 6, size_out))
  for flat, element in enumerate(product(range(size_out), range(time), range(2), range(2))):
    o, t, h, w = element
    wanted[:, t::time, h::2, w::2, o] = x[..., flat // repeats]
  ours = duplicate_up(jnp.asarray(x), size_out, time, 2, first)
  np.testing.assert_array_equal(ours, wanted[:, time - 1 if first else 0 :])


def test_bytes_survive_the_way_there_and_back():
  levels = jnp.arange(256, dtype=jnp.uint8)
  x = np.asarray(from_uint8(levels))
  assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
  np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-7)
  np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_are_clamped_rounded_and_black_for_nan(dtype):
  cases = {-1.5: 0, -np.inf: 0, np.nan: 0, -1: 0, 1: 255, 1.25: 255, np.inf: 255, 3e38: 255}
  cases |= {(100 + part) / 127.5 - 1: 100 for part in (-0.25, 0, 0.25)}
  if dtype == jnp.float32:
    cases |= {100.51 / 127.5 - 1: 101, 100.49 / 127.5 - 1: 100, 0.4 / 127.5 - 1: 0}
  ours = jax.jit(to_uint8)(jnp.asarray(list(cases), dtype))
  assert ours.dtype == jnp.uint8
  assert np.asarray(ours).tolist() == list(cases.values())


def test_released_statistics_normalise_each_channel():
  network = declare_vae(Vae(encoder_width=1, decoder_width=1, residual_blocks=1))

  def statistics(key: Array) -> tuple[Array, Array]:
    vae = network.build(nnx.Rngs(params=key))
    return vae.latent_mean[...], vae.latent_std[...]

  mean, std = (np.asarray(a, np.float64) for a in jit(statistics)(jax.random.key(0)))
  assert mean.shape == std.shape == (48,)
  assert (mean[0], mean[19], mean[47]) == pytest.approx((-0.2289, 0.5109, -0.0667))
  assert (std[0], std[39], std[47]) == pytest.approx((0.4765, 1.6887, 0.7744))
  raw = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)
  vae = network.bind({**drawn(network.abstract), "latent_mean": mean, "latent_std": std})
  np.testing.assert_allclose(vae.normalise(raw), (raw - mean) / std, atol=1e-5)
  np.testing.assert_allclose(vae.denormalise(vae.normalise(raw)), raw, atol=1e-5)


@pytest.mark.parametrize(
  ("method", "shape", "message"),
  [
    ("encode", (1, 6, 32, 32, 3), r"frames of video=6 must be 1 \+ a multiple of 4; use 5 or 9"),
    ("encode", (1, 0, 32, 32, 3), r"frames of video=0 must be 1 \+ a multiple of 4; use 1"),
    (
      "encode",
      (1, 5, 40, 32, 3),
      "height of video=40 must be a positive multiple .*; use 32 or 48",
    ),
    ("encode", (1, 5, 32, 8, 3), "width of video=8 must be a positive multiple .*=16"),
    ("encode", (1, 5, 32, 32, 4), r"video has shape \(1, 5, 32, 32, 4\); it must be .* 3\)"),
    ("encode", (5, 32, 32, 3), "video has shape .* must be"),
    ("decode", (1, 2, 2, 2, 5), r"channels of latents has shape \(5,\); it must be \(6\)"),
    ("decode_raw", (1, 2, 2, 2, 5), r"latents has shape \(1, 2, 2, 2, 5\); it must be .* 6\)"),
    ("decode", (1, 0, 2, 2, 6), "number of latents=0 must be at least 1"),
    ("decode", (2, 2, 2, 6), "latents has shape .* must be"),
  ],
)
def test_clips_that_do_not_fit_are_refused(method, shape, message):
  with pytest.raises(ValueError, match=message):
    shapes_of(SMALL, method, shape)


def test_later_frames_come_in_fours_and_steps_are_positive(clip):
  with pytest.raises(ValueError, match="frames of video=5 must be a positive multiple .*=4; use 4"):
    clip.encode_next(clip.video[:, :5], clip.encoder_state)
  with pytest.raises(ValueError, match="latents_per_step=0 must be at least 1"):
    clip.network.bind(clip.params).decode(clip.latents, 0)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"encoder_width": 0}, "model.vae.encoder_width=0 must be at least 1"),
    ({"decoder_width": 0}, "model.vae.decoder_width=0 must be at least 1"),
    ({"residual_blocks": 0}, "model.vae.residual_blocks=0 must be at least 1"),
    ({"multipliers": (1, 2, 4)}, r"model.vae.multipliers=\(1, 2, 4\) must have 4 entries"),
    ({"temporal_downsample": (True,) * 3}, "model.vae.temporal_downsample=.* two of them True"),
    ({"multipliers": (1, 2, 4, 8)}, "encoder groups 4 widths of channels by 8; 8 must divide 4"),
    ({"multipliers": (1, 1, 5, 5)}, "encoder groups 8 widths of channels by 5; 5 must divide 8"),
    ({"multipliers": (2, 2, 6, 2)}, "encoder groups 16 widths of channels by 6"),
    ({"multipliers": (1, 2, 8, 4)}, None),
    ({"multipliers": (1, 1, 1, 1)}, None),
  ],
)
def test_widths_whose_shortcuts_do_not_fit_are_refused(fields, message):
  if message is None:
    shapes_of(Vae(encoder_width=2, decoder_width=2, **fields), "decode", (1, 2, 2, 2, 48))
    shapes_of(Vae(encoder_width=2, decoder_width=2, **fields), "encode", (1, 5, 32, 32, 3))
  else:
    with pytest.raises(ValueError, match=message):
      check_vae(Vae(**fields))
