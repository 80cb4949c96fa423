"""Sessions on disk: to the bit, on other devices, and never half of one."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from longlive_jax.config import Experiment
from longlive_jax.config.load import from_flags, from_json, to_json
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.io.checkpoint import load_group
from longlive_jax.quant.kv import regrouped
from longlive_jax.sample import session_files
from longlive_jax.sample.moment import Moment
from longlive_jax.sample.sampler import Sampler
from longlive_jax.sample.session import Session
from longlive_jax.sample.session_files import digest, read_session, write_session
from longlive_jax.sample.session_settings import check_settings
from tests.sample.live import SEED, check_blocks, expected, play, sampler_of
from tests.sample.tiny import BLOCK

MADE, REST = range(6), range(6, 8)  # blocks before the save and after it
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)


@functools.cache
def played(name: str, seq: int = 1) -> Session:
  """A session after the first blocks of the story; it is only forked and saved."""
  session = Session(sampler_of(name, seq), seed=SEED)
  check_blocks(list(play(session, MADE)), expected(name, seq)[: len(MADE)])
  return session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A saved session, which tests copy before they change it."""
  path = tmp_path_factory.mktemp("sessions") / "saved"
  played("float32").save(path)
  return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
  return Path(shutil.copytree(folder, tmp_path / "copied"))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
  """All leaves of a saved session."""
  leaves: dict[str, np.ndarray] = {}
  for group in sorted((path / "arrays").iterdir()):
    leaves |= load_group(group)
  return leaves


