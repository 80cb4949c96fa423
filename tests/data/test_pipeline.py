"""Batches from files: the same samples for any processes, windows and resume."""

import collections
import itertools
import logging as std_logging
import threading
import time

import numpy as np
import pytest

from longlive_jax.data import sources
from longlive_jax.data.latent_files import LatentFormat
from longlive_jax.data.latent_write import LatentWriter
from longlive_jax.data.pipeline import batches, open_source, sample_order
from longlive_jax.data.shapes import write_clips

FRAMES = 21  # of three blocks of two latents


def tokenize(prompts):
  """Bytes, padded to 24."""
  ids = np.zeros((len(prompts), 24), np.int32)
  for row, prompt in enumerate(prompts):
    ids[row, : len(prompt)] = list(prompt.encode())
  return ids, (ids > 0).astype(np.int32)


def text_of(tokens) -> str:
  return bytes(int(t) for t in tokens if t).decode()


def take(count, *args, **how):
  """The first batches."""
  reading = batches(*args, **how)
  try:
    return list(itertools.islice(reading, count))
  finally:
    reading.close()


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture
def experiment(videos, experiment_of):
  return experiment_of(videos)


@pytest.fixture(scope="module")
def four(videos, experiment_of):
  """Four batches of the whole samples, by one process."""
  return take(4, experiment_of(videos), tokenize, rows=range(2))


def test_a_batch_holds_what_its_prompts_say(four):
  assert len(four) == 4
  for batch in four:
    assert batch.video.shape == (2, 1, FRAMES, 32, 32, 3) and batch.video.dtype == np.uint8
    assert batch.latents is None
    assert batch.tokens.shape == batch.masks.shape == (2, 3, 24)
    assert batch.tokens.dtype == batch.masks.dtype == batch.shots.dtype == np.int32
    assert batch.valid.tolist() == [6, 6] and batch.valid.dtype == np.int32
    for row in range(2):
      prompts = [text_of(t) for t in batch.tokens[row]]
      shots = batch.shots[row].tolist()
      cuts = [p.startswith("Cut. ") for p in prompts]
      assert cuts == [False, *(a != b for a, b in itertools.pairwise(shots))]
  names = [text_of(b.tokens[r, 0]).split()[0] for b in four for r in range(2)]
  assert len(set(names[:7])) == 7  # an epoch


def test_two_processes_see_the_batches_of_one(experiment, four):
  parts = [take(4, experiment, tokenize, rows=range(r, r + 1)) for r in range(2)]
  for whole, first, second in zip(four, *parts, strict=True):
    assert_same(
      whole,
      [np.concatenate(pair) for pair in zip(first[:1], second[:1], strict=True)]
      + [None]
      + [np.concatenate(p) for p in zip(first[2:], second[2:], strict=True)],
    )


def test_windows_are_parts_of_the_sample(experiment, four):
  windows = [(0, 9), (5, 14), (12, 21)]
  for whole, part in zip(
    four, take(4, experiment, tokenize, rows=range(2), windows=windows), strict=True
  ):
    assert part.video.shape == (2, 3, 9, 32, 32, 3)
    for number, (start, stop) in enumerate(windows):
      np.testing.assert_array_equal(part.video[:, number], whole.video[:, 0, start:stop])
    assert_same(whole[2:], part[2:])
  apart = take(1, experiment, tokenize, rows=range(1, 2), windows=[(14, 18), (0, 4)])[0]
  np.testing.assert_array_equal(apart.video[0, 0], four[0].video[1, 0, 14:18])
  np.testing.assert_array_equal(apart.video[0, 1], four[0].video[1, 0, :4])


def test_a_run_goes_on_where_it_was(experiment, four):
  resumed = take(2, experiment, tokenize, rows=range(2), first_sample=4)
  for whole, part in zip(four[2:], resumed, strict=True):
    assert_same(whole, part)
  experiment.data.readers = experiment.data.ahead = 3
  assert_same(four[3], take(1, experiment, tokenize, rows=range(2), first_sample=6)[0])


def test_another_seed_gives_other_samples(experiment, four):
  experiment.data.seed = 9
  other = take(4, experiment, tokenize, rows=range(2))
  assert any(not np.array_equal(a.video, b.video) for a, b in zip(four, other, strict=True))


def test_every_epoch_has_each_sample_once_in_another_order():
  order = sample_order(50, seed=3)
  epochs = [[order[i] for i in range(50 * e, 50 * e + 50)] for e in range(5)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(50))
  for a, b in itertools.combinations(epochs, 2):
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
  assert sample_order(50, seed=3)[10**12] == order[10**12]


def test_a_sample_starts_elsewhere_in_another_epoch(experiment):
  seen = collections.defaultdict(set)
  for batch in take(14, experiment, tokenize, rows=range(2), windows=[(0, 1)]):
    for row in range(2):
      seen[text_of(batch.tokens[row, 0])].add(batch.video[row].tobytes())
  assert len(seen) >= 7 and sum(len(starts) > 1 for starts in seen.values()) >= 5


def test_threads_end_when_the_iterator_is_closed(experiment):
  before = set(threading.enumerate())
  reading = batches(experiment, tokenize, rows=range(2))
  next(reading)
  started = set(threading.enumerate()) - before
  assert started
  reading.close()
  for thread in started:
    thread.join(10)
    assert not thread.is_alive()
  with pytest.raises(StopIteration):
    next(reading)


