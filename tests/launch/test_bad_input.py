"""What a user may get wrong: one line on stderr that names it, an exit code, and nothing made."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from longlive_jax.build import declare_networks
from longlive_jax.config.load import load_config
from longlive_jax.io.checkpoint import load_params, read_config, save_params
from longlive_jax.io.video import write_video
from tests.launch.tiny import TINY, Outcome, Program


def assert_refused(done: Outcome, line: str, code: int = 2) -> None:
  assert line in done.stderr, done.stderr
  assert done.code == code
  assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
  assert "Traceback" not in done.stdout + done.stderr


def contents(folder: Path) -> list[str]:
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path) -> Path:
  """A folder with inputs that are right, and an `out` that is empty."""
  (tmp_path / "out").mkdir()
  write_script(tmp_path)
  Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
  return tmp_path


def write_script(folder: Path, **changes: object) -> None:
  """A script whose first shot has these fields changed."""
  shots = [{"prompt": "one red circle, over snow", "blocks": 2} | changes]
  (folder / "script.json").write_text(json.dumps({"shots": shots}))


@pytest.fixture
def refused(sample, here) -> Callable[..., None]:
  """Checks that `launch.sample` refuses, before it builds a network unless `late`."""

  def check(line: str, *arguments: str, late: bool = False) -> None:
    before = contents(here)
    defaults = (f"--script={here / 'script.json'}", f"--out={here / 'out' / 'video.mp4'}")
    done = sample(*defaults, *arguments)
    assert_refused(done, line)
    assert ("attention: jnp" in done.stdout) == late
    assert contents(here) == before

  return check


SETTINGS = {
  "--config.video.height=100": "video.height=100 must be a positive multiple of 16 * model.patch",
  "--config.video.width=16": "video.width=16 must be a positive multiple of 16 * model.patch=32",
  "--config.model.heads=5": "model.width=24 must be a positive multiple of model.heads=5",
  "--config.model.heads=8": "model.width=24 / model.heads=8 gives heads of 3 channels",
  "--config.model.frequency_width=7": "model.frequency_width=7 must be",
  "--config.sample.window_latents=4": "sample.window_latents=4 must hold the sink",
  "--config.sample.sink_latents=3": "sample.sink_latents=3 must be",
  "--config.sample.steps=0": "sample.steps=0 must be at least 1",
  "--config.sample.seed=-1": "sample.seed=-1 must be at least 0",
  "--config.sample.solver=unipcc": "did you mean 'unipc'?",
  "--config.io.adapters=none": "io.adapters='none' is neither",
  "--config.sample.windw_latents=8": "did you mean 'sample.window_latents'?",
  "--config.quant.kernels=onn": "quant.kernels='onn' must be one of auto, off, on",
  "--config.model.attention=cudnn": "model.attention=cudnn needs a GPU",
  "--config=configs/tiny.py:i2w": "did you mean 'i2v'?",
  "--config=configs/tinny.py": "did you mean 'configs/tiny.py'?",
  "--outt=x.mp4": "flag 'outt'. Did you mean: out",
  "--script=": "--script is needed",
}


@pytest.mark.parametrize("argument", SETTINGS)
def test_settings(refused, argument):
  refused(SETTINGS[argument], argument)


SCRIPTS = {
  "empty.json": ("", "not JSON"),
  "no_shots.json": ('{"shots": []}', "the script is empty"),
  "empty.txt": ("# nothing\n\n", "the script is empty"),
  "line.json": ('{"shots": [\n  {"prompt": "a"},\n  {"prompt" "b"}\n]}', "(line 3, column 13)"),
  "field.json": ('{"shots": [{"promt": "a"}]}', "shots[0] has an unknown field 'promt' (did you"),
  "top.json": ('{"shot": []}', "unknown field 'shot' (did you mean 'shots'?)"),
  "transition.json": (
    '{"shots": [{"prompt": "a"}, {"prompt": "b", "transition": "cutt"}]}',
    "shots[1]: transition='cutt' must be one of cut, keep, recache (did you mean 'cut'?)",
  ),
  "blocks.json": ('{"shots": [{"prompt": "a", "blocks": -2}]}', "shots[0]: blocks=-2 must be"),
  "prompt.json": ('{"shots": [{"prompt": " "}]}', "shots[0]: prompt=' ' must be text"),
  "seed.json": ('{"seed": -1, "shots": [{"prompt": "a"}]}', "seed=-1 must be a whole number"),
  "list.json": ("[]", "the script must be a JSON object with the fields shots"),
  "script.yaml": ("shots:", "must end in .json or .txt"),
  "long.json": ('{"shots": [{"prompt": "a", "blocks": 10000000}]}', "blocks=10000000 must be at m"),
  "hours.json": (
    '{"shots": [{"prompt": "a", "seconds": 1e300}]}',
    "seconds=1e+300 must be at most",
  ),
  "deep.json": ("[" * 100_000, "nested too deeply"),
  "bytes.txt": ("\udcff", "script file"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(refused, here, name):
  text, line = SCRIPTS[name]
  (here / name).write_bytes(text.encode("utf-8", "surrogateescape"))
  refused(line, f"--script={here / name}")
  refused(f"'{here / name}'", f"--script={here / name}")


def test_a_script_that_is_missing(refused, here):
  refused(f"script file '{here / 'none.json'}' does not exist", f"--script={here / 'none.json'}")


def test_a_prompt_that_is_too_long_names_how_many_tokens_fit(refused, here):
  write_script(here, prompt="a red circle " * 20)
  tokens = len("a red circle " * 20) - 1 + 1  # bytes, but for the last blank; and the end token
  line = f"has {tokens} tokens (end token included); model.text.length=112 is the most"
  refused(line, "--config.model.text.length=112", late=True)


def test_images(refused, here):
  refused(f"'{here / 'none.png'}' does not exist", f"--image={here / 'none.png'}")
  (here / "text.png").write_text("not an image")
  refused(f"image '{here / 'text.png'}' cannot be read", f"--image={here / 'text.png'}")
  data = (here / "image.png").read_bytes()
  (here / "half.png").write_bytes(data[: len(data) // 2])
  refused(f"image '{here / 'half.png'}' cannot be read", f"--image={here / 'half.png'}")


def test_videos_to_extend(refused, here):
  refused(f"'{here / 'none.mp4'}' does not exist", f"--extend={here / 'none.mp4'}")
  (here / "text.mp4").write_text("not a video")
  refused(f"video '{here / 'text.mp4'}' cannot be read", f"--extend={here / 'text.mp4'}")
  write_video(here / "short.mp4", [np.zeros((3, 32, 32, 3), np.uint8)], 24)
  refused("has 3 frames; it must have at least 5", f"--extend={here / 'short.mp4'}", late=True)
  image = f"--image={here / 'image.png'}"
  refused("are both given", f"--extend={here / 'short.mp4'}", image)
  (here / "script.json").write_text('{"image": "image.png", "shots": [{"prompt": "a"}]}')
  refused("are both given", f"--extend={here / 'short.mp4'}")


def test_outputs(refused, here):
  refused("the suffix must be .mp4, .gif, .png or a folder", f"--out={here / 'video.avi'}")
  refused("put a number into the name", f"--out={here / 'video.png'}")
  (here / "folder.mp4").mkdir()
  refused("it is a folder", f"--out={here / 'folder.mp4'}")
  (here / "plain").write_text("a file")
  refused("it is a file, not a folder", f"--out={here / 'plain'}")
  refused(f"'{here / 'plain'}' is not a folder", f"--out={here / 'plain' / 'video.mp4'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_folder_that_is_not_writable(refused, here):
  (here / "locked").mkdir(mode=0o500)
  refused("is not writable", f"--out={here / 'locked' / 'new' / 'video.mp4'}")


def test_an_output_where_access_is_denied(refused, here, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  refused(f"the folder '{here / 'out'}' is not writable", f"--out={here / 'out' / 'a' / 'v.mp4'}")


def test_checkpoints(refused, here, checkpoint):
  refused("io.checkpoint='none' is neither", "--config.io.checkpoint=none")
  refused("io.checkpoint=", f"--config.io.checkpoint={here / 'out'}")
  larger = "'dit/head/modulation' has shape (2, 24) in the checkpoint but (2, 48)"
  refused(larger, "--config.model.width=48", late=True)
  refused("model.width=24 there, 48 here", "--config.model.width=48", late=True)
  shutil.copytree(checkpoint, here / "part")
  shutil.rmtree(here / "part" / "vae")
  refused("has no weights of 'vae'", f"--config.io.checkpoint={here / 'part'}", late=True)


def test_a_checkpoint_with_nan(refused, here, checkpoint):
  experiment = load_config(checkpoint / "config.json")
  abstract = {name: net.abstract for name, net in declare_networks(experiment).items()}
  params = load_params(checkpoint, abstract)
  kernel = params["dit"]["layers"]["ffn"]["up"]["kernel"]
  params["dit"]["layers"]["ffn"]["up"]["kernel"] = kernel.at[1, 2, 3].set(jnp.nan)
  save_params(here / "nan", params, read_config(checkpoint), {})
  line = f"weights 'dit/layers/1/ffn/up/kernel' in '{here / 'nan'}' are not finite"
  refused(line, f"--config.io.checkpoint={here / 'nan'}", late=True)


def command(checkpoint: Path, *arguments: str) -> list[str]:
  weights = f"--config.io.checkpoint={checkpoint}"
  return [sys.executable, "-m", "launch.sample", *TINY, weights, *arguments]


def test_a_damaged_checkpoint_says_no_more_than_that(here, checkpoint):
  """In a process of its own, because Orbax leaves threads behind that complain later."""
  shutil.copytree(checkpoint, here / "bad")
  files = [path for path in (here / "bad" / "dit").rglob("d/*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(b"x" * largest.stat().st_size)
  script, out = f"--script={here / 'script.json'}", f"--out={here / 'out' / 'video.mp4'}"
  done = subprocess.run(command(here / "bad", script, out), capture_output=True, text=True)
  line = f"part '{here / 'bad' / 'dit' / '000'}' of the checkpoint is damaged"
  assert_refused(Outcome(done.returncode, done.stdout, done.stderr), line)
  assert contents(here / "out") == []


FORMS = ("video.mp4", "video.gif", "frames", "f_%05d.png")


def spoil_after_a_block(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], None]) -> None:
  """Makes the next `launch.sample` do something when one block is written and the next is there."""
  blocks = itertools.count()
  monkeypatch.setattr(tqdm, "update", lambda bar, n=1: spoil() if next(blocks) else None)


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[], None]]:
  """A disk that takes no more: files cannot grow beyond a few bytes once this is called."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", FORMS)
