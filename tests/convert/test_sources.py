"""Foreign files: containers, prefixes, indices, and what is said of keys that do not fit."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.convert.importing import import_job
from longlive_jax.convert.keys_lora import lora_rows
from longlive_jax.convert.leaves import Leaves
from longlive_jax.convert.networks import form_of, network_leaves
from longlive_jax.convert.packed import padded, tiles_of, unpacked
from longlive_jax.convert.safetensors_file import read_safetensors, write_safetensors
from longlive_jax.convert.sources import open_source
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import Row, foreign_shape, to_foreign, to_ours, transposed
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise
from longlive_jax.quant.qtensor import QTensor
from longlive_jax.quant.rules import RULES
from tests.launch.tiny import OVERRIDES

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def experiment(root: Path) -> Experiment:
  return load_config(root / "configs/tiny.py", {**OVERRIDES, "model.vae.latent_channels": 48})


@pytest.fixture(scope="module")
def tensors(experiment: Experiment) -> dict[str, Stored]:
  """A transformer by its original names."""
  return foreign(experiment, "dit")


def foreign(experiment: Experiment, network: str, dialect: str = "original") -> dict[str, Stored]:
  """Random tensors of a network."""
  form, draw = form_of(experiment, network, dialect), np.random.default_rng(0)
  shapes = {row.key: foreign_shape(row, form.shape(row)) for row in form.rows}
  return {k: Stored.of(draw.normal(size=s).astype(BF16)) for k, s in shapes.items()}


def leaves(experiment: Experiment, path: Path, entry: str = "", network: str = "dit") -> Leaves:
  return network_leaves(experiment, network, open_source(path, entry))[0]


def assert_same(a: Leaves, b: Leaves) -> None:
  assert list(a) == list(b)
  for name, stored in a.items():
    x, y = stored.read(), b[name].read()
    assert x.dtype == y.dtype and x.shape == y.shape == stored.shape, name
    np.testing.assert_array_equal(x, y, err_msg=name)


def prefixed(tensors: dict[str, Stored], prefix: str) -> dict[str, Stored]:
  return {prefix + name: stored for name, stored in tensors.items()}


CONTAINERS = {
  "bare": lambda t: t,
  "generator": lambda t: {"generator": prefixed(t, "model."), "step": 5},
  "model": lambda t: {"model": prefixed(t, "model.")},
  "bare with prefix": lambda t: prefixed(t, "model."),
  "nested": lambda t: {"state_dict": {"generator": prefixed(t, "model.")}},
  "wrapped": lambda t: {
    "generator": {
      f"model._fsdp_wrapped_module.{n.replace('blocks.', 'blocks._checkpoint_wrapped_module.')}": s
      for n, s in t.items()
    }
  },
  "compiled": lambda t: {"generator": prefixed(t, "_orig_mod.model.")},
  "beside an optimiser": lambda t: {
    "generator": prefixed(t, "model."),
    "critic": {"model.x": Stored.of(np.zeros(3))},
    "generator_optimizer": {"state": {0: {"exp_avg": Stored.of(np.zeros(2))}}, "lr": 1e-4},
  },
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_same_weights_in_any_container(kind, experiment, tensors, tmp_path):
  write_torch(tmp_path / "bare.pt", tensors)
  tree = CONTAINERS[kind](tensors)
  if "generator_optimizer" in tree:  # the writer takes texts as keys
    tree["generator_optimizer"] = {"state": {"0": tree["generator_optimizer"]["state"][0]}}
  write_torch(tmp_path / "x.pt", tree)
  assert_same(leaves(experiment, tmp_path / "bare.pt"), leaves(experiment, tmp_path / "x.pt"))


def test_an_entry_is_chosen_by_name(experiment, tensors, tmp_path):
  other = {k: Stored.of(s.read() + BF16.type(1)) for k, s in tensors.items()}
  write_torch(tmp_path / "x.pt", {"generator": tensors, "generator_ema": other, "critic": other})
  plain = leaves(experiment, tmp_path / "x.pt")
  for entry in ("generator_ema", "critic"):
    chosen = leaves(experiment, tmp_path / "x.pt", entry)
    name = "layers/1/ffn/up/kernel"
    np.testing.assert_array_equal(chosen[name].read(), plain[name].read() + BF16.type(1))
  with pytest.raises(ValueError, match="no entry 'ema'; there are: generator, generator_ema"):
    open_source(tmp_path / "x.pt", "ema")


def test_files_that_hold_no_network(tmp_path):
  for tree, said in (
    ({"step": 3}, "holds no tensors"),
    ({"a": {"b": {"c": {"d": Stored.of(np.zeros(2))}}}}, "choose one of its entries: a"),
    ([1, 2], "holds a list; it must be a dictionary"),
    ({"checkpoint_format": "longlive_generator_te_nvfp4"}, "Transformer Engine modules"),
    (
      {"model.a": Stored.of(np.zeros(2)), "a": Stored.of(np.zeros(2))},
      "two tensors that mean 'a'",
    ),
  ):
    write_torch(tmp_path / "x.pt", tree)
    with pytest.raises(ValueError, match=said):
      open_source(tmp_path / "x.pt")


KEY = "blocks.1.ffn.0.weight"


@pytest.mark.parametrize(
  "change, said",
  [
    (lambda t: t.pop(KEY), f"missing tensor '{KEY}'"),
    (lambda t: t.update({"blocks.1.ffn.7.weight": t.pop(KEY)}), "mean 'blocks.1.ffn.7.weight'"),
    (lambda t: t.update({"blocks.1.fnn.0.weight": t[KEY]}), "unknown tensor 'blocks.1.fnn.0.w"),
    (lambda t: t.update({"blocks.1.fnn.0.weight": t[KEY]}), f"did you mean '{KEY}'"),
    (lambda t: t.update({KEY: Stored.of(np.zeros((5, 6)))}), f"'{KEY}' has shape (5, 6)"),
    (lambda t: t.update({KEY: Stored.of(t[KEY].read().T.copy())}), "(it looks transposed)"),
    (lambda t: t.update({"blocks.2.modulation": t["head.modulation"]}), "'blocks.2.modulation'"),
  ],
)
def test_a_key_that_does_not_fit_is_named(change, said, experiment, tensors, tmp_path):
  changed = dict(tensors)
  change(changed)
  write_torch(tmp_path / "x.pt", {"generator": prefixed(changed, "model.")})
  with pytest.raises(ValueError) as caught:
    leaves(experiment, tmp_path / "x.pt")
  assert said in str(caught.value) and str(tmp_path / "x.pt") in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", ["dit", "vae", "text"])
@pytest.mark.parametrize("dialect", ["original", "diffusers"])
def test_safetensors_in_shards(network, dialect, experiment, tmp_path):
  tensors = foreign(experiment, network, dialect)
  write_safetensors(tmp_path, "whole", tensors)
  shards = tmp_path / "shards"
  shards.mkdir()
  files = write_safetensors(shards, "model", tensors, shard_bytes=2**12)
  assert len(files) > 2
  whole = leaves(experiment, tmp_path / "whole.safetensors", network=network)
  for path in (shards, files[-1]):
    assert_same(whole, leaves(experiment, path, network=network))
  source = open_source(shards)
  assert {path.name for path in source.files} == {path.name for path in files}


def test_an_index_that_lies_is_refused(experiment, tensors, tmp_path):
  files = write_safetensors(tmp_path, "model", tensors, shard_bytes=2**14)
  index = json.loads(files[-1].read_text())

  def refused(change, said: str, error: type = ValueError) -> None:
    other = json.loads(json.dumps(index))
    change(other)
    files[-1].write_text(json.dumps(other))
    with pytest.raises(error, match=said):
      read_safetensors(tmp_path)

  first = next(iter(index["weight_map"]))
  refused(lambda i: i["weight_map"].pop(first), f"does not say that '{first}' is in")
  refused(lambda i: i["weight_map"].update({first: "../x.safetensors"}), "no file beside it")
  refused(lambda i: i["weight_map"].update(new=files[0].name), "'new' is in .*, where it is not")
  refused(
    lambda i: i["weight_map"].update(new="gone.safetensors"), "does not exist", FileNotFoundError
  )
  refused(lambda i: i.pop("weight_map"), "no weight_map")
  files[-1].write_text("[" * 100_000)
  with pytest.raises(ValueError, match="is damaged"):
    read_safetensors(tmp_path)


def test_safetensors_that_are_damaged_or_ambiguous(tmp_path):
  good = {"a": np.ones((3, 4), np.float32)}
  save_file(good, tmp_path / "a.safetensors")
  whole = (tmp_path / "a.safetensors").read_bytes()
  for cut in (0, 4, 20, len(whole) - 5):
    (tmp_path / "a.safetensors").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
      read_safetensors(tmp_path)
  (tmp_path / "b.safetensors").write_bytes(whole)
  with pytest.raises(ValueError, match="holds 2 candidates"):
    read_safetensors(tmp_path)
  header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
  (tmp_path / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
  with pytest.raises(ValueError, match="'a' has dtype F8_E4M3, which is not read"):
    read_safetensors(tmp_path / "c.safetensors")
  with pytest.raises(FileNotFoundError, match="holds no .safetensors"):
    (tmp_path / "empty").mkdir()
    read_safetensors(tmp_path / "empty")


def test_a_light_vae_gives_its_decoder_beside_the_full_encoder(experiment, tmp_path):
  vae = dataclasses.replace(experiment.model.vae, decoder_width=8)
  light = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vae=vae))
  full, narrow = foreign(experiment, "vae"), foreign(light, "vae", "diffusers")
  only = {n: s for n, s in narrow.items() if n.startswith(("decoder.", "post_quant_conv."))}
  only["dynamic_feature_projection_heads.0.weight"] = Stored.of(np.zeros(3, np.float32))
  write_torch(tmp_path / "full.pth", full)
  write_torch(tmp_path / "light.pth", {"gen_model": only})
  sources = {
    "vae": open_source(tmp_path / "full.pth"),
    "vae_decoder": open_source(tmp_path / "light.pth"),
  }
  assert sources["vae_decoder"].dropped == ("dynamic_feature_projection_heads.0.weight",)
  made = import_job(light, sources).networks["vae"]
  np.testing.assert_array_equal(
    made["encoder/head/conv/bias"].read(), full["encoder.head.2.bias"].read()
  )
  np.testing.assert_array_equal(
    made["decoder/head/conv/bias"].read(), narrow["decoder.conv_out.bias"].read()
  )
  assert made["latent_mean"].shape == (48,)
  with pytest.raises(ValueError, match="missing tensor 'encoder"):
    import_job(light, {"vae": sources["vae_decoder"]})


def test_adapters_of_two_ranks_are_refused(experiment, tmp_path):
  tensors = {}
  for row in lora_rows(experiment.model):
    rank = 4 if "blocks.1" in row.key else 2
    size = 32 if (".ffn.0.lora_B" in row.key or ".ffn.2.lora_A" in row.key) else 24
    shape = (rank, size) if "lora_A" in row.key else (size, rank)
    tensors[f"base_model.model.{row.key}"] = Stored.of(np.zeros(shape, np.float32))
  write_torch(tmp_path / "lora.pt", {"generator_lora": tensors})
  with pytest.raises(ValueError, match="one rank; found: 2, 4"):
    import_job(experiment, {"lora": open_source(tmp_path / "lora.pt")})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(128, 64), (40, 48), (24, 40)])
@pytest.mark.parametrize("blocks", ["1x16", "16x16"])
def test_packed_layers_dequantise_as_they_were_packed(rule, shape, blocks):
  """`shape` is [out, in]; tiles are filled up to 128 x 64."""
  rows, columns = shape
  weight = np.random.default_rng(1).normal(size=shape).astype(BF16)
  q = quantise(jax.numpy.asarray(weight), Spec(rule, two_d=blocks == "16x16", exact=True))
  parts = {n: Stored.of(np.asarray(getattr(q, n))) for n in ("codes", "scales", "amax")}
  packed = tiles_of("P", parts, (columns, rows), rule, blocks)
  tall, wide = padded(rows, columns)
  assert packed["P.quantized_weight_values"].shape == (tall, wide // 2)
  assert packed["P.quantized_weight_metadata"].read().tolist() == [rows, columns, tall, wide]
  named = {name.removeprefix("P."): stored for name, stored in packed.items()}
  back = unpacked("P", "p/kernel", named, (columns, rows), rule, blocks)
  read = {n: jax.numpy.asarray(back[f"p/kernel/{n}"].read()) for n in ("codes", "scales", "amax")}
  assert all(read[n].shape == getattr(q, n).shape for n in read)
  again = QTensor(**read, rule=rule, blocks=blocks, padding=q.padding)
  np.testing.assert_array_equal(
    np.asarray(dequantise(again, jax.numpy.float32, exact=True)),
    np.asarray(dequantise(q, jax.numpy.float32, exact=True)),
  )
  for change, said in (
    ({"quantized_weight_values": None}, "missing tensor 'P.quantized_weight_values'"),
    ({"quantized_weight_amax": Stored.of(np.zeros(2, np.float32))}, r"has shape \(2,\)"),
    ({"quantized_weight_amax": Stored.of(np.zeros(1, BF16))}, "they must be uint8"),
    ({"quantized_weight_metadata": Stored.of(np.zeros(4, np.int32))}, r"is \[0, 0, 0, 0\]"),
  ):
    with pytest.raises(ValueError, match=said):
      unpacked("P", "p/kernel", {**named, **change}, (columns, rows), rule)
  scalar = {**named, "quantized_weight_amax": Stored.of(np.asarray(q.amax))}
  del scalar["quantized_weight_metadata"]
  assert unpacked("P", "p/kernel", scalar, (columns, rows), rule)["p/kernel/amax"].shape == ()


def test_scales_that_differ_within_square_blocks_are_refused():
  q = quantise(jax.random.normal(jax.random.key(0), (128, 64)), Spec(exact=True))  # blocks of 1x16
  parts = {n: Stored.of(np.asarray(getattr(q, n))) for n in ("codes", "scales", "amax")}
  packed = tiles_of("P", parts, (64, 128), "mse")
  named = {name.removeprefix("P."): stored for name, stored in packed.items()}
  leaf = unpacked("P", "p/kernel", named, (64, 128), "mse", "16x16")["p/kernel/codes"]
  with pytest.raises(ValueError, match=r"'P.*scale_factors': scales differ within blocks of 16x16"):
    leaf.read()


@pytest.mark.parametrize(
  "row, foreign",
  [
    (Row("k", "p", "same"), (3, 4)),
    (Row("k", "p", "linear"), (3, 4)),
    (Row("k", "p", "conv2d"), (5, 4, 3, 2)),
    (Row("k", "p", "conv3d"), (6, 5, 4, 3, 2)),
    (Row("k", "p", "flat", tail=(1, 1, 1)), (7, 1, 1, 1)),
    (Row("k", "p", "squeeze"), (1, 6, 4)),
    (Row("k", "p", "patch", tail=(-1, 1, 2, 2)), (8, 3, 1, 2, 2)),
  ],
)
def test_forms_lead_there_and_back(row, foreign):
  tensor = np.arange(np.prod(foreign), dtype=np.float32).reshape(foreign)
  ours = to_ours(row, tensor)
  assert foreign_shape(row, ours.shape) == foreign
  np.testing.assert_array_equal(to_foreign(row, ours), tensor)


@pytest.mark.parametrize("dtype", [np.uint8, BF16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 8), (7, 16), (600, 264), (33, 5), (513, 64), (3, 0)])
def test_a_matrix_is_transposed(dtype, shape):
  matrix = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
  turned = transposed(matrix)
  assert turned.flags.c_contiguous and turned.dtype == matrix.dtype
  np.testing.assert_array_equal(turned, matrix.T)
