"""Training on files as programs: videos, latents made of them, and what may be wrong with both."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.config import Video
from longlive_jax.data import sources
from longlive_jax.data.latent_files import INDEX, UNFINISHED
from longlive_jax.data.shapes import write_clips
from longlive_jax.data.video_index import VideoIndex
from longlive_jax.io.metrics import read_metrics
from tests.launch.tiny import TINY, Outcome, Program

STEPS = 4
# A folder of the data set has two files, which fill a block each and not a frame more: a sample
# starts at the first frame, whatever is drawn, so latents made ahead are of the same frames.
SETTINGS = (
  *TINY,
  "--config.model.block_latents=8",
  "--config.sample.sink_latents=8",
  "--config.sample.window_latents=24",
  "--config.data.blocks=2",
  "--config.data.readers=1",
  f"--config.train.steps={STEPS}",
  "--config.train.final_lr_fraction=1.0",
  "--config.io.checkpoint_every_steps=2",
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
  """Videos of five samples; not to be written."""
  folder = tmp_path_factory.mktemp("clips")
  write_clips(folder, 5, 0, (1, 1), Video(height=32, width=32))
  return folder


@pytest.fixture
def copy(clips, tmp_path) -> Path:
  """Videos that may be spoilt."""
  return Path(shutil.copytree(clips, tmp_path / "clips"))


Run = Callable[..., Outcome]


@pytest.fixture
def train(program: Program, checkpoint) -> Run:
  """Trains on files: `train(workdir, source, path, *arguments)`."""

  def run(workdir: Path, source: str, path: Path, *arguments: str) -> Outcome:
    data = (f"--config.data.source={source}", f"--config.data.path={path}")
    weights = f"--config.io.checkpoint={checkpoint}"
    return program("train", *SETTINGS, weights, *data, f"--workdir={workdir}", *arguments)

  return run


@pytest.fixture
def encode(program: Program, checkpoint) -> Run:
  """Makes latents: `encode(path, out, *arguments)`."""

  def run(path: Path, out: Path, *arguments: str) -> Outcome:
    weights = f"--config.io.checkpoint={checkpoint}"
    data = f"--config.data.path={path}"
    return program("encode", *SETTINGS, weights, data, f"--out={out}", *arguments)

  return run


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
  """Lines that a process of its own has on stderr, since the last call."""
  found = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  caplog.clear()
  return found


def losses(workdir: Path) -> list[float | None]:
  """Of all steps, each finite."""
  found = [line["loss"] for line in read_metrics(workdir)]
  assert np.isfinite(np.asarray(found, float)).all()
  return found


def assert_right(done: Outcome) -> Outcome:
  assert (done.code, done.stderr) == (0, ""), done.stderr
  return done


def assert_refused(done: Outcome, *parts: str) -> None:
  """Ended by one line."""
  assert done.code == 2 and done.stderr.startswith("error: "), done.stderr
  assert done.stderr.count("\n") == 1
  for part in parts:
    assert part in done.stderr, done.stderr


@dataclasses.dataclass(frozen=True)
class Made:
  """Latents of all videos, and runs that nothing has disturbed."""

  latents: Path
  videos_run: Path
  latents_run: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp("made")


@pytest.fixture
def made(folder, clips, train, encode) -> Made:
  made = Made(*(folder / field.name for field in dataclasses.fields(Made)))
  if not made.latents.is_dir():
    assert_right(train(made.videos_run, "videos", clips))
    done = assert_right(encode(clips, made.latents))
    assert "5 items of 5 samples; 5 are new, 0 were there, 0 could not be read" in done.stdout
    assert_right(train(made.latents_run, "latents", made.latents))
  return made


def test_latents_made_ahead_train_like_the_videos(made):
  """They differ as they are stored in half precision."""
  videos = losses(made.videos_run)
  assert len(videos) == STEPS
  np.testing.assert_allclose(losses(made.latents_run), videos, rtol=5e-3)


def interrupted(run: Path, folder: Path) -> Path:
  """A copy of a run as it was at its next to last checkpoint, with metrics of later steps."""
  shutil.copytree(run, folder, dirs_exist_ok=True)
  shutil.rmtree(folder / "params")
  shutil.rmtree(folder / "checkpoints" / str(STEPS))
  return folder


@pytest.mark.parametrize("source", ["videos", "latents"])
def test_a_run_goes_on_to_the_bit(made, clips, train, tmp_path, source):
  path = clips if source == "videos" else made.latents
  whole = made.videos_run if source == "videos" else made.latents_run
  done = assert_right(train(interrupted(whole, tmp_path), source, path))
  assert f"steps {STEPS // 2 + 1} to {STEPS}" in done.stdout
  assert losses(tmp_path) == losses(whole)


SPLIT = {"chunk_vae=true": 1e-5, "chunk_vae=false": 1e-5, "halo_latents=6": 5e-3}


@pytest.mark.parametrize("how", SPLIT)
def test_a_clip_of_two_devices_is_one_clip(made, clips, train, tmp_path, how):
  """Within these tolerances: after fewer latents than the default, a part is not quite the same."""
  split = ("--config.parallel.seq=2", f"--config.parallel.{how}")
  assert_right(train(tmp_path, "videos", clips, *split))
  np.testing.assert_allclose(losses(tmp_path), losses(made.videos_run), rtol=SPLIT[how])


def test_latents_of_two_devices(made, train, tmp_path):
  assert_right(train(tmp_path, "latents", made.latents, "--config.parallel.seq=2"))
  np.testing.assert_allclose(losses(tmp_path), losses(made.latents_run), rtol=1e-5)


def test_what_is_too_short_is_padded(copy, train, encode, tmp_path):
  shutil.rmtree(copy / "video" / "00001")
  for short in ("00002/1.mp4", "00003/0.mp4"):  # one of the two blocks is left
    (copy / "video" / short).unlink()
  pad = ("--config.data.pad=true", "--config.train.steps=2")
  assert_right(train(tmp_path / "run", "videos", copy, *pad))
  assert len(losses(tmp_path / "run")) == 2
  assert "4 items of 4 samples" in assert_right(encode(copy, tmp_path / "latents", *pad)).stdout
  items = json.loads((tmp_path / "latents" / INDEX).read_text())["items"]
  assert [item["valid_latents"] for item in items] == [16, 8, 8, 16]


def test_what_cannot_be_used_is_skipped_by_name(copy, train, encode, tmp_path, caplog):
  video = copy / "video" / "00000" / "0.mp4"
  video.write_bytes(video.read_bytes()[:700])
  (copy / "caption" / "00001" / "1.json").unlink()
  (copy / "caption" / "00003" / "0.json").write_text("{")
  lines = (
    "skipped video/00000/0.mp4: it is",
    "skipped video/00001/1.mp4: its caption caption/00001/1.json does not exist",
    "skipped video/00003/0.mp4: its caption caption/00003/0.json is not JSON",
    "skipped video/00000: it fills 1 blocks",
  )
  assert_right(train(tmp_path / "run", "videos", copy, "--config.train.steps=1"))
  told = warnings(caplog)
  encoded = assert_right(encode(copy, tmp_path / "latents"))
  for found in (told, warnings(caplog)):
    assert len(found) == 6
    assert all(any(line in other for other in found) for line in lines), found
  assert "2 items of 2 samples; 2 are new" in encoded.stdout
  assert "3 samples are too short" in encoded.stdout
  assert len(losses(tmp_path / "run")) == 1


def broken(path: Path) -> None:
  for file in path.rglob("*.mp4"):
    file.write_bytes(b"broken")


def uncaptioned(path: Path) -> None:
  shutil.rmtree(path / "caption")


UNUSABLE = {
  broken: "has no usable sample: video/00000/0.mp4: it is not a readable video",
  uncaptioned: "its caption caption/00000/0.json does not exist",
  shutil.rmtree: "is not a folder",
}


@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_nothing_can_be_used(copy, train, encode, tmp_path, spoil):
  spoil(copy)
  assert_refused(train(tmp_path / "run", "videos", copy), f"data.path='{copy}'", UNUSABLE[spoil])
  assert_refused(encode(copy, tmp_path / "latents"), f"data.path='{copy}'", UNUSABLE[spoil])
  assert not (tmp_path / "latents").exists()


WRONG = {
  "--config.data.path=": "data.source=videos needs data.path",
  "--config.data.blocks=4": "has no sample to train on: video/00000: it fills 2 blocks",
  "--config.parallel.seq=3": "parallel.seq=3 must divide model.heads=2 and data.blocks=2",
  "--config.model.width=48": "model.width=24 there, 48 here",
  "--config.model.vae.encoder_width=8": "model.vae.encoder_width=4 there, 8 here",
  "--config.model.text.length=40": "caption/00000/0.json': prompt ",
  "--config.data.far_share=0.5": "data.far_share=0.5 is for data.source=shapes",
}


@pytest.mark.parametrize("argument", WRONG)
def test_videos_and_settings_that_do_not_fit(clips, train, tmp_path, argument):
  assert_refused(train(tmp_path, "videos", clips, argument), WRONG[argument])
  assert not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path)


OTHER = {
  "--config.video.height=64": "video.height / 16 is 4 here and 2 there",
  "--config.model.block_latents=4": "model.block_latents is 4 here and 8 there",
  "--config.sample.cut_prefix=New: ": "sample.cut_prefix is 'New: ' here and 'Cut. ' there",
  "--config.io.checkpoint=": "by io.checkpoint, the autoencoder is '",
  "--config.data.blocks=4": "the longest has 2: use data.blocks=2, or data.pad=true",
  "--config.model.text.length=40": "00000-000.safetensors': prompt ",
}


@pytest.mark.parametrize("argument", OTHER)
def test_latents_that_do_not_fit(made, train, tmp_path, argument):
  fresh = "--config.train.seed=5"  # of the autoencoder, where it is not that of the fixture
  path = f"data.path='{made.latents}'" if ".text." not in argument else str(made.latents)
  assert_refused(train(tmp_path, "latents", made.latents, argument, fresh), path, OTHER[argument])


def test_latents_that_are_not_there(made, clips, train, tmp_path):
  assert_refused(train(tmp_path, "latents", clips), f"data.path='{clips}' is not a folder of")
  other = shutil.copytree(made.latents, tmp_path / "latents")
  (other / "00003-000.safetensors").write_bytes(b"broken")
  assert_refused(train(tmp_path / "run", "latents", other), "00003-000.safetensors' cannot be read")


def contents(path: Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in path.iterdir()}


def test_encoding_goes_on_where_it_was_stopped(made, clips, train, encode, tmp_path):
  out = Path(shutil.copytree(made.latents, tmp_path / "latents"))
  head = json.loads((out / INDEX).read_text())
  head.pop("items")
  (out / INDEX).unlink()
  (out / UNFINISHED).write_text(json.dumps(head))
  for number in (1, 4):
    (out / f"0000{number}-000.safetensors").unlink()
  assert_refused(train(tmp_path / "run", "latents", out), f"data.path='{out}' is not finished")
  done = assert_right(encode(clips, out))
  assert "5 items of 5 samples; 2 are new, 3 were there" in done.stdout
  assert contents(out) == contents(made.latents)
  assert "0 are new, 5 were there" in assert_right(encode(clips, out)).stdout


def test_encoding_into_a_folder_of_other_things(made, clips, encode, tmp_path):
  (tmp_path / "notes").write_text("")
  assert_refused(encode(clips, tmp_path), f"'{tmp_path}' holds other things than latents")
  other = encode(clips, made.latents, "--takes=2")
  assert_refused(other, f"'{made.latents}' holds latents of other settings (source differ)")


ENCODE = {
  "--out=": "--out is needed",
  "--out=LICENSE": "it is a file",
  "--takes=0": "takes",
  "--config.io.checkpoint=": "io.checkpoint is empty, and latents of an untrained autoencoder",
  "--config.io.checkpoint=none": "io.checkpoint='none' is neither",
  "--config.model.vae.encoder_width=8": "model.vae.encoder_width=4 there, 8 here",
  "--config.data.source=latents": "data.source=latents is encoded already; use",
  "--config.data.path=": "data.path",
  "--config.model.text.length=40": "caption/00000/0.json': prompt ",
}


@pytest.mark.parametrize("argument", ENCODE)
def test_encoding_that_cannot_be(clips, encode, tmp_path, argument):
  assert_refused(encode(clips, tmp_path / "latents", argument), ENCODE[argument])
  assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_that_is_not_trained_may_be_meant(clips, encode, tmp_path):
  done = encode(clips, tmp_path / "latents", "--config.io.checkpoint=", "--untrained", "--takes=3")
  assert "5 items of 5 samples" in assert_right(done).stdout  # there is one start in each


@pytest.fixture
def after_the_index(monkeypatch) -> Callable[[Callable[[VideoIndex], VideoIndex]], None]:
  """Has something done to the index as soon as it is made."""
  read_index = sources.read_index

  def change(then: Callable[[VideoIndex], VideoIndex]) -> None:
    monkeypatch.setattr(sources, "read_index", lambda path: then(read_index(path)))

  return change


def test_a_file_that_vanishes_is_left_out_of_latents(
  copy, encode, tmp_path, after_the_index, caplog
):
  file = copy / "video" / "00002" / "1.mp4"
  after_the_index(lambda index: (file.unlink(), index)[1])
  done = assert_right(encode(copy, tmp_path / "latents"))
  (line,) = warnings(caplog)
  where = f"video '{file}' cannot be read: No such file"
  assert line.startswith(f"skipped item 00002-000 of video/00002: {where}")
  assert "4 items of 5 samples; 4 are new, 0 were there, 1 could not be read" in done.stdout


def test_a_file_that_vanishes_midway_ends_the_process(copy, checkpoint, tmp_path):
  """Threads that read ahead must not keep it."""
  data = ("--config.data.source=videos", f"--config.data.path={copy}", "--config.data.readers=3")
  weights = (f"--config.io.checkpoint={checkpoint}", f"--workdir={tmp_path / 'run'}")
  steps = ("--config.train.steps=100000", "--config.io.checkpoint_every_steps=100000")
  command = [sys.executable, "-m", "launch.train", *SETTINGS, *data, *weights, *steps]
  lines = tmp_path / "run" / "metrics.jsonl"
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
    try:
      while child.poll() is None and not (lines.exists() and lines.read_text().count("\n") > 3):
        time.sleep(0.01)
      shutil.rmtree(copy / "video" / "00002")
      errors = child.communicate(timeout=60)[1].decode()
    finally:
      child.send_signal(signal.SIGKILL)
  assert child.returncode == 2, errors
  assert errors.startswith(f"error: video '{copy}/video/00002/") and errors.count("\n") == 1


def test_files_that_change_between_two_starts_are_told(
  made, clips, train, tmp_path, after_the_index, caplog
):
  after_the_index(lambda index: VideoIndex(index.folders[1:]))
  assert_right(train(interrupted(made.videos_run, tmp_path), "videos", clips))
  (line,) = warnings(caplog)
  assert line.startswith(f"the files of data.path='{clips}' are not those of step 2: the run")
  assert len(losses(tmp_path)) == STEPS