def test_a_disk_that_fills_up(sample, here, monkeypatch, file_size_limit, name):
  spoil_after_a_block(monkeypatch, file_size_limit)
  out = here / "out" / name
  done = sample(f"--script={here / 'script.json'}", f"--out={out}")
  assert done.code == 2
  lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and "Traceback" not in done.stderr
  assert str(here / "out") in lines[0] and "File too large" in lines[0]
  assert "partial" not in lines[0]
  assert contents(here / "out") == []


@pytest.mark.parametrize("name", FORMS)
def test_an_interruption_leaves_nothing(sample, here, monkeypatch, name):
  def interrupt() -> None:
    raise KeyboardInterrupt

  spoil_after_a_block(monkeypatch, interrupt)
  done = sample(f"--script={here / 'script.json'}", f"--out={here / 'out' / name}")
  assert done.code == 130
  assert done.stderr.endswith("interrupted\n") and "Traceback" not in done.stderr
  assert contents(here / "out") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_midway(here, checkpoint, number, code):
  write_script(here, blocks=100_000)
  script, out = f"--script={here / 'script.json'}", f"--out={here / 'out' / 'video.mp4'}"
  with subprocess.Popen(command(checkpoint, script, out), stderr=subprocess.PIPE) as child:
    try:
      while child.poll() is None and not contents(here / "out"):
        time.sleep(0.01)
      assert contents(here / "out")[0].startswith(".video.partial")
      child.send_signal(number)
      errors = child.communicate(timeout=60)[1].decode()
    finally:
      child.kill()
  assert child.returncode == code, errors
  assert "Traceback" not in errors and "Exception" not in errors
  assert errors.endswith("interrupted\n") == (number == signal.SIGINT)
  assert contents(here / "out") == []


