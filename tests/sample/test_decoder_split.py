"""Frames decoded by several devices, or a few latents at a time, are those made at once by one."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longlive_jax.config import Vae
from longlive_jax.model.vae import declare_vae
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.parallel.space import split_rows
from longlive_jax.sample.decoder import Decoder
from longlive_jax.types import Array, PyTree
from tests.model.small_vae import SMALL, drawn

BLOCK = (1, 2, 6, 2, 6)  # B, F, h, w, C
BLOCKS = 3
LIGHT = dataclasses.replace(SMALL, decoder_width=3)
PLACES = PartitionSpec(None, None, "seq")
# decoder, form, devices, latents at a time
SPLIT = ((SMALL, "conv3d", 2, 0), (SMALL, "conv2d", 3, 1), (LIGHT, "conv2d", 2, 0))
IDS = ("full-conv3d-2", "full-conv2d-3-one-by-one", "light-conv2d-2")
each_split = pytest.mark.parametrize(("vae", "form", "ranks", "at_a_time"), SPLIT, ids=IDS)

Made = tuple[Decoder, list[Array], PyTree]


def home(ranks: int) -> NamedSharding:
  mesh = make_mesh(1, seq=ranks, devices=jax.devices()[:ranks])
  return NamedSharding(mesh, PartitionSpec())


@functools.cache
def decoded(vae: Vae, form: str = "conv2d", ranks: int = 1, at_a_time: int = 0) -> Made:
  """The decoder, frames of every block, and the state after the last."""
  network, place = declare_vae(vae, form=form), home(ranks)
  params = jax.device_put(drawn(network.abstract), place)
  decoder = Decoder(network, params, BLOCK, at_a_time)
  rng = np.random.default_rng(1)
  state, frames = None, []
  for _ in range(BLOCKS):
    latents = rng.normal(size=BLOCK).astype(np.float32)
    before = jax.tree.leaves(state)
    block, state = decoder.decode(jax.device_put(latents, place), state)
    assert all(a.is_deleted() for a in before)  # donated
    frames.append(block)
    assert all(a.sharding.is_equivalent_to(block.sharding, 5) for a in jax.tree.leaves(state))
  return decoder, frames, state


def check_equal(ours: Made, expected: Made) -> None:
  """Frames to a level; the state, which holds what every convolution reads, to rounding."""
  for a, b in zip(ours[1], expected[1], strict=True):
    assert a.dtype == np.uint8 and a.shape == b.shape
    assert len(np.unique(b)) > 100
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, ours[2], expected[2])


@each_split
def test_devices_that_share_the_rows_give_the_frames_of_one(vae, form, ranks, at_a_time):
  made = decoded(vae, form, ranks, at_a_time)
  check_equal(made, decoded(vae))
  for frames in made[1]:
    assert frames.sharding.is_equivalent_to(NamedSharding(home(ranks).mesh, PLACES), 5)
    assert {s.data.shape[2] for s in frames.addressable_shards} == {96 // ranks}


COLLECTIVE = re.compile(r"= [a-z0-9]+\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)\(")


@each_split
def test_devices_exchange_border_rows_and_the_attention_of_the_middle(vae, form, ranks, at_a_time):
  _, latents, height, width, _ = BLOCK
  text = decoded(vae, form, ranks, at_a_time)[0].later.as_text()
  found = [(kind, [int(n) for n in dims.split(",")]) for dims, kind in COLLECTIVE.findall(text)]
  assert len(found) == len(re.findall(r"(?:all-\w+|collective-\w+|reduce-scatter)\(", text))
  assert {kind for kind, _ in found} == {"collective-permute", "all-gather"}
  gathered = [math.prod(dims) for kind, dims in found if kind == "all-gather"]
  channels = vae.decoder_width * vae.multipliers[-1]
  keys = (at_a_time or latents) * height * width * channels
  assert sum(gathered) <= 2 * keys  # keys and values
  # [.., T, H, W, C] with batch and frames apart or not; doubling shifts parts of unequal sizes
  rows = [dims[2 if len(dims) > 4 else 1] for kind, dims in found if kind == "collective-permute"]
  assert rows.count(1) > 30 and max(rows) <= max(ranks - 1, 1)


def test_devices_share_the_work():
  decoders = (decoded(LIGHT)[0], decoded(*SPLIT[2])[0])
  one, ours = (decoder.later.cost_analysis()["flops"] for decoder in decoders)
  assert 1 / 2 <= ours / one < 1.1 / 2


def test_a_few_latents_at_a_time_give_the_frames_of_a_block():
  ours = decoded(SMALL, at_a_time=1)
  check_equal(ours, decoded(SMALL))
  assert [frames.shape[1] for frames in ours[1]] == [5, 8, 8]


def test_rows_that_devices_do_not_divide_stay_whole_and_it_is_said(caplog):
  with caplog.at_level("WARNING"):
    assert split_rows(home(4), 44) == NamedSharding(home(4).mesh, PLACES)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert split_rows(one, 44) == one and split_rows(home(1), 44) == home(1)
  assert not caplog.records
  with caplog.at_level("WARNING"):
    assert split_rows(home(4), 6) == home(4)
  assert [r.getMessage() for r in caplog.records] == [
    "4 devices do not divide 6 rows of latents: each decodes all"
  ]
