"""launch.convert: weights in and out by the command line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.convert.torch_zip import read_torch
from longlive_jax.io.checkpoint import read_config, read_metadata
from longlive_jax.types import PyTree
from tests.launch.tiny import OVERRIDES, TINY, Program


def params_of(folder: Path, **settings: object) -> dict[str, PyTree]:
  """What a pipeline loads."""
  overrides = {**OVERRIDES, **settings, "io.checkpoint": str(folder)}
  return Pipeline.from_config(load_config("configs/tiny.py", overrides)).models.params


def run(program: Program, *arguments: str) -> str:
  """What a conversion that works says."""
  done = program("convert", *arguments)
  assert done.code == 0, done.stderr
  return done.stdout


def assert_same(a: PyTree, b: PyTree) -> None:
  """Equal trees, to the bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype, path
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def test_cast_weights_are_those_of_the_source(program: Program, checkpoint: Path, tmp_path: Path):
  out = tmp_path / "narrow"
  run(program, "cast", f"--source={checkpoint}", "--dtype=bfloat16", f"--out={out}")
  assert read_metadata(out)["dtype"] == "bfloat16"
  assert read_config(out)["io"]["checkpoint"] == ""
  before, after = params_of(checkpoint), params_of(out)
  narrow = after["dit"]["layers"]["ffn"]["up"]["kernel"]
  wide = before["dit"]["layers"]["ffn"]["up"]["kernel"]
  np.testing.assert_array_equal(wide.astype(jnp.bfloat16).astype(jnp.float32), narrow)
  assert not np.array_equal(wide, narrow)
  for name in ("norm_q", "norm_k"):  # vectors stay as they are
    scales = (p["dit"]["layers"]["self_attn"][name]["scale"] for p in (before, after))
    np.testing.assert_array_equal(*scales)


@pytest.fixture
def packed(program: Program, checkpoint: Path, tmp_path: Path) -> Path:
  """The checkpoint in NVFP4."""
  out = tmp_path / "packed"
  run(program, "quantize", f"--source={checkpoint}", "--rule=mse", f"--out={out}")
  return out


NVFP4 = {"quant.linears": "nvfp4", "quant.weights": "mse"}


def test_quantised_weights_are_those_that_loading_the_source_gives(checkpoint: Path, packed: Path):
  before = params_of(checkpoint, **NVFP4)["dit"]
  after = params_of(packed, **NVFP4)["dit"]
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
  ):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_packed = name.endswith(("/codes", "/scales", "/amax"))
    vector = a.ndim < (3 if name.startswith("layers/") else 2)
    expected = a if is_packed or vector else a.astype(jnp.bfloat16).astype(jnp.float32)
    assert b.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(b), err_msg=name)
  assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(after))


def test_quantised_weights_are_not_read_as_something_else(packed: Path):
  for quant, said in (
    ({"quant.weights": "static_6"}, "quant.weights='mse', not 'static_6'"),
    ({"quant.weight_blocks": "16x16"}, "quant.weight_blocks='1x16', not '16x16'"),
    ({"quant.linears": "none"}, "quant.linears='nvfp4', not 'none'"),
  ):
    with pytest.raises(ValueError, match=re.escape(said)):
      params_of(packed, **{**NVFP4, **quant})


def test_quantised_weights_are_not_trained_cast_quantised_merged_or_widened(
  program: Program, packed: Path, tmp_path: Path
):
  source = f"--config.io.checkpoint={packed}"
  flags = [f"--config.{name}={value}" for name, value in NVFP4.items()]
  done = program("train", *TINY, *flags, source, f"--workdir={tmp_path / 'run'}")
  assert done.code == 2 and "are for sampling" in done.stderr
  assert not (tmp_path / "run").exists()
  out = tmp_path / "out"
  for verb, said in (
    (["cast", "--dtype=float32"], "holds NVFP4 weights"),
    (["quantize"], "holds NVFP4 weights already"),
    (["export", "--format=diffusers"], "which only --format=4o6 can hold"),
  ):
    done = program("convert", *verb, f"--source={packed}", f"--out={out}")
    assert done.code == 2 and said in done.stderr
    assert not out.exists()