EVALUATE = {
  "--scripts=0": "--scripts=0",
  "--scripts=3": "--scripts=3 must be a multiple of --batch=2",
  "--batch=0": "--batch=0",
  "--first_seed=-1": "--first_seed=-1",
  "--blocks=-2": "--blocks=-2",
  "--changes=1.1": "--changes=1.1",
  "--against=none.json": "--against=none.json: there is no such file",
  "--against=benchmarks/results": "--against=benchmarks/results: there is no such file",
  "--against=LICENSE": "--against=LICENSE is not a file that launch.evaluate wrote",
  "--out=configs": "configs: it is a folder; give the name of a file",
  "--out=LICENSE/score.json": "is not a folder",
  "--scripts=many": "--scripts=many",
}


@pytest.mark.parametrize("argument", EVALUATE)
def test_evaluate(program: Program, checkpoint, tmp_path, argument):
  weights, out = f"--config.io.checkpoint={checkpoint}", f"--out={tmp_path / 'score.json'}"
  flags = ("--scripts=4", "--batch=2", "--shots=1", "--blocks=1")
  assert_refused(program("evaluate", *TINY, weights, out, *flags, argument), EVALUATE[argument])
  assert contents(tmp_path) == []


def test_scores_of_other_scripts_cannot_be_paired(program: Program, checkpoint, tmp_path):
  other = {"flags": {"scripts": 4, "first_seed": 3, "shots": 4, "blocks": 4}, "results": []}
  (tmp_path / "other.json").write_text(json.dumps(other))
  weights, out = f"--config.io.checkpoint={checkpoint}", f"--out={tmp_path / 'score.json'}"
  against = f"--against={tmp_path / 'other.json'}"
  done = program("evaluate", *TINY, weights, out, "--scripts=4", against)
  assert_refused(done, "is of --first_seed=3; only equal scripts can be paired")
  assert contents(tmp_path) == ["other.json"]