def check_same_leaves(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
  assert ours.keys() == theirs.keys()
  for name, leaf in ours.items():
    assert leaf.dtype == theirs[name].dtype, name
    np.testing.assert_array_equal(leaf.view(np.uint8), theirs[name].view(np.uint8), name)


@pytest.mark.parametrize("parked", [False, True])
def test_a_saved_session_goes_on_and_so_does_the_one_that_was_saved(tmp_path: Path, parked: bool):
  session, wanted = played("nvfp4").fork(), expected("nvfp4")[len(MADE) :]
  if parked:
    session.park()
  session.save(tmp_path / "saved")
  session.save(tmp_path / "saved")  # takes the place of the first
  assert [path.name for path in tmp_path.iterdir()] == ["saved"]
  assert session.describe().parked == parked
  loaded = Session.load(session.sampler, tmp_path / "saved", keep=1)
  assert loaded.describe().oldest_block == len(MADE)
  for one in (session, loaded):
    check_blocks(list(play(one, REST)), wanted)
  loaded.rewind(len(MADE) + 1)
  check_blocks([loaded.next_block()], wanted[1:])


@pytest.mark.parametrize("name", ["float32", "nvfp4"])
@pytest.mark.parametrize("closed", [False, True])
def test_a_snapshot_is_written_as_it_was_whatever_the_session_does(
  tmp_path: Path, name: str, closed: bool
):
  session, wanted = played(name).fork(), expected(name)[len(MADE) :]
  write = session.snapshot()
  check_blocks(list(play(session, REST)), wanted)
  if closed:
    session.close()
  with ThreadPoolExecutor(1) as thread:
    thread.submit(write, tmp_path / "saved").result()
  check_blocks(list(play(Session.load(sampler_of(name), tmp_path / "saved"), REST)), wanted)


def test_what_is_said_is_saved_too(tmp_path: Path):
  sampler = sampler_of("float32")
  session = Session(sampler, seed=5, index=3, image=IMAGE)
  session.cut("Zwölf Füße")
  for path in (tmp_path / "new", tmp_path / "later"):
    session.save(path)
    session = Session.load(sampler, path)
    assert (session.seed, session.index) == (5, 3)
    status = session.describe()
    if path.name == "new":
      assert status.pending == ("Zwölf Füße", "cut") and status.block == 0
      frames = [session.next_block()]
      session.push("it rises", "recache")
    else:
      assert status.pending == ("it rises", "recache") and status.prompt == "Zwölf Füße"
      assert [entry.prompt for entry in status.prompts] == ["Zwölf Füße"]
      frames.append(session.next_block())
  shots = Shot("Zwölf Füße", 1), Shot("it rises", 1, transition="recache")
  script = Script(shots, seed=5)
  options = {"first_index": 3, "images": IMAGE[None]}
  check_blocks(frames, list(sampler.stream(script, **options)))


@pytest.mark.parametrize("name", ["float32", "nvfp4", "fp8"])
@pytest.mark.parametrize(("there", "here"), [(1, 2), (2, 1), (2, 2)])
def test_a_session_goes_on_with_another_number_of_devices(
  name: str, there: int, here: int, tmp_path: Path
):
  """To the bit with as many, within rounding with others; what is stored is the same."""
  played(name, there).save(tmp_path / "saved")
  session = Session.load(sampler_of(name, here), tmp_path / "saved")
  for leaf in jax.tree.leaves(session._now().rollout.caches):
    held = leaf.addressable_shards[0].data.nbytes
    assert held * (here if leaf.ndim > 3 else 1) == leaf.nbytes  # an amax is whole
  session.save(tmp_path / "again")
  check_same_leaves(arrays_of(tmp_path / "again"), arrays_of(tmp_path / "saved"))
  frames = list(play(session, REST))
  if there == here:
    check_blocks(frames, expected(name, here)[len(MADE) :])
  reference = played(name, there).fork()
  for block, ours, theirs in zip(REST, frames, play(reference, REST), strict=True):
    assert np.abs(ours.astype(int) - theirs).max() <= 1, block
  ours, theirs = (dict(s._now().rollout.history) for s in (session, reference))
  assert ours.keys() == theirs.keys()
  for block, latents in ours.items():
    np.testing.assert_allclose(latents, theirs[block], atol=2e-5)


def test_rows_of_a_store_follow_the_devices_that_have_their_heads():
  part = played("nvfp4")._keeper.all_on_host(played("nvfp4")._now()).slots[0]
  heads, store = 4, part[0].k  # rows in the order of tokens, here as if of 4 heads
  tokens = store.codes.shape[-2] // heads
  split = regrouped(part, heads, 1, 2)[0].k
  for rows, whole in ((split.codes, store.codes), (split.scales, store.scales)):
    by_token = whole.reshape(*whole.shape[:3], tokens, heads, -1)
    for device in range(2):
      own = rows.reshape(*rows.shape[:3], 2, tokens, heads // 2, -1)[:, :, :, device]
      mine = by_token[..., 2 * device : 2 * device + 2, :]
      np.testing.assert_array_equal(own.view(np.uint8), mine.view(np.uint8))
  back = regrouped(regrouped(part, heads, 1, 4), heads, 4, 2)
  np.testing.assert_array_equal(back[0].v.codes, regrouped(part, heads, 1, 2)[0].v.codes)


def test_layers_that_are_stacked_and_layers_that_are_not_are_stored_alike(tmp_path: Path):
  session = played("float32")
  engine, keeper, config = session._run.engine, session._keeper, session.sampler.experiment
  moment = keeper.all_on_host(session._now())

  def separate(part: tuple) -> tuple:
    return tuple(
      tuple(jax.tree.map(lambda a, i=i: a[i : i + 1], cache) for i in range(config.model.layers))
      for cache in part
    )

  slots = {slot: separate(part) for slot, part in (moment.slots or {}).items()}
  unrolled = Moment(moment.rollout, moment.decoder, moment.account, slots)
  for name, one in (("stacked", moment), ("separate", unrolled)):
    saved = session_files.Saved(SEED, 0, one, None)
    write_session(tmp_path / name, saved, engine, config)
  check_same_leaves(*(arrays_of(tmp_path / name) for name in ("stacked", "separate")))
  shapes = separate(jax.tree.map(lambda a: np.empty(a.shape, a.dtype), keeper.part))
  decoder = session._run.decoder.state
  found = read_session(tmp_path / "stacked", engine, shapes, decoder, config)
  jax.tree.map(np.testing.assert_array_equal, found.moment.slots, slots)
  check_blocks(
    list(play(Session.load(session.sampler, tmp_path / "separate"), REST)),
    expected("float32")[len(MADE) :],
  )


class KilledError(BaseException):
  """Stands for what ends a process."""


def killing(function: Callable, count: int, inside: Path, seen: list[Path]) -> Callable:
  """A function that is cut short at its `count`-th call for something in a folder.

  What is in the folder then is copied to `seen`, as a process that is killed leaves it there.
  """
  calls: list[object] = []

  def run(*args: object, **options: object) -> object:
    within = [path for path in inside.iterdir() if Path(args[0]).is_relative_to(path)]
    calls.extend(within)
    if len(calls) < count or not within:
      return function(*args, **options)
    seen.append(Path(shutil.copytree(inside, inside.with_name(f"left-{len(seen)}"))))
    raise KilledError

  return run


# what is cut short: owner, name and call of a function, and whether there is an older save
POINTS = {
  "the first arrays": (session_files, "save_group", 1, False),
  "the first arrays, an older save": (session_files, "save_group", 1, True),
  "later arrays": (session_files, "save_group", 3, False),
  "later arrays, an older save": (session_files, "save_group", 3, True),
  "the account": (session_files, "write_json", 1, False),
  "the account, an older save": (session_files, "write_json", 1, True),
  "getting its name": (os, "replace", 1, False),
  "setting the older one aside": (Path, "rename", 1, True),
  "taking the older one's name": (Path, "rename", 2, True),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_is_cut_short_leaves_the_older_one_or_nothing(
  point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  owner, name, count, older = POINTS[point]
  folder, sampler, seen = tmp_path / "sessions", sampler_of("float32"), []
  folder.mkdir()
  if older:
    session = Session(sampler, seed=SEED)
    list(play(session, range(2)))
    session.save(folder / "saved")
  monkeypatch.setattr(session_files, "GROUP_BYTES", 2**16)
  with monkeypatch.context() as patch:
    patch.setattr(owner, name, killing(getattr(owner, name), count, folder, seen))
    with pytest.raises(KilledError):
      played("float32").save(folder / "saved")
  (left,) = seen
  for path in (folder / "saved", left / "saved"):
    if older and point != "taking the older one's name":
      assert Session.load(sampler, path).block == 2
    else:
      with pytest.raises(FileNotFoundError, match="is not a saved session: it does not exist"):
        Session.load(sampler, path)
  if name in ("save_group", "write_json"):  # what is half written is none under its own name either
    (partial,) = left.glob(".saved.partial-*")
    with pytest.raises(FileNotFoundError, match=r"not a saved session: it has no session\.json"):
      Session.load(sampler, partial)
  assert not list(folder.glob("*.partial-*"))
  check_blocks(list(play(played("float32").fork(), [6])), expected("float32")[6:7])


def test_a_folder_of_something_else_is_neither_read_nor_written_over(tmp_path: Path):
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "config.json").write_text("{}")
  (tmp_path / "file").write_text("x")
  sampler = sampler_of("float32")
  for name, found in (
    ("notes", "has no session.json"),
    ("nowhere", "does not exist"),
    ("file", ""),
  ):
    with pytest.raises(FileNotFoundError, match=f"{name}' is not a saved session: it {found}"):
      Session.load(sampler, tmp_path / name)
  with pytest.raises(ValueError, match="notes' holds something that is not a saved session"):
    played("float32").save(tmp_path / "notes")
  with pytest.raises(NotADirectoryError, match="it is a file; give the name of a folder"):
    played("float32").save(tmp_path / "file")
  assert (tmp_path / "notes" / "config.json").read_text() == "{}"


def shorten(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def largest(path: Path) -> Path:
  """The file that holds most numbers."""
  files = (file for file in path.rglob("*") if file.is_file())
  return max(files, key=lambda file: file.stat().st_size)


def change(**values: object) -> Callable[[Path], None]:
  """Writes other values; `...` removes one."""

  def run(path: Path) -> None:
    file = path / "session.json"
    tree = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in tree.items() if v is not ...}))

  return run


def pretend(**values: object) -> Callable[[Path], None]:
  """`change`, with a checksum that is right."""

  def run(path: Path) -> None:
    change(**values)(path)
    change(sha256=digest(json.loads((path / "session.json").read_text())))(path)

  return run


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda p: shorten(p / "session.json"), "is damaged"),
    (lambda p: (p / "session.json").write_text("[]"), "is damaged"),
    (lambda p: (p / "config.json").unlink(), r"is damaged: .*config\.json"),
    (lambda p: shorten(p / "config.json"), "is damaged: .* not JSON"),
    (lambda p: shorten(largest(p)), r"is damaged: 'arrays/000/.*' has \d+ bytes, not \d+$"),
    (lambda p: largest(p).unlink(), r"is damaged: 'arrays/000/.*' has 0 bytes, not \d+$"),
    (lambda p: flip(largest(p)), "is damaged: the numbers of '.*' are not those"),
    (lambda p: shutil.rmtree(p / "arrays"), "is damaged: 'arrays/.*' has 0 bytes"),
    (change(format=1, sha256=...), "has format 1; this version reads 2$"),
    (change(format=...), "is damaged: it lacks 'format'"),
    (change(sha256=...), "is damaged: it lacks 'sha256'"),
    (pretend(state=...), "is damaged: it lacks 'state'"),
    (pretend(pending={"prompt": ""}), "is damaged: prompt='' must be text"),
    (pretend(history=[7]), "is damaged: it lacks 'history/7'"),
    (pretend(seed=None), "is damaged: seed=None must be a whole number from 0 to"),
    (pretend(index=2**32), "is damaged: index=4294967296 must be a whole number from 0 to"),
  ],
)
def test_a_damaged_session_is_one_error(copied: Path, damage: Callable, message: str):
  damage(copied)
  with pytest.raises(ValueError, match=f"saved session '.*copied' {message}") as caught:
    Session.load(sampler_of("float32"), copied)
  assert "\n" not in str(caught.value)


