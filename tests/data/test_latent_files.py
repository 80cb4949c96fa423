"""Folders of latents: what is written is read, and what does not fit is refused by name."""

import json
import logging as std_logging
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from longlive_jax.data.latent_files import INDEX, UNFINISHED, LatentFiles, LatentFormat
from longlive_jax.data.latent_write import LatentWriter, planned_items, source_of
from longlive_jax.data.video_index import read_index


@pytest.fixture
def experiment(tmp_path, experiment_of):
  """Blocks of two latents [2, 2, 48]."""
  return experiment_of(tmp_path / "latents", source="latents", blocks=2)


def latents_of(blocks: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(2 * blocks, 2, 2, 48)).astype(np.float32)


def write(experiment, lengths, vae="v", finish=True) -> LatentWriter:
  writer = LatentWriter(experiment.data.path, LatentFormat.of(experiment, vae))
  for number, blocks in enumerate(lengths):
    prompts = [f"{number} {block}" for block in range(blocks)]
    writer.add(f"{number:05d}", latents_of(blocks, number), prompts, range(blocks), 2 * blocks)
  if finish:
    assert writer.finish(len(lengths)) == len(lengths)
  return writer


def test_what_is_written_is_read(experiment):
  write(experiment, [2, 3])
  files = LatentFiles(experiment, vae="v")
  assert len(files) == 2
  for number in range(2):
    item = files[number]
    assert item.latents.dtype == ml_dtypes.bfloat16 and item.latents.shape == (4, 2, 2, 48)
    expected = latents_of(2 + number, number)[:4].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(item.latents, expected)
    assert item.prompts == (f"{number} 0", f"{number} 1")
    assert item.shots.tolist() == [0, 1] and item.shots.dtype == np.int32
    assert item.valid_latents == 4


def test_what_is_too_short_is_left_out_or_padded(experiment, caplog):
  write(experiment, [2, 1])
  with caplog.at_level(std_logging.WARNING, logger="absl"):
    assert len(LatentFiles(experiment)) == 1
  assert "skipped 00001.safetensors: it has 1 blocks; data.blocks=2" in caplog.text
  experiment.data.pad = True
  item = LatentFiles(experiment)[1]
  assert item.latents.shape == (4, 2, 2, 48) and item.valid_latents == 2
  np.testing.assert_array_equal(item.latents[2], item.latents[1])
  np.testing.assert_array_equal(item.latents[3], item.latents[1])
  assert item.prompts == ("1 0", "1 0") and item.shots.tolist() == [0, 0]
  experiment.data.blocks = experiment.data.min_blocks = 3
  with pytest.raises(
    ValueError, match=r"no item of data\.min_blocks=3; .*: use data\.min_blocks=2$"
  ):
    LatentFiles(experiment)
  experiment.data.pad = False
  with pytest.raises(
    ValueError, match=r"no item of data\.blocks=3; .*: use data\.blocks=2, or data"
  ):
    LatentFiles(experiment)


def test_an_index_without_items_is_no_matter_of_settings(experiment):
  path = write(experiment, [2]).path
  tree = json.loads((path / INDEX).read_text())
  (path / INDEX).write_text(json.dumps({**tree, "items": []}))
  with pytest.raises(ValueError, match="has no items in its index.json, .*launch.encode"):
    LatentFiles(experiment)


def test_numbers_that_are_not_finite_name_their_file(experiment):
  path = write(experiment, [2, 2]).path
  bad = latents_of(2).astype(ml_dtypes.bfloat16)
  bad[1, 1, 1, 1] = np.nan
  safetensors.numpy.save_file({"latents": bad}, path / "00001.safetensors")
  files = LatentFiles(experiment)
  assert files[0].prompts == ("0 0", "0 1")
  with pytest.raises(ValueError, match=r"latents '.*00001\.safetensors' are not finite: remove"):
    files[1]


def test_missing_files_are_found_at_the_start(experiment):
  path = write(experiment, [2] * 6).path
  for number in (0, 2, 3, 5):
    (path / f"{number:05d}.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="lacks 4 of the 6 files") as error:
    LatentFiles(experiment)
  assert "00000.safetensors, 00002.safetensors, 00003.safetensors and 1 more." in str(error.value)


def test_padding_does_not_count_as_length(experiment):
  writer = write(experiment, [2], finish=False)
  writer.add("padded", latents_of(2), ["a", "a"], [0, 0], 2)
  writer.finish()
  assert len(LatentFiles(experiment)) == 1
  experiment.data.pad = True
  files = LatentFiles(experiment)
  assert [files[i].valid_latents for i in range(2)] == [4, 2]


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda e: setattr(e.model, "block_latents", 4), r"model\.block_latents is 4 here and 2 there"),
    (lambda e: setattr(e.model.vae, "latent_channels", 16), r"latent_channels is 16 here and 48"),
    (lambda e: setattr(e.video, "height", 64), r"video\.height / 16 is 4 here and 2 there"),
    (lambda e: setattr(e.video, "fps", 12), r"video\.fps is 12 here and 24 there"),
    (lambda e: setattr(e.sample, "cut_prefix", ""), r"cut_prefix is '' here and 'Cut\. ' there"),
  ],
)
def test_latents_of_another_model_are_refused(experiment, change, line):
  write(experiment, [2])
  change(experiment)
  with pytest.raises(ValueError, match=r"latents of another model: .*" + line) as error:
    LatentFiles(experiment)
  assert "\n" not in str(error.value)