@pytest.mark.parametrize("results", [5, [{"a": 1}] * 4, [{"score": 1}] * 4])
def test_results_that_nobody_wrote_cannot_be_paired(
  program: Program, checkpoint, tmp_path, results
):
  flags = {"scripts": 4, "first_seed": 1_000_000, "shots": 4, "blocks": 4}
  (tmp_path / "other.json").write_text(json.dumps({"flags": flags, "results": results}))
  weights, out = f"--config.io.checkpoint={checkpoint}", f"--out={tmp_path / 'score.json'}"
  against = f"--against={tmp_path / 'other.json'}"
  done = program("evaluate", *TINY, weights, out, "--scripts=4", against)
  assert_refused(done, "is not a file that launch.evaluate wrote")


@pytest.mark.parametrize(
  ("name", "arguments"),
  [
    ("bench", ("--suite=quant", "--sizes=tiny")),
    ("contact_sheet", TINY),
    ("evaluate", TINY),
    ("quant_report", TINY),
  ],
)
def test_a_file_never_replaces_a_folder(program: Program, tmp_path, name, arguments):
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "precious").write_text("")
  done = program(name, *arguments, f"--out={tmp_path / 'folder'}")
  assert_refused(done, "it is a folder; give the name of a file")
  assert contents(tmp_path) == ["folder", "folder/precious"]