FILES = {
  "torch": {
    "dit": "model.pt",
    "vae": "Wan2.2_VAE.pth",
    "text": "models_t5_umt5-xxl-enc-bf16.pth",
  },
  "safetensors": {
    "dit": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.2_VAE.safetensors",
    "text": "models_t5_umt5-xxl-enc-bf16.safetensors",
  },
  "diffusers": {"diffusers": ""},
}


def import_flags(form: str, folder: Path) -> list[str]:
  """Flags that import what an export wrote."""
  return [f"--{name}={folder / file}" for name, file in FILES[form].items()]


@pytest.mark.parametrize("form", FILES)
def test_export_import_export_gives_the_same_bytes(
  program: Program, checkpoint: Path, tmp_path: Path, form: str
):
  first, back, again = (tmp_path / name for name in ("first", "back", "again"))
  run(program, "export", f"--source={checkpoint}", f"--format={form}", f"--out={first}")
  run(program, "import", *TINY, *import_flags(form, first), f"--out={back}")
  run(program, "export", f"--source={back}", f"--format={form}", f"--out={again}")
  files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
  assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
  for file in files:
    assert (first / file).read_bytes() == (again / file).read_bytes(), file
  assert_same(params_of(checkpoint), params_of(back))
  sources = read_metadata(back)["sources"]
  assert {source["name"] for source in sources} >= {Path(f).name for f in FILES[form].values()} - {
    ""
  }
  assert all(len(source["sha256"]) == 64 for source in sources)


def test_packed_weights_survive_the_original_form(
  program: Program, packed: Path, checkpoint: Path, tmp_path: Path
):
  first, back, again = (tmp_path / name for name in ("first", "back", "again"))
  run(program, "export", f"--source={packed}", "--format=4o6", f"--out={first}")
  files = {**FILES["torch"], "dit": "model_4o6.pt"}
  flags = [f"--{name}={first / file}" for name, file in files.items()]
  run(program, "import", *TINY, *flags, f"--out={back}")
  run(program, "export", f"--source={back}", "--format=4o6", f"--out={again}")
  assert (first / files["dit"]).read_bytes() == (again / files["dit"]).read_bytes()
  before, after = (params_of(folder, **NVFP4)["dit"]["layers"] for folder in (packed, back))
  assert_same(before["ffn"]["up"]["kernel"], after["ffn"]["up"]["kernel"])
  assert read_config(back)["quant"]["weights"] == "mse"


def test_the_scale_rule_of_packed_weights_is_never_assumed(
  program: Program, packed: Path, tmp_path: Path
):
  first, out = tmp_path / "first", tmp_path / "out"
  run(program, "export", f"--source={packed}", "--format=4o6", f"--out={first}")
  tree = read_torch(first / "model_4o6.pt")
  for quantisation, flags, said in (
    ({}, [], "give --rule"),
    ({"scale_rule": "mse"}, ["--rule=static_6"], "says that its scale rule is 'mse'"),
    ({"scale_rule": "best"}, [], "scale rule='best' must be one of"),
  ):
    write_torch(first / "other.pt", {**tree, "quantization": quantisation})
    arguments = ["import", *TINY, *flags, f"--dit={first / 'other.pt'}", f"--out={out}"]
    done = program("convert", *arguments)
    assert done.code == 2 and said in done.stderr
    assert not out.exists()
  write_torch(first / "other.pt", {**tree, "quantization": {}})
  run(program, *arguments[:1], *TINY, "--rule=mse", *arguments[-2:])
  assert read_config(out)["quant"]["weights"] == "mse"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
  """Adapters of rank 3 as the original saves them."""
  model = load_config("configs/tiny.py", OVERRIDES).model
  sizes = {"ffn.0": (model.width, model.ffn_width), "ffn.2": (model.ffn_width, model.width)}
  for attention in ("self_attn", "cross_attn"):
    sizes |= {f"{attention}.{part}": (model.width, model.width) for part in "qkvo"}
  draw, tensors = np.random.default_rng(0), {}
  for i in range(model.layers):
    for layer, (size_in, size_out) in sizes.items():
      for half, shape in (("A", (3, size_in)), ("B", (size_out, 3))):
        value = draw.normal(size=shape).astype(ml_dtypes.bfloat16)
        tensors[f"base_model.model.blocks.{i}.{layer}.lora_{half}.weight"] = Stored.of(value)
  path = tmp_path / "lora.pt"
  write_torch(path, {"generator_lora": tensors, "critic_lora": dict(tensors), "step": 7})
  return path