def test_samples_are_read_ahead(experiment, monkeypatch):
  read = []
  original = sources.VideoSource.read

  def slow(self, item, rng, windows):
    read.append(item)
    return original(self, item, rng, windows)

  monkeypatch.setattr(sources.VideoSource, "read", slow)
  experiment.data.ahead = 3
  reading = batches(experiment, tokenize, rows=range(2), windows=[(0, 1)])
  next(reading)
  deadline = time.monotonic() + 10
  while len(read) < 8 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  reading.close()
  assert len(read) == 8  # the batch, and three more


def test_a_file_that_breaks_during_the_run_is_named(tmp_path, write, experiment_of):
  write(tmp_path, "a", "0", 40)
  experiment = experiment_of(tmp_path)
  source = open_source(experiment)
  reading = batches(experiment, tokenize, rows=range(2), source=source)
  (tmp_path / "video" / "a" / "0.mp4").write_bytes(b"broken")
  with pytest.raises(ValueError, match=r"video '.*video/a/0\.mp4' cannot be read"):
    next(reading)


def test_short_folders_are_left_out_with_a_line(tmp_path, write, experiment_of, caplog):
  write(tmp_path, "long", "0", 40)
  write(tmp_path, "short", "0", 20)
  experiment = experiment_of(tmp_path)
  with caplog.at_level(std_logging.WARNING, logger="absl"):
    assert len(open_source(experiment)) == 1
  assert "skipped video/short: it fills 2 blocks" in caplog.text
  experiment.data.blocks = 20
  with pytest.raises(ValueError, match=r"no sample to train on: video/long: it fills 5 blocks"):
    open_source(experiment)
  experiment.data.pad, experiment.data.min_blocks = True, 3
  batch = take(1, experiment, tokenize, rows=range(1))[0]
  assert batch.video.shape[2] == 157 and batch.valid.tolist() == [10]
  np.testing.assert_array_equal(batch.video[0, 0, 37:], batch.video[0, 0, 36:-1])


def test_latents_are_read_like_videos(tmp_path, experiment_of):
  experiment = experiment_of(tmp_path / "latents", source="latents")
  writer = LatentWriter(experiment.data.path, LatentFormat.of(experiment, "v"))
  for number in range(5):
    latents = np.full((6, 2, 2, 48), number, np.float32) + np.arange(6)[:, None, None, None] / 8
    writer.add(f"{number}", latents, [str(number)] * 3, [0, 0, 0], 6)
  writer.finish()
  whole = take(3, experiment, tokenize, rows=range(2))
  parts = take(3, experiment, tokenize, rows=range(2), windows=[(0, 2), (2, 4), (4, 6)])
  for batch, part in zip(whole, parts, strict=True):
    assert batch.video is None and batch.latents.shape == (2, 1, 6, 2, 2, 48)
    assert part.latents.shape == (2, 3, 2, 2, 2, 48)
    np.testing.assert_array_equal(part.latents.reshape(2, 6, 2, 2, 48), batch.latents[:, 0])
    for row in range(2):
      assert text_of(batch.tokens[row, 0]) == str(int(batch.latents[row, 0, 0, 0, 0, 0]))
  assert len({text_of(b.tokens[r, 0]) for b in whole for r in range(2)}) == 5


def test_wrong_arguments_are_named(experiment):
  for rows in (range(0), range(1, 3)):
    with pytest.raises(ValueError, match="must be some of the rows of a batch, 0 to 1"):
      batches(experiment, tokenize, rows=rows)
  for windows in ([], [(0, 4), (4, 9)], [(0, 22)], [(3, 3)]):
    with pytest.raises(ValueError, match=r"must be ranges of one length within 0\.\.21"):
      batches(experiment, tokenize, rows=range(2), windows=windows)
  experiment.data.source = "shapes"
  with pytest.raises(ValueError, match=r"data\.source=shapes is not of files; use one of videos"):
    open_source(experiment)


def test_prompts_that_cannot_be_used_are_counted(tmp_path, write, experiment_of):
  def refuse(prompts):
    if any("long" in prompt for prompt in prompts):
      raise ValueError("too many tokens")
    return one_token(prompts)

  for sample in ("a", "long1", "long2", "b", "long3", "long4"):
    write(tmp_path, sample, "0", 30)
  with pytest.raises(ValueError, match="^4 files have prompts that cannot be used: '") as error:
    open_source(experiment_of(tmp_path), refuse)
  assert str(error.value).endswith("long3/0.json': too many tokens; and 1 more")
  for sample in ("long2", "long3", "long4"):
    (tmp_path / "caption" / sample / "0.json").unlink()
  with pytest.raises(ValueError, match=r"^'.*long1/0\.json': too many tokens$"):
    open_source(experiment_of(tmp_path), refuse)


def test_the_shapes_world_can_be_trained_on_from_files(tmp_path, experiment_of):
  """Shots of random lengths; a run of fewer shots leaves no files of the one before."""
  experiment = experiment_of(tmp_path, blocks=3)
  experiment.model.block_latents = 8
  experiment.video.width = 64
  write_clips(tmp_path, 1, 0, (1, 1, 1, 1), experiment.video)
  write_clips(tmp_path, 4, 2, (4,), experiment.video, max_shots=3)
  folders = open_source(experiment).folders
  lengths = [[clip.frames for clip in folder.clips] for folder in folders]
  assert [sum(frames) for frames in lengths] == [125] * 4
  assert len({len(frames) for frames in lengths}) > 1 and max(map(len, lengths)) <= 3
  counts = []
  for batch in take(2, experiment, one_token, rows=range(2)):
    assert batch.video.shape == (2, 1, 93, 32, 64, 3)
    counts += [int(shots[-1]) for shots in batch.shots]
  assert len(set(counts)) > 1


def one_token(prompts):
  ids = np.asarray([[len(prompt)] for prompt in prompts], np.int32)
  return ids, np.ones_like(ids)