def test_weights_never_replace_a_run_or_a_file(program: Program, checkpoint, tmp_path):
  cast = ("cast", f"--source={checkpoint}", "--dtype=float32")
  (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
  (tmp_path / "run" / "config.json").write_text("{}")
  (tmp_path / "plain").write_text("")
  before = contents(tmp_path)
  done = program("convert", *cast, f"--out={tmp_path / 'run'}")
  assert_refused(done, "holds something that is not a checkpoint")
  done = program("convert", *cast, f"--out={tmp_path / 'plain'}")
  assert_refused(done, "it is a file; give the name of a folder")
  assert contents(tmp_path) == before


def test_a_run_never_begins_in_a_folder_of_weights(program: Program, checkpoint, tmp_path):
  shutil.copytree(checkpoint, tmp_path / "weights")
  before = (tmp_path / "weights" / "config.json").read_text()
  done = program("train", *TINY, f"--workdir={tmp_path / 'weights'}")
  assert_refused(done, "holds weights, not a run")
  assert (tmp_path / "weights" / "config.json").read_text() == before


TRAIN = {
  "--workdir=": "--workdir is needed",
  "--workdir=LICENSE/run": "is not a folder",
  "--config.train.stage=gan": "train.stage='gan' must be one of ar, dmd, vae",
  "--config.train.batch=0": "train.batch=0 must be at least 1",
  "--config.train.motion_weight=1e300": "train.motion_weight=1e+300 must be a finite number",
  "--config.train.lr=-1.0": "train.lr=-1.0 must be",
  "--config.train.seed=-1": "train.seed=-1 must be at least 0",
  "--config.data.blocks=9": "data.blocks=9 must be at most data.clip_blocks=4",
  "--config.data.far_share=2.0": "data.far_share=2.0 must be",
  "--config.io.checkpoint=none": "io.checkpoint='none' is neither",
  "--config.io.adapters=tiny_4steps": "io.adapters='tiny_4steps' is for sampling",
  "--config.quant.linears=fp8": "quant.linears=fp8 has no gradients",
  "--devices=2": "--devices and --device_kind are for --dry_run",
  "--device_kind=H200": "--devices and --device_kind are for --dry_run",
}


@pytest.mark.parametrize("argument", TRAIN)
def test_train(program: Program, checkpoint, tmp_path, argument):
  weights, workdir = f"--config.io.checkpoint={checkpoint}", f"--workdir={tmp_path / 'run'}"
  assert_refused(program("train", *TINY, weights, workdir, argument), TRAIN[argument])
  assert contents(tmp_path) == []


def test_train_without_room_is_one_line(program: Program, tmp_path, monkeypatch):
  def refuse(*_: object) -> None:
    np.empty(2**59)

  monkeypatch.setattr("longlive_jax.train.start.check_same_settings", refuse)
  done = program("train", *TINY, "--config.io.checkpoint=", f"--workdir={tmp_path / 'run'}")
  assert_refused(done, "out of memory on the host: Unable to allocate 4.00 EiB")


REFUSED = {
  "params/precious": "params' holds something that is not a checkpoint",
  "checkpoints": "checkpoints: it is a file; give the name of a folder",
}


@pytest.mark.parametrize("file", REFUSED)
def test_a_workdir_that_holds_other_things_stays_as_it_is(
  program: Program, checkpoint, tmp_path, monkeypatch, file
):
  (tmp_path / file).parent.mkdir(exist_ok=True)
  (tmp_path / file).write_text("")
  (tmp_path / "config.json").write_text("{}")
  before = contents(tmp_path)
  monkeypatch.setattr("longlive_jax.build.build_models", lambda *_, **__: pytest.fail("too late"))
  weights = f"--config.io.checkpoint={checkpoint}"
  assert_refused(program("train", *TINY, weights, f"--workdir={tmp_path}"), REFUSED[file])
  assert contents(tmp_path) == before and (tmp_path / "config.json").read_text() == "{}"


MISSING = {
  "io.evaluate_scripts": ("--config.io.evaluate_every_steps=1",),
  "data.path": ("--config.data.source=videos",),
}


@pytest.mark.parametrize("setting", MISSING)
def test_train_on_files_that_are_missing(program: Program, checkpoint, tmp_path, setting):
  path, weights = tmp_path / "none", f"--config.io.checkpoint={checkpoint}"
  flags = (*MISSING[setting], f"--config.{setting}={path}", f"--workdir={tmp_path / 'run'}")
  done = program("train", *TINY, weights, *flags)
  assert_refused(done, f"{setting}='{path}' is not a folder or a file: it does not exist")
  assert contents(tmp_path) == []