def test_adapters_are_merged_once(program: Program, checkpoint: Path, lora: Path, tmp_path: Path):
  adapters, out, back = tmp_path / "adapters", tmp_path / "out", tmp_path / "back"
  run(program, "import", *TINY, f"--lora={lora}", "--alpha=6", f"--out={adapters}")
  assert read_metadata(adapters)["lora"] == {"name": "lora.pt", "rank": 3, "alpha": 6.0}
  merge = ["merge", f"--source={checkpoint}", f"--lora={adapters}"]
  run(program, *merge, f"--out={out}")
  before, after = params_of(checkpoint)["dit"], params_of(out)["dit"]
  halves = read_torch(lora)["generator_lora"]
  for layer in range(2):
    name = f"base_model.model.blocks.{layer}.ffn.0"
    a, b = (halves[f"{name}.lora_{h}.weight"].read().astype(np.float32) for h in "AB")
    expected = before["layers"]["ffn"]["up"]["kernel"][layer] + 2 * (b @ a).T
    np.testing.assert_allclose(after["layers"]["ffn"]["up"]["kernel"][layer], expected, atol=1e-6)
  assert_same(before["text_embed"], after["text_embed"])
  assert read_metadata(out)["adapters"][0]["name"] == "lora.pt"
  done = program("convert", "merge", f"--source={out}", *merge[2:], f"--out={tmp_path / 'twice'}")
  assert done.code == 2 and "merged already (lora.pt)" in done.stderr
  run(program, "export", f"--source={adapters}", "--format=torch", f"--out={back}")
  again = read_torch(back / "lora.pt")
  assert again["alpha"] == 6.0 and set(again["generator_lora"]) == set(halves)
  for name, stored in halves.items():
    np.testing.assert_array_equal(again["generator_lora"][name].read(), stored.read())


def test_adapters_go_into_a_transformer_while_it_is_imported(
  program: Program, checkpoint: Path, lora: Path, tmp_path: Path
):
  first, apart, at_once = (tmp_path / name for name in ("first", "apart", "at_once"))
  run(program, "export", f"--source={checkpoint}", "--format=torch", f"--out={first}")
  run(program, "import", *TINY, f"--lora={lora}", f"--out={tmp_path / 'adapters'}")
  adapters = f"--lora={tmp_path / 'adapters'}"
  run(program, "merge", f"--source={checkpoint}", adapters, f"--out={apart}")
  files = import_flags("torch", first)
  run(program, "import", *TINY, *files, f"--lora={lora}", f"--out={at_once}")
  assert_same(params_of(apart), params_of(at_once))


def test_inspect_tells_what_fits_and_what_does_not(
  program: Program, checkpoint: Path, tmp_path: Path
):
  first = tmp_path / "first"
  run(program, "export", f"--source={checkpoint}", "--format=torch", f"--out={first}")
  tree = read_torch(first / "model.pt")
  inside = tree["generator"]
  inside["model.blocks.0.ffn.O.weight"] = inside.pop("model.blocks.0.ffn.0.weight")
  key = "model.blocks.1.self_attn.q.bias"
  inside[key] = Stored.of(np.zeros(5, np.float32))
  write_torch(first / "odd.pt", tree)
  said = run(program, "inspect", *TINY, f"--source={first / 'odd.pt'}")
  assert "as dit with original names: 67 of 69 fit, 3 problems" in said
  assert "unknown (did you mean 'blocks.0.ffn.0.weight'?)" in said
  assert re.search(r"blocks\.0\.ffn\.0\.weight +\S* *32x24 +0\.00 +missing", said)
  assert re.search(r"blocks\.1\.self_attn\.q\.bias +float32 +5 +0\.00 +must be \[24\]", said)
  assert "model.safetensors" not in said
  whole = run(program, "inspect", *TINY, f"--source={first / 'model.pt'}", "--all")
  assert "69 of 69 fit, 0 problems" in whole
  assert re.search(r"blocks\.1\.ffn\.2\.weight .* -> layers/1/ffn/down/kernel", whole)
  ours = run(program, "inspect", f"--source={checkpoint}")
  assert "dit: 69 tensors (69 float32)" in ours