CHANGES: dict[str, tuple[object, ...]] = {
  "block": (None, "x", [], {}, 10**12, -1, 1.5),
  "prompt": (None, -1, 1.5, [], {}, "x"),
  "seed": (None, SEED + 1),
  "index": (None, 1, True),
  "history": ([],),
  "image": (True, None),
  "pending": ({"prompt": "x"},),
  "made": ([], [None] * 6),
  "files": ({},),
  "checksums": ({}, None),
  "sha256": (None, "", 5, []),
  "more": (1,),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_is_changed_in_the_account_is_found(copied: Path, name: str):
  file = copied / "session.json"
  before = file.read_text()
  for value in CHANGES[name]:
    file.write_text(before)
    change(**{name: value})(copied)
    with pytest.raises(ValueError, match=r"copied' is damaged: what session\.json says is not"):
      Session.load(sampler_of("float32"), copied)


@pytest.mark.parametrize(
  ("name", "value"),
  [("positions", None), ("positions", [-3]), ("blocks", []), ("pin", "x"), ("cuts", "x")],
)
def test_whatever_is_changed_in_its_slots_is_found(copied: Path, name: str, value: object):
  tree = json.loads((copied / "session.json").read_text())
  (tree["state"] if name == "cuts" else tree["state"]["slots"])[name] = value
  change(**tree)(copied)
  with pytest.raises(ValueError, match=r"copied' is damaged: what session\.json says is not"):
    Session.load(sampler_of("float32"), copied)


def test_how_the_account_is_laid_out_does_not_matter(copied: Path):
  tree = json.loads((copied / "session.json").read_text())
  (copied / "session.json").write_text(json.dumps(dict(reversed(tree.items())), indent=8))
  assert Session.load(sampler_of("float32"), copied).block == len(MADE)


def changed(**sections: dict[str, object]) -> Experiment:
  config = from_json(to_json(sampler_of("float32").experiment))
  for section, values in sections.items():
    for name, value in values.items():
      setattr(getattr(config, section), name, value)
  return from_flags(config)


@pytest.mark.parametrize(
  ("sections", "message"),
  [
    ({"sample": {"steps": 3}}, r"sample\.steps=3 there, 2 here$"),
    ({"sample": {"window_latents": 8}}, r"sample\.window_latents=8 there, 6 here$"),
    ({"sample": {"cut_prefix": ""}}, r"sample\.cut_prefix='' there, 'Cut. ' here$"),
    ({"model": {"layers": 1}}, r"model\.layers=1 there, 2 here$"),
    ({"quant": {"cache": "nvfp4"}}, r"quant\.cache='nvfp4' there, 'none' here$"),
    ({"video": {"width": 32}}, r"video\.width=32 there, 64 here$"),
    (
      {"model": {"layers": 1, "shift": 1.0}, "sample": {"steps": 3, "guidance": 2.0}},
      r"model\.layers=1 .*; model\.shift=.*; sample\.steps=3 there, 2 here and 1 more$",
    ),
  ],
)
def test_a_session_of_another_experiment_is_refused_by_the_setting(
  copied: Path, sections: dict, message: str
):
  (copied / "config.json").write_text(to_json(changed(**sections)))
  with pytest.raises(ValueError, match=f"copied' is of another experiment: {message}"):
    Session.load(sampler_of("float32"), copied)


def test_settings_of_speed_and_of_training_do_not_matter(copied: Path):
  free = {
    "sample": {"seed": 4, "decode_latents": 1, "unroll_layers": "on"},
    "quant": {"kernels": "off"},
    "parallel": {"seq": 2},
    "train": {"lr": 1.0},
  }
  (copied / "config.json").write_text(to_json(changed(**free)))
  assert Session.load(sampler_of("float32"), copied).block == len(MADE)


def test_other_weights_are_logged(folder: Path, caplog: pytest.LogCaptureFixture):
  here = changed(io={"checkpoint": "other"})
  with caplog.at_level("WARNING"):
    check_settings(folder, sampler_of("float32").experiment, here)
  assert "was made with io.checkpoint='' and goes on with 'other'" in caplog.text


def test_a_sampler_of_other_weights_takes_a_session(folder: Path):
  """Which weights a sampler has is not compared: they may have moved."""
  parts = sampler_of("float32")
  other = Sampler(parts.models)
  other._compiled = parts._compiled
  session = Session.load(other, folder)
  assert session.push("it rises") == len(MADE) and len(session.next_block()) == 4 * BLOCK
