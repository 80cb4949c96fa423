"""What is checked before a run begins."""

import dataclasses
import json
from pathlib import Path

import pytest

from longlive_jax.config import Data, Experiment, Io, Train
from longlive_jax.config.load import to_json
from longlive_jax.data.latent_files import INDEX
from longlive_jax.train import start
from longlive_jax.train.start import check_files, check_same_settings

EXPERIMENT = Experiment()


def changed(**sections: object) -> Experiment:
  return dataclasses.replace(EXPERIMENT, **sections)  # type: ignore[arg-type]


def found_by(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
  monkeypatch.setattr(start, "texts_of_all", lambda _: list(texts))


def test_one_process_agrees_with_itself():
  check_same_settings(EXPERIMENT)


def test_settings_that_differ_are_named(monkeypatch):
  other = to_json(changed(train=Train(lr=0.5), io=Io(compile_cache="here")))
  found_by(monkeypatch, to_json(EXPERIMENT), to_json(EXPERIMENT), other)
  lr = EXPERIMENT.train.lr
  with pytest.raises(ValueError, match=f"train.lr is {lr} in process 0 and 0.5 in process 2$"):
    check_same_settings(EXPERIMENT)


def test_a_cache_may_be_elsewhere(monkeypatch):
  found_by(monkeypatch, to_json(EXPERIMENT), to_json(changed(io=Io(compile_cache="here"))))
  check_same_settings(EXPERIMENT)


def test_another_version_of_the_program(monkeypatch):
  tree = json.loads(to_json(EXPERIMENT)) | {"news": 1}
  found_by(monkeypatch, to_json(EXPERIMENT), json.dumps(tree))
  with pytest.raises(ValueError, match="different versions of the program: unknown setting 'news'"):
    check_same_settings(EXPERIMENT)


def missing(folder: Path) -> None:
  folder.rmdir()


def empty(folder: Path) -> None:
  (folder / "video").mkdir()


def latents(folder: Path) -> None:
  (folder / INDEX).write_text("{}")


def nothing(folder: Path) -> None:
  """It is empty."""


@pytest.mark.parametrize(
  ("source", "make", "line"),
  [
    ("videos", missing, "is not a folder or a file: it does not exist"),
    ("latents", missing, "it does not exist"),
    ("scripts", missing, "it does not exist"),
    ("videos", nothing, "has no folder 'video'"),
    ("videos", empty, "has no usable sample"),
    ("videos", latents, "holds latents, not videos: use data.source=latents"),
    ("latents", empty, "is not a folder of latents"),
    ("scripts", empty, "is a folder without a .json or .txt script"),
  ],
)
def test_data_that_is_not_there(tmp_path, source, make, line):
  folder = tmp_path / "data"
  folder.mkdir()
  make(folder)
  experiment = changed(data=Data(source=source, path=str(folder)))
  with pytest.raises((ValueError, FileNotFoundError), match=f"data.path='{folder}' {line}|{line}"):
    check_files(experiment, tmp_path / "run")
  check_files(dataclasses.replace(experiment, train=Train(stage="vae")), tmp_path / "run")


def test_scripts_that_are_not_there(tmp_path):
  wanted = changed(io=Io(evaluate_every_steps=5, evaluate_scripts=str(tmp_path / "none.json")))
  line = f"io.evaluate_scripts='{tmp_path / 'none.json'}' is not .* it does not exist"
  with pytest.raises(FileNotFoundError, match=line):
    check_files(wanted, tmp_path / "run")


@pytest.mark.parametrize("name", ["params", "adapters"])
def test_a_result_never_replaces_other_things(tmp_path, name):
  (tmp_path / name).mkdir()
  check_files(EXPERIMENT, tmp_path)
  (tmp_path / name / "precious").write_text("")
  with pytest.raises(ValueError, match=f"{name}' holds something that is not a checkpoint"):
    check_files(EXPERIMENT, tmp_path)
