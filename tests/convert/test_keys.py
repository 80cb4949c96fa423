"""The tables of keys: every parameter is named once in every dialect, at the released sizes."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from longlive_jax.config import Model, Text, Vae
from longlive_jax.convert.dialects import DIALECTS
from longlive_jax.convert.keys_dit import dit_rows
from longlive_jax.convert.keys_lora import lora_rows, lora_shapes
from longlive_jax.convert.keys_text import TWINS, text_rows
from longlive_jax.convert.keys_vae import vae_rows
from longlive_jax.convert.torch_import import Row, leaf_at
from longlive_jax.io.leaves import flat
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.text import declare_text
from longlive_jax.model.vae import declare_vae
from longlive_jax.types import PyTree

STATISTICS = ("latent_mean", "latent_std")  # of the VAE: no tensors of its files
LIGHT = Vae(encoder_width=80, decoder_width=128)
LIGHTER = Vae(encoder_width=40, decoder_width=64)
# name -> declaration, table, configuration, tensors, numbers
NETWORKS = {
  "dit": (declare_dit, dit_rows, Model(), 825, 4_999_787_712),
  "text": (declare_text, text_rows, Text(), 242, 5_680_910_336),
  "vae": (declare_vae, vae_rows, Vae(), 196, 704_688_668),
  "light_vae": (declare_vae, vae_rows, LIGHT, 196, 176_981_772),
  "lighter_vae": (declare_vae, vae_rows, LIGHTER, 196, 44_654_660),
}
TABLES: tuple[tuple[Callable[..., list[Row]], Model | Text | Vae], ...] = (
  (dit_rows, Model()),
  (text_rows, Text()),
  (vae_rows, Vae()),
)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple:
  """Shapes of the parameters, table, configuration, tensors, numbers."""
  declare, *rest = NETWORKS[request.param]
  return declare(rest[1]).abstract, *rest


def numbers(rows: Sequence[Row], abstract: PyTree) -> int:
  """Numbers in the tensors of a table."""
  shapes = [(row, leaf_at(abstract, row.path).shape) for row in rows]
  return sum(math.prod(shape if row.layer is None else shape[1:]) for row, shape in shapes)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_table_has_the_recorded_number_of_tensors_and_numbers(network, dialect):
  abstract, table, cfg, tensors, total = network
  rows = table(cfg, dialect)
  assert len({row.key for row in rows}) == len(rows) == tensors
  assert numbers(rows, abstract) == total


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_parameter_is_named_once_for_each_layer(network, dialect):
  abstract, table, cfg, _, _ = network
  rows = table(cfg, dialect)
  wanted: Counter = Counter()
  for name, leaf in flat(abstract).items():
    stacked = name.startswith("layers/")
    wanted.update((name, i) for i in (range(leaf.shape[0]) if stacked else [None]))
  for name in STATISTICS:
    wanted.pop((name, None), None)
  assert Counter((row.path, row.layer) for row in rows) == wanted


@pytest.mark.parametrize(("table", "cfg"), TABLES)
def test_dialects_differ_in_keys_only(table, cfg):
  ours = [{(row.path, row.layer, row.form) for row in table(cfg, dialect)} for dialect in DIALECTS]
  assert all(each == ours[0] for each in ours)
  keys = [{row.key for row in table(cfg, dialect)} for dialect in DIALECTS]
  assert keys[0] != keys[1] and table(cfg) == table(cfg, "original")


@pytest.mark.parametrize(("table", "cfg"), TABLES)
def test_an_unknown_dialect_is_refused(table, cfg):
  message = r"^dialect='diffuser' must be one of diffusers, original \(did you mean 'diffusers'\?\)"
  with pytest.raises(ValueError, match=message):
    table(cfg, "diffuser")


# The rules of section 5.11: what the original's reader of Light VAE files renames.
PREFIXES = {
  "quant_conv.": "conv1.",
  "post_quant_conv.": "conv2.",
  "conv_in.": "conv1.",
  "norm_out.": "head.0.",
  "conv_out.": "head.2.",
  "mid_block.resnets.0.": "middle.0.",
  "mid_block.attentions.0.": "middle.1.",
  "mid_block.resnets.1.": "middle.2.",
}
for _side, _theirs, _count in (("downsamples", "down", 2), ("upsamples", "up", 3)):
  for _i in range(4):
    _key = f"{_side}.{_i}.{_side}"
    PREFIXES |= {f"{_theirs}_blocks.{_i}.resnets.{j}.": f"{_key}.{j}." for j in range(_count)}
    PREFIXES[f"{_theirs}_blocks.{_i}.{_theirs}sampler."] = f"{_key}.{_count}."
TAILS = {
  "norm1": "residual.0",
  "conv1": "residual.2",
  "norm2": "residual.3",
  "conv2": "residual.6",
  "conv_shortcut": "shortcut",
}


def renamed(key: str) -> str:
  """The original's key of a Light VAE's."""
  side, _, rest = key.partition(".")
  side, rest = (f"{side}.", rest) if side in ("encoder", "decoder") else ("", key)
  prefix = next(p for p in PREFIXES if rest.startswith(p))
  first, _, last = rest.removeprefix(prefix).partition(".")
  tail = f"{TAILS.get(first, first)}.{last}" if last else first
  return f"{side}{PREFIXES[prefix]}{tail}"


def test_the_renamed_keys_of_light_vae_files_are_those_of_diffusers():
  by_place = {(row.path, row.form): row.key for row in vae_rows(LIGHT)}
  for row in vae_rows(LIGHT, "diffusers"):
    assert renamed(row.key) == by_place[row.path, row.form]


def test_the_tied_copy_of_the_embedding_is_no_key_of_the_table():
  keys = {row.key for row in text_rows(Text(), "diffusers")}
  assert not keys & TWINS.keys() and keys >= set(TWINS.values())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_adapters_of_rank_128_have_the_recorded_numbers(dialect):
  rows = lora_rows(Model(), dialect)
  abstract = lora_shapes(Model(), 128)
  assert len({row.key for row in rows}) == len(rows) == 600
  assert numbers(rows, abstract) == 322_437_120
  assert {row.path for row in rows} == set(flat(abstract))


def test_adapters_of_some_layers_have_a_table_of_their_own():
  layers = ("layers/ffn/.*",)
  rows, abstract = lora_rows(Model(), layers=layers), lora_shapes(Model(), 4, layers)
  assert len(rows) == 4 * Model().layers
  assert {row.path for row in rows} == set(flat(abstract))