@pytest.mark.parametrize(
  "arguments, said",
  [
    ([], "say what to do: import, merge"),
    (["imprt"], "did you mean 'import'"),
    (["import"], "nothing to import"),
    (["import", "--dit=/nowhere.pt"], "'/nowhere.pt' does not exist"),
    (["import", "--lora=configs/tiny.py"], "not a file of torch.save"),
    (["import", "--vae_decoder=README.md"], "README.md"),
    (["import", "--diffusers=configs"], "has no transformer, vae, text_encoder folder"),
    (["merge"], "--source is needed"),
    (["merge", "--source=nothing"], "--source=nothing: there is no such file, folder or shipped"),
    (["merge", "--source=configs"], "--source=configs is not a checkpoint; import it first"),
    (["cast", "--source=tiny"], "--dtype is needed"),
    (["quantize", "--source=tiny", "--rule=best"], "rule"),
    (["export", "--source=tiny", "--format=4o6"], "holds no NVFP4 transformer"),
    (["inspect"], "--source is needed"),
    (["inspect", "--source=nothing.pt"], "--source=nothing.pt: there is no such file, folder"),
    (["inspect", "--source=README.md"], "README.md"),
  ],
)
def test_a_wrong_command_is_one_line(
  program: Program, tmp_path: Path, arguments: list[str], said: str
):
  out = tmp_path / "out"
  done = program("convert", *arguments, f"--out={out}")
  assert done.code != 0 and said in done.stderr
  assert done.stderr.strip().count("\n") == 0
  assert not list(tmp_path.iterdir())


def test_a_damaged_tensor_leaves_nothing(program: Program, checkpoint: Path, tmp_path: Path):
  first, out = tmp_path / "first", tmp_path / "out"
  run(program, "export", f"--source={checkpoint}", "--format=torch", f"--out={first}")
  tree = read_torch(first / "model.pt")
  key = "model.blocks.1.ffn.2.weight"
  bad = tree["generator"][key].read().copy()
  bad[3, 4] = np.nan
  write_torch(first / "bad.pt", {"generator": {**tree["generator"], key: Stored.of(bad)}})
  done = program("convert", "import", *TINY, f"--dit={first / 'bad.pt'}", f"--out={out}")
  assert done.code == 2 and "'dit/layers/1/ffn/down/kernel' is not finite" in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_killed_import_goes_on_and_is_never_half_loadable(
  program: Program, checkpoint: Path, tmp_path: Path, root: Path
):
  first, out = tmp_path / "first", tmp_path / "out"
  run(program, "export", f"--source={checkpoint}", "--format=torch", f"--out={first}")
  command = ["-m", "tests.launch.slow_convert", "import", *TINY, *import_flags("torch", first)]
  partial = tmp_path / ".out.unfinished"
  child = subprocess.Popen([sys.executable, *command, f"--out={out}"], cwd=root)
  deadline = time.monotonic() + 120
  while len(list(partial.glob("*/*"))) < 3 and time.monotonic() < deadline:
    assert child.poll() is None
    time.sleep(0.02)
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  assert not out.exists() and not (partial / "config.json").exists()
  kept = {path: path.stat().st_mtime_ns for path in partial.glob("*/000")}
  assert kept
  done = subprocess.run([sys.executable, *command, f"--out={out}"], cwd=root, check=False)
  assert done.returncode == 0 and not partial.exists()
  for path, before in kept.items():
    assert (out / path.relative_to(partial)).stat().st_mtime_ns == before
  assert_same(params_of(checkpoint), params_of(out))


def test_another_source_starts_afresh(program: Program, checkpoint: Path, tmp_path: Path):
  narrow, out = tmp_path / "narrow", tmp_path / "out"
  partial = tmp_path / ".out.unfinished"
  run(program, "cast", f"--source={checkpoint}", "--dtype=bfloat16", f"--out={narrow}")
  shutil.copytree(narrow / "dit", partial / "dit")
  (partial / "plan.json").write_text(json.dumps({"networks": {}}))
  run(program, "cast", f"--source={checkpoint}", "--dtype=float32", f"--out={out}")
  assert_same(params_of(checkpoint), params_of(out))
  assert dataclasses.is_dataclass(load_config(out / "config.json"))
