"""launch.convert: what it once did silently, or with a traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.config.load import load_config
from longlive_jax.convert.leaves import checkpoint_leaves
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.convert.torch_zip import read_torch
from longlive_jax.io.checkpoint import read_config, read_metadata
from tests.launch.tiny import OVERRIDES, SIZES, TINY, Program


def refused(program: Program, said: str, *arguments: str) -> None:
  """Fails unless a conversion is refused in one line."""
  done = program("convert", *arguments)
  assert done.code == 2 and said in done.stderr, done.stderr
  assert done.stderr.strip().count("\n") == 0


@pytest.fixture
def files(program: Program, checkpoint: Path, tmp_path: Path) -> Path:
  """The checkpoint as files of torch."""
  out = tmp_path / "files"
  done = program("convert", "export", f"--source={checkpoint}", "--format=torch", f"--out={out}")
  assert done.code == 0, done.stderr
  return out


def test_an_existing_checkpoint_is_not_replaced_unasked(
  program: Program, checkpoint: Path, files: Path, tmp_path: Path
):
  out = tmp_path / "out"
  shutil.copytree(checkpoint, out)
  command = ["import", *TINY, f"--dit={files / 'model.pt'}", f"--out={out}"]
  refused(program, "is a checkpoint already; --overwrite replaces it", *command)
  assert (out / "vae").is_dir()
  assert program("convert", *command, "--overwrite", f"--rest={checkpoint}").code == 0
  assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["dit", "text", "vae"]


@pytest.mark.parametrize("out", ["{}", "{}/new", "{}/.."])
def test_a_checkpoint_is_not_written_over_its_source(
  program: Program, checkpoint: Path, tmp_path: Path, out: str
):
  source = tmp_path / "a" / "source"
  shutil.copytree(checkpoint, source)
  before = sorted(source.rglob("*"))
  arguments = ["cast", f"--source={source}", "--dtype=bfloat16", f"--out={out.format(source)}"]
  refused(program, "are in each other", *arguments, "--overwrite")
  assert sorted(source.rglob("*")) == before


def test_a_killed_conversion_does_not_go_on_with_another_source(
  checkpoint: Path, tmp_path: Path, root: Path
):
  """Of two checkpoints with equal shapes the result held leaves of both."""
  one, two, out = (tmp_path / name for name in ("one", "two", "out"))
  for folder in (one, two):
    shutil.copytree(checkpoint, folder)
  command = [sys.executable, "-m", "tests.launch.slow_convert", "cast", "--dtype=bfloat16"]
  child = subprocess.Popen([*command, f"--source={one}", f"--out={out}"], cwd=root)
  partial, deadline = tmp_path / ".out.unfinished", time.monotonic() + 120
  while len(list(partial.glob("*/*"))) < 3 and time.monotonic() < deadline:
    assert child.poll() is None
    time.sleep(0.02)
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  kept = {path: path.stat().st_mtime_ns for path in partial.glob("*/000")}
  assert kept
  done = subprocess.run([*command, f"--source={two}", f"--out={out}"], cwd=root, check=False)
  assert done.returncode == 0
  for path, before in kept.items():
    assert (out / path.relative_to(partial)).stat().st_mtime_ns != before


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["quantize", "--config=configs/tiny.py"], "--config=configs/tiny.py means nothing to quant"),
    (["quantize", "--alpha=3"], "--alpha means nothing to quantize"),
    (["cast", "--dtype=float32", "--rule=mse"], "--rule means nothing to cast"),
    (["merge", "--lora=tiny", "--dtype=float32"], "--dtype means nothing to merge"),
    (["merge", "--lora=tiny"], "holds no adapters"),
  ],
)
def test_a_flag_that_means_nothing_is_refused(program: Program, tmp_path: Path, arguments, said):
  refused(program, said, *arguments, "--source=tiny", f"--out={tmp_path / 'out'}")
  assert not list(tmp_path.iterdir())


def test_import_refuses_flags_without_their_file(program: Program, files: Path, tmp_path: Path):
  out = f"--out={tmp_path / 'out'}"
  vae = f"--vae={files / 'Wan2.2_VAE.pth'}"
  dit = f"--dit={files / 'model.pt'}"
  refused(program, "--entry chooses among", "import", *TINY, vae, "--entry=generator", out)
  refused(program, "--alpha means nothing without --lora", "import", *TINY, dit, "--alpha=2", out)
  refused(program, "no weights are packed", "import", *TINY, dit, "--rule=mse", out)
  refused(program, "it looks like a vae", "import", *TINY, f"--dit={vae[6:]}", out)
  refused(program, "it looks like a dit", "import", *TINY, f"--vae={dit[6:]}", out)
  assert not (tmp_path / "out").exists()


def test_weights_that_are_integers_are_refused(program: Program, files: Path, tmp_path: Path):
  tree = read_torch(files / "model.pt")
  inside = {k: Stored.of(v.read().astype(np.int8)) for k, v in tree["generator"].items()}
  write_torch(files / "int8.pt", {"generator": inside})
  arguments = ["import", *TINY, f"--dit={files / 'int8.pt'}", f"--out={tmp_path / 'out'}"]
  refused(program, "has dtype int8; it must be floating", *arguments)


def lora_file(path: Path, layers: int, **notes: object) -> Path:
  """Adapters of rank 2."""
  model = load_config("configs/tiny.py", OVERRIDES).model
  tensors = {}
  sizes = {f"{a}_attn.{p}": (24, 24) for a in ("self", "cross") for p in "qkvo"}
  sizes |= {"ffn.0": (24, model.ffn_width), "ffn.2": (model.ffn_width, 24)}
  for i in range(layers):
    for name, (size_in, size_out) in sizes.items():
      key = f"base_model.model.blocks.{i}.{name}.lora"
      tensors[f"{key}_A.weight"] = Stored.of(np.ones((2, size_in), np.float32))
      tensors[f"{key}_B.weight"] = Stored.of(np.ones((size_out, 2), np.float32))
  write_torch(path, {"generator_lora": tensors, **notes})
  return path


def test_adapters_of_fewer_layers_are_not_merged(
  program: Program, checkpoint: Path, tmp_path: Path
):
  adapters, out = tmp_path / "adapters", f"--out={tmp_path / 'out'}"
  file = lora_file(tmp_path / "lora.pt", 1)
  arguments = [*TINY, "--config.model.layers=1", f"--lora={file}", f"--out={adapters}"]
  assert program("convert", "import", *arguments).code == 0
  refused(
    program,
    "the adapters lack 'layers/1/",
    *("merge", f"--source={checkpoint}", f"--lora={adapters}", out),
  )


@pytest.mark.parametrize(
  "notes, flags, said",
  [
    ({"alpha": -4.0}, [], "must be finite and more than 0"),
    ({"alpha": float("nan")}, [], "must be finite"),
    ({"alpha": True}, [], "must be a number"),
    ({"alpha": "six"}, [], "must be a number"),
    ({"alpha": [1, 2]}, [], "must be a number"),
    ({"rank": 64}, [], "says rank 64, but its tensors have rank 2"),
    ({"alpha": 4.0}, ["--alpha=5"], "says 4"),
    ({}, ["--alpha=inf"], "must be finite"),
  ],
)
def test_a_strange_alpha_or_rank_is_refused(program: Program, tmp_path: Path, notes, flags, said):
  file = lora_file(tmp_path / "lora.pt", 2, **notes)
  out = tmp_path / "out"
  refused(program, said, "import", *TINY, *flags, f"--lora={file}", f"--out={out}")
  assert [path.name for path in tmp_path.iterdir()] == ["lora.pt"]


def test_a_checkpoint_that_contradicts_itself_is_not_converted(
  program: Program, checkpoint: Path, tmp_path: Path
):
  def broken(name: str, change) -> Path:
    folder = tmp_path / name
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder

  def width(folder: Path) -> None:
    config = read_config(folder)
    config["model"]["width"] = 48
    (folder / "config.json").write_text(json.dumps(config))

  def metadata(value: object):
    def change(folder: Path) -> None:
      text = value if isinstance(value, str) else json.dumps(value)
      (folder / "metadata.json").write_text(text)

    return change

  def empty(folder: Path) -> None:
    for name in ("dit", "vae", "text"):
      shutil.rmtree(folder / name)

  cases = {
    "width": (width, "has shape"),
    "stray": (lambda f: (f / ".git").mkdir(), "holds '.git', which is no network"),
    "empty": (empty, "holds no weights"),
    "packed": (metadata({"dtype": "nvfp4"}), "but config.json has quant.linears=none"),
    "deep": (metadata("[" * 100_000), "is damaged"),
    "group": (lambda f: shutil.rmtree(f / "dit" / "000"), "the checkpoint lacks 'dit/"),
  }
  for name, (change, said) in cases.items():
    folder = broken(name, change)
    arguments = [f"--source={folder}", "--dtype=bfloat16", f"--out={tmp_path / 'out'}"]
    refused(program, said, "cast", *arguments)
    assert not (tmp_path / "out").exists()
  odd = broken("odd", metadata({"adapters": "abc", "sources": [1, {}]}))
  assert program("convert", "inspect", f"--source={odd}").code == 0


def test_what_has_the_hidden_name_is_not_touched(program: Program, tmp_path: Path):
  """A link of that name led to a folder whose files were removed."""
  precious = tmp_path / "precious"
  precious.mkdir()
  (precious / "file").touch()
  (tmp_path / ".out.unfinished").symlink_to(precious)
  arguments = ["--source=tiny", "--dtype=float32", f"--out={tmp_path / 'out'}"]
  refused(program, "is in the way", "cast", *arguments)
  (tmp_path / ".out.unfinished").unlink()
  shutil.copytree(precious, tmp_path / ".out.unfinished")
  refused(program, "is in the way", "cast", *arguments)
  assert (precious / "file").is_file() and (tmp_path / ".out.unfinished" / "file").is_file()


def test_a_place_that_is_no_folder_is_refused_before_the_work(program: Program, tmp_path: Path):
  os.mkfifo(tmp_path / "fifo")
  refused(
    program,
    "it is a file; give the name of a folder",
    *("cast", "--source=tiny", "--dtype=float32", f"--out={tmp_path / 'fifo'}"),
  )
  refused(program, "is neither a regular file", "inspect", f"--source={tmp_path / 'fifo'}")
  refused(program, "holds no weights", "inspect", f"--source={tmp_path}")


def test_parents_made_for_a_failed_conversion_go_again(
  program: Program, files: Path, tmp_path: Path
):
  tree = read_torch(files / "model.pt")
  key = next(iter(tree["generator"]))
  bad = tree["generator"][key].read() * np.float32(np.inf)
  write_torch(files / "bad.pt", {"generator": {**tree["generator"], key: Stored.of(bad)}})
  out = tmp_path / "a" / "b" / "out"
  refused(program, "not finite", "import", *TINY, f"--dit={files / 'bad.pt'}", f"--out={out}")
  assert not (tmp_path / "a").exists()


def test_square_blocks_survive_the_original_form(
  program: Program, checkpoint: Path, tmp_path: Path
):
  packed, first, back = (tmp_path / name for name in ("packed", "first", "back"))
  for arguments in (
    ["quantize", f"--source={checkpoint}", "--blocks=16x16", f"--out={packed}"],
    ["export", f"--source={packed}", "--format=4o6", f"--out={first}"],
    ["import", *TINY, f"--dit={first / 'model_4o6.pt'}", f"--out={back}"],
  ):
    done = program("convert", *arguments)
    assert done.code == 0, done.stderr
  assert read_config(back)["quant"]["weight_blocks"] == "16x16"
  assert read_metadata(back)["dtype"] == "nvfp4"
  a, b = (checkpoint_leaves(folder / "dit") for folder in (packed, back))
  for name in a:
    if name.endswith(("/codes", "/scales", "/amax")):
      np.testing.assert_array_equal(a[name].read(), b[name].read(), err_msg=name)


def test_absurd_sizes_are_refused_at_once(program: Program, files: Path, tmp_path: Path):
  arguments = ["import", "--config=configs/tiny.py", *SIZES, "--config.model.layers=1000000000"]
  started = time.monotonic()
  refused(
    program,
    "model.layers=1000000000 must be at most 1000",
    *(*arguments, f"--dit={files / 'model.pt'}", f"--out={tmp_path / 'out'}"),
  )
  assert time.monotonic() - started < 20


def test_exported_files_have_the_rights_of_new_files(program: Program, tmp_path: Path):
  out = tmp_path / "out"
  done = program("convert", "export", "--source=tiny", "--format=safetensors", f"--out={out}")
  assert done.code == 0, done.stderr
  (tmp_path / "new").touch()
  modes = {path.stat().st_mode for path in out.iterdir()}
  assert modes == {(tmp_path / "new").stat().st_mode}
  said = program("convert", "inspect", *TINY[:1], f"--source={out}").stdout
  assert len(re.findall(r"as (?:dit|vae|text) with original names", said)) == 3


def test_a_transformer_from_elsewhere_keeps_what_it_was_made_of(
  program: Program, checkpoint: Path, files: Path, tmp_path: Path
):
  """Its adapters were forgotten, so they could be merged a second time."""
  source, out = tmp_path / "source", tmp_path / "out"
  shutil.copytree(checkpoint, source)
  (source / "metadata.json").write_text(
    json.dumps({"adapters": [{"name": "l.pt"}], "steps": 5, "sources": [{"name": "x"}]})
  )
  vae = f"--vae={files / 'Wan2.2_VAE.pth'}"
  arguments = ["import", *TINY, vae, f"--rest={source}", f"--out={out}"]
  done = program("convert", *arguments)
  assert done.code == 0, done.stderr
  made = read_metadata(out)
  assert made["adapters"] == [{"name": "l.pt"}] and made["steps"] == 5
  assert [each["name"] for each in made["sources"]] == ["x", "Wan2.2_VAE.pth"]
  other = [*arguments[:-1], "--config.model.frequency_width=16", f"--out={tmp_path / 'other'}"]
  refused(program, "has a dit of another configuration", *other)
