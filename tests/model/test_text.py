"""The text encoder: buckets, masking, the key table, and the frozen features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Text
from longlive_jax.convert.keys_text import text_rows
from longlive_jax.convert.torch_import import leaf_at
from longlive_jax.model.module import count_parameters
from longlive_jax.model.text import bucket_of, declare_text, frozen_params, relative_buckets
from longlive_jax.model.tokenizer import load_tokenizer

SMALL = Text(
  vocabulary=258,
  width=32,
  attention_width=32,
  ffn_width=64,
  heads=4,
  layers=2,
  length=24,
  tokenizer="bytes",
  frozen_seed=0,
)


def test_buckets_have_the_recorded_edges():
  edges = {8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12, 45: 12, 46: 13}
  edges |= {63: 13, 64: 14, 90: 14, 91: 15, 128: 15, 100000: 15} | {i: i for i in range(8)}
  assert {d: bucket_of(d, 16, 128) for d in edges} == edges


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 100), (16, 20), (64, 200)])
def test_buckets_follow_the_logarithmic_formula(buckets, max_distance):
  half, exact = buckets // 2, buckets // 4
  for distance in range(exact, 400):
    growth = np.log(distance / exact) / np.log(max_distance / exact) * (half - exact)
    if abs(growth - round(growth)) > 1e-9:  # on an edge the logarithm rounds either way
      assert bucket_of(distance, half, max_distance) == min(half - 1, exact + int(growth))


def test_relative_buckets_tell_ahead_from_behind():
  table = relative_buckets(300, 32, 128)
  assert table[0, 0] == 0 and table[5, 4] == 1 and table[4, 5] == 17
  assert table[0, 299] == 31 and table[299, 0] == 15


def test_the_large_encoder_has_the_recorded_size_and_keys():
  cfg = Text()
  network, rows = declare_text(cfg), text_rows(cfg)
  assert len(rows) == len({row.key for row in rows}) == 242
  assert count_parameters(network.abstract) == 5_680_910_336
  leaves = {row.path for row in rows}
  assert len(leaves) == len(jax.tree.leaves(network.abstract))
  assert leaf_at(network.abstract, "layers/gate/kernel").shape == (24, 4096, 10240)


@pytest.fixture(scope="module")
def small():
  network = declare_text(SMALL)
  params = network.init(3)
  return network, params, load_tokenizer(SMALL)


def test_padding_changes_no_real_row_and_is_zeroed(small):
  network, params, tokenizer = small
  ids, mask = tokenizer(["red circle", "a"])
  out = network.bind(params)(ids, mask)
  real = int(mask[0].sum())
  alone = network.bind(params)(ids[:1, :real], mask[:1, :real])
  np.testing.assert_allclose(out[0, :real], alone[0], atol=2e-5)
  assert np.all(np.asarray(out)[mask == 0] == 0)
  kept = network.bind(params)(ids, mask, zero_padding=False)
  assert np.all(np.any(np.asarray(kept)[mask == 0] != 0, -1))


def test_a_full_mask_equals_no_mask(small):
  network, params, _ = small
  ids = np.arange(24, dtype=np.int32).reshape(2, 12)
  masked = network.bind(params)(ids, np.ones_like(ids))
  np.testing.assert_allclose(masked, network.bind(params)(ids, None), atol=1e-6)


def test_bfloat16_is_close_and_keeps_its_dtype(small):
  network, params, tokenizer = small
  ids, mask = tokenizer(["blue square moving"])
  wide, narrow = (network.bind(params)(ids, mask, dtype=d) for d in ("float32", "bfloat16"))
  assert narrow.dtype == jnp.bfloat16
  error = np.linalg.norm(narrow.astype(jnp.float32) - wide) / np.linalg.norm(wide)
  assert error < 0.05


def test_widths_that_do_not_divide_are_refused_by_name():
  with pytest.raises(ValueError, match=r"model.text.attention_width=32 .*model.text.heads=5"):
    declare_text(Text(width=32, attention_width=32, heads=5))


def test_frozen_rows_are_unit_local_and_repeatable():
  network, tokenizer = declare_text(SMALL), load_tokenizer(SMALL)
  params = frozen_params(network, SMALL)
  run = network.bind(params)
  ids, mask = tokenizer(["top red circle moving", "top red circle moviny"])
  out = np.asarray(run(ids, mask))
  np.testing.assert_allclose(np.sqrt(np.mean(out[mask == 1] ** 2, -1)), 1, atol=1e-3)
  change = np.linalg.norm(out[0] - out[1], axis=-1) / np.sqrt(SMALL.width)
  assert change[20] > 0.3 and change[:4].max() < 0.1 * change[20]
  again = frozen_params(network, SMALL)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, again))


def test_frozen_parameters_need_a_seed():
  cfg = Text(frozen_seed=-1)
  with pytest.raises(ValueError, match="model.text.frozen_seed=-1 must be >= 0"):
    frozen_params(declare_text(SMALL), cfg)