def test_latents_of_another_autoencoder_are_refused(experiment):
  write(experiment, [2], vae="one")
  with pytest.raises(ValueError, match="the autoencoder is 'two' here and 'one' there"):
    LatentFiles(experiment, vae="two")


def test_a_stopped_writer_leaves_what_another_goes_on_with(experiment, monkeypatch):
  write(experiment, [2, 2], finish=False)
  with pytest.raises(ValueError, match="is not finished: run launch.encode again"):
    LatentFiles(experiment)

  def stop(path, data):
    with path.open("wb") as file:
      file.write(data[: len(data) // 2])
    raise KeyboardInterrupt

  writer = LatentWriter(experiment.data.path, LatentFormat.of(experiment, "v"))
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(pathlib.Path, "write_bytes", stop)
    writer.add("00002", latents_of(2), ["a", "b"], [0, 0], 4)
  again = LatentWriter(experiment.data.path, LatentFormat.of(experiment, "v"))
  assert again.has("00000") and again.has("00001") and not again.has("00002")
  with pytest.raises(ValueError, match="has 2 items, not 3"):
    again.finish(3)
  again.add("00002", latents_of(2), ["a", "b"], [0, 0], 4)
  assert again.finish(3) == 3
  assert len(LatentFiles(experiment)) == 3
  assert not (again.path / UNFINISHED).exists()
  assert sorted(p.name for p in again.path.iterdir()) == [
    *(f"{i:05d}.safetensors" for i in range(3)),
    INDEX,
  ]


def test_a_folder_of_something_else_is_not_written_to(experiment, tmp_path):
  write(experiment, [2])
  with pytest.raises(ValueError, match=r"latents of other settings \(vae differ\)"):
    LatentWriter(experiment.data.path, LatentFormat.of(experiment, "other"))
  with pytest.raises(ValueError, match=r"\(source differ\)"):
    LatentWriter(experiment.data.path, LatentFormat.of(experiment, "v"), "other")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "letter.txt").write_text("")
  with pytest.raises(ValueError, match="holds other things"):
    LatentWriter(tmp_path / "full", LatentFormat.of(experiment, "v"))
  empty = LatentWriter(tmp_path / "empty", LatentFormat.of(experiment, "v"))
  with pytest.raises(ValueError, match="has no latents"):
    empty.finish()


def test_wrong_items_are_refused(experiment):
  writer = write(experiment, [], finish=False)
  with pytest.raises(ValueError, match="item a has shape"):
    writer.add("a", latents_of(2), ["a"], [0], 4)
  bad = latents_of(2)
  bad[1, 1, 1, 1] = np.nan
  with pytest.raises(ValueError, match="item a holds latents that are not finite"):
    writer.add("a", bad, ["a", "b"], [0, 0], 4)
  assert not writer.has("a")


def test_wrong_folders_are_named(experiment):
  path = write(experiment, [2]).path
  tree = json.loads((path / INDEX).read_text())
  file = path / "00000.safetensors"
  whole = file.read_bytes()
  file.write_bytes(whole[:-9])
  with pytest.raises(ValueError, match=r"latents '.*00000\.safetensors' cannot be read"):
    LatentFiles(experiment)[0]
  files = LatentFiles(experiment)
  file.unlink()  # later on
  with pytest.raises(ValueError, match=r"latents '.*00000\.safetensors' cannot be read"):
    files[0]
  for changed, line in (
    ({**tree, "version": 0}, "is of version 0, not 1"),
    ({k: v for k, v in tree.items() if k != "items"}, "has no 'items'"),
    ([], "is not a JSON object"),
  ):
    (path / INDEX).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=line):
      LatentFiles(experiment)
  (path / INDEX).write_text("{")
  with pytest.raises(ValueError, match=r"index\.json' is not JSON"):
    LatentFiles(experiment)
  (path / INDEX).unlink()
  with pytest.raises(FileNotFoundError, match=r"data\.path=.* is not a folder of latents"):
    LatentFiles(experiment)


def test_items_are_planned_the_same_way_every_time(videos, experiment_of):
  index, experiment = read_index(videos), experiment_of(videos)
  items = list(planned_items(index, experiment, 3))
  names = [name for name, _ in items]
  assert names == [f"{i:05d}-{t:03d}" for i in range(7) for t in range(3)]
  for (name, plan), (other, again) in zip(items, planned_items(index, experiment, 3), strict=True):
    assert name == other
    np.testing.assert_array_equal(plan.frames, again.frames)
  first = [plan.frames[0] for _, plan in items[:3]]
  assert len(set(first)) == 3  # different starts
  fewer = [plan.frames[0] for _, plan in planned_items(index, experiment, 2)]
  assert fewer[:2] == first[:2]
  experiment.data.blocks = 6  # 45 frames: the film at 30 frames a second is 48, at 50 only 41
  experiment.data.seed = 2
  many = [name for name, _ in planned_items(index, experiment, 100)]
  assert len(many) == len(set(many)) and sum(n.startswith("00002") for n in many) < 6


def test_what_the_items_follow_from_is_told_apart(videos, experiment_of):
  index, experiment = read_index(videos), experiment_of(videos)
  one = source_of(index, experiment, 2)
  assert one == source_of(index, experiment_of(videos), 2) != source_of(index, experiment, 3)
  experiment.data.fit = "stretch"
  assert source_of(index, experiment, 2) != one
