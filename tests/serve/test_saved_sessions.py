"""Sessions on disk: saved, found by the next server, whole or not at all."""

import dataclasses
import errno
import gc
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.serve.card import Card, Said
from longlive_jax.serve.frames import decode
from longlive_jax.serve.server import take_folder
from longlive_jax.serve.shelf import Shelf
from tests.serve.fake import FACTS, FakeBackend, FakeSession, picture
from tests.serve.running import QUICK, Running, Viewer, running, wait_for

ID = "session_" + 32 * "a"


def frames_of(messages) -> np.ndarray:
  return np.concatenate([decode(message) for message in messages])


class Process:
  """A server as a process, seen as `Running` sees one in a thread."""

  def __init__(self, folder: Path, *arguments: str):
    command = [sys.executable, "-m", "tests.serve.fake_server", f"--state_dir={folder}"]
    self.process = subprocess.Popen(
      [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    self.run = Running(None, int(self.process.stdout.readline()), None, None)  # type: ignore
    with self.run.http() as client:
      wait_for(lambda: client.get("/readyz").status_code == 200)

  def end(self, sign: int) -> int:
    self.process.send_signal(sign)
    _, errors = self.process.communicate(timeout=20)
    assert "Traceback" not in errors, errors
    return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
  processes: list[Process] = []

  def begin(*arguments: str) -> Process:
    processes.append(Process(tmp_path, *arguments))
    return processes[-1]

  yield begin
  for one in processes:
    if one.process.poll() is None:
      one.process.kill()
      one.process.communicate()


def test_a_signal_saves_what_lives_and_the_next_server_goes_on(start, tmp_path: Path):
  first = start("--block_seconds=0.01")
  with first.run.viewer("one", seed=4) as viewer, first.run.http() as client:
    viewer.block(), viewer.block()
    viewer.say("played", position=FACTS.first_frame(1))
    viewer.block()
    viewer.say("prompt", text="two", transition="recache")
    viewer.event("prompt_received")
    video = client.post("/v1/videos", json={"prompt": "slow", "seconds": 30, "seed": 9}).json()
    assert first.end(signal.SIGTERM) == 0
    assert viewer.event("ended") == {"type": "ended", "reason": "server_stop", "saved": True}
    assert viewer.close_code() == 1012
  assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "sessions", "videos"]
  second = start()
  with second.run.http() as client:
    (listed,) = client.get("/v1/sessions").json()["data"]
    prompts = client.get(f"/v1/sessions/{listed['id']}").json()["prompts"]
    assert prompts == [
      {"block": 0, "text": "one", "transition": "keep"},
      {"block": 3, "text": "two", "transition": "recache"},
    ]
    assert listed["id"] == viewer.session["id"] and listed["status"] == "saved"
    assert (listed["block"], listed["prompt"], listed["connected"]) == (3, "two", False)
    again = client.get(f"/v1/videos/{video['id']}").json()
    assert (again["seed"], again["prompt"]) == (9, "slow")
    wait_for(lambda: client.get(f"/v1/videos/{video['id']}").json()["status"] == "completed")
  with second.run.resumed(listed["id"]) as viewer:
    assert (viewer.session["block"], viewer.session["position"]) == (3, FACTS.first_frame(1))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(4, 1, "one"))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(4, 2, "one"))
    viewer.say("played", position=FACTS.first_frame(2))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(4, 3, "two"))
    viewer.say("stop")
    assert viewer.event("ended")["saved"]  # what the last server saved stays
  assert second.end(signal.SIGTERM) == 0


def test_a_killed_server_leaves_what_was_saved(start, tmp_path: Path):
  first = start()
  with first.run.viewer("one", seed=4) as viewer, first.run.viewer("never saved") as other:
    viewer.block(), viewer.block(), other.block()
    viewer.say("save", id=1)
    assert viewer.event("saved") == {"type": "saved", "id": 1, "block": 2}
    viewer.say("played", position=FACTS.first_frame(2))
    viewer.block()
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
  second = start()
  with second.run.http() as client:
    assert [s["id"] for s in client.get("/v1/sessions").json()["data"]] == [viewer.session["id"]]
  with second.run.resumed(viewer.session["id"]) as again:
    assert again.session["block"] == 2  # as it was saved
    again.block(), again.block()
    again.say("played", position=FACTS.first_frame(2))
    np.testing.assert_array_equal(frames_of(again.block()), picture(4, 2, "one"))


def test_two_servers_never_share_a_folder(start, tmp_path: Path):
  start()
  with pytest.raises(ValueError, match="is in use by another server"):
    take_folder(tmp_path)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
  made = Shelf(tmp_path, 2)
  made.write(card(), [], lambda path: path.write_text("state"))
  return made


def card(session: str = ID, **changes) -> Card:
  return dataclasses.replace(Card(session, "", 1, 2, [Said(0, "a", "keep")], 3), **changes)


def test_a_card_comes_back(shelf: Shelf, tmp_path: Path):
  again = Shelf(tmp_path, 2)
  assert again.cards[ID] == dataclasses.replace(card(), saved_at=again.cards[ID].saved_at)
  assert again.state(ID).read_text() == "state" and again.frames(ID) == []


def test_a_save_that_ends_early_changes_nothing(shelf: Shelf, tmp_path: Path):
  def fails(path: Path) -> None:
    path.write_text("half")
    raise OSError("the disk is full")

  with pytest.raises(OSError, match="the disk is full"):
    shelf.write(card(made=4), [], fails)
  (tmp_path / ID / "state-9").write_text("of a server that was killed")
  again = Shelf(tmp_path, 2)
  assert again.cards[ID].made == 3 and again.state(ID).read_text() == "state"
  assert sorted(path.name for path in (tmp_path / ID).iterdir()) == [
    "frames-1",
    "session.json",
    "state-1",
  ]


def test_the_first_save_that_ends_early_leaves_nothing(tmp_path: Path):
  (tmp_path / ID).mkdir()
  (tmp_path / ID / "state-1").write_text("half")
  assert Shelf(tmp_path, 2).cards == {} and not (tmp_path / ID).exists()


DAMAGED = {
  "": "Expecting value",
  "[]": "list indices",
  '{"card": {}}': "other fields",
  "[" * 100_000: "recursion",
}


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:20])
def test_what_cannot_be_understood_is_left_alone(shelf: Shelf, tmp_path: Path, text):
  (tmp_path / ID / "session.json").write_text(text)
  (tmp_path / "something else").mkdir()
  assert Shelf(tmp_path, 2).cards == {}
  assert (tmp_path / ID / "session.json").read_text() == text


@pytest.mark.parametrize(
  "changes",
  [
    {"seed": -1},
    {"seed": "1"},
    {"prompts": [[0]]},
    {"prompts": [[0, "a", "fade"]]},
    {"made": True},
    {"id": "session_x"},
  ],
)
def test_a_card_of_other_types_is_left_alone(shelf: Shelf, tmp_path: Path, changes):
  file = tmp_path / ID / "session.json"
  tree = json.loads(file.read_text())
  tree["card"] |= changes
  file.write_text(json.dumps(tree))
  assert Shelf(tmp_path, 2).cards == {}


def test_the_oldest_give_way(shelf: Shelf):
  names = ["session_" + 32 * letter for letter in "bcd"]
  for place, name in enumerate(names):
    shelf.write(card(name), [], lambda path: path.write_text("state"))
    shelf.cards[name].saved_at += 10 + place
  assert shelf.surplus([]) == [ID, names[0]]
  assert shelf.surplus([ID]) == names[:2]
  shelf.remove(ID)
  assert ID not in shelf.cards and not (shelf.folder / ID).exists()


def test_an_idle_session_goes_to_disk_and_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path):
  monkeypatch.setattr("longlive_jax.serve.service.TEND_SECONDS", 0.02)
  limits = dataclasses.replace(QUICK, park_seconds=0.02, disk_seconds=0.1)
  with running(limits=limits, state_dir=tmp_path) as run, run.viewer("a", seed=1) as viewer:
    viewer.block(), viewer.block()
    live = run.service.sessions.live[viewer.session["id"]]
    wait_for(lambda: live.hosted.state == "disk")
    assert run.backend.closed == 1
    viewer.say("played", position=FACTS.first_frame(2))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(1, 2, "a"))
    assert run.backend.made == 2
    viewer.say("stop")
    assert viewer.close_code() == 1000
    wait_for(lambda: run.backend.closed == 2)
    wait_for(lambda: not any((tmp_path / "sessions").iterdir()))  # nobody asked to keep it


def test_blocks_are_made_while_a_session_is_written(tmp_path: Path):
  with running(state_dir=tmp_path) as run:
    with run.viewer("a", seed=1) as viewer, run.viewer("b", seed=2) as other:
      viewer.block(), viewer.block(), other.block(), other.block()
      run.backend.disk.clear()
      viewer.say("save", id=1)
      wait_for(lambda: run.backend.writers)
      other.say("played", position=FACTS.first_frame(2))
      other.block(), other.block()
      viewer.say("played", position=FACTS.first_frame(2))
      viewer.block()
      np.testing.assert_array_equal(frames_of(viewer.block()), picture(1, 3, "a"))
      shelf = run.service.sessions.shelf
      assert shelf.cards == {}
      viewer.say("stop")  # comes when it is saved
      run.backend.disk.set()
      assert viewer.event("saved") == {"type": "saved", "id": 1, "block": 2}
      assert viewer.event("ended")["saved"]
    (saved,) = shelf.cards.values()
    assert (saved.made, json.loads(shelf.state(saved.id).read_text())["block"]) == (2, 2)
    assert not any(name.startswith("model") for name in run.backend.writers)


def test_a_session_is_saved_even_if_its_connection_is_lost_meanwhile(tmp_path: Path):
  with running(state_dir=tmp_path) as run:
    with run.viewer("a", seed=1) as viewer:
      viewer.block(), viewer.block()
      run.backend.disk.clear()
      viewer.say("save")
      wait_for(lambda: run.backend.writers)
    live = run.service.sessions.live[viewer.session["id"]]
    wait_for(lambda: live.gone_at)
    run.backend.disk.set()
    wait_for(lambda: run.service.sessions.shelf.cards)


def test_a_session_that_is_deleted_while_it_is_written_is_gone(tmp_path: Path):
  with running(state_dir=tmp_path) as run, run.viewer() as viewer, run.http() as client:
    viewer.block()
    run.backend.disk.clear()
    viewer.say("save")
    wait_for(lambda: run.backend.writers)
    url = f"/v1/sessions/{viewer.session['id']}"
    with ThreadPoolExecutor(1) as other:
      deleting = other.submit(client.delete, url)
      assert viewer.event("ended")["reason"] == "deleted"
      run.backend.disk.set()
      assert deleting.result().status_code == 200
    assert client.get(url).status_code == 404
    assert not any((tmp_path / "sessions").iterdir())


def test_a_session_that_is_used_while_it_goes_to_disk_stays(monkeypatch, tmp_path: Path):
  monkeypatch.setattr("longlive_jax.serve.service.TEND_SECONDS", 0.02)
  limits = dataclasses.replace(QUICK, park_seconds=0.02, disk_seconds=0.1)
  with running(limits=limits, state_dir=tmp_path) as run, run.viewer("a", seed=1) as viewer:
    run.backend.disk.clear()
    viewer.block(), viewer.block()
    live = run.service.sessions.live[viewer.session["id"]]
    wait_for(lambda: run.backend.writers)
    viewer.say("played", position=FACTS.first_frame(2))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(1, 2, "a"))
    run.backend.disk.set()
    wait_for(lambda: live.hosted.state == "disk")  # in the end, once it is idle
    assert json.loads(run.service.sessions.shelf.state(live.card.id).read_text())["block"] == 4
    viewer.say("played", position=FACTS.first_frame(4))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(1, 3, "a"))
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(1, 4, "a"))


def test_a_session_that_was_saved_outlives_its_connection(monkeypatch, tmp_path: Path):
  monkeypatch.setattr("longlive_jax.serve.service.TEND_SECONDS", 0.02)
  limits = dataclasses.replace(QUICK, resume_seconds=0.05)
  with running(limits=limits, state_dir=tmp_path) as run:
    with run.viewer("a", seed=1) as viewer:
      viewer.block(), viewer.block()
      viewer.say("save")
      viewer.event("saved")
      viewer.say("played", position=FACTS.first_frame(2))
      viewer.block(), viewer.block()
    wait_for(lambda: not run.service.sessions.live and run.backend.closed == 1)
    with run.resumed(viewer.session["id"]) as again, run.http() as client:
      assert again.session["block"] == 4  # as it was left, not as it was saved
      again.block()
      assert client.delete(f"/v1/sessions/{viewer.session['id']}").status_code == 200
      assert again.event("ended")["reason"] == "deleted"
    assert not any((tmp_path / "sessions").iterdir())
    assert run.backend.made == run.backend.closed


def test_a_session_that_cannot_be_loaded_is_told(tmp_path: Path):
  backend = FakeBackend()
  with running(backend, state_dir=tmp_path) as run, run.viewer() as viewer:
    viewer.block()
    viewer.say("save")
    viewer.event("saved")
  (state,) = (tmp_path / "sessions" / viewer.session["id"]).glob("state-*")
  state.write_text("{}")
  with running(state_dir=tmp_path) as run, run.websocket() as socket:
    again = Viewer(socket)
    again.say("resume_session", id=viewer.session["id"])
    assert again.event("error")["code"] == "not_resumable"
    assert again.close_code() == 4409
    assert not run.service.sessions.live and len(run.service.sessions.shelf.cards) == 1


def test_a_full_disk_is_told_and_the_session_goes_on(tmp_path: Path, monkeypatch):
  copies: list[weakref.ref] = []

  def snapshot(self: FakeSession) -> Callable[[Path], None]:
    def full(path: Path) -> None:
      raise OSError(errno.ENOSPC, "no space left", str(path))

    copies.append(weakref.ref(full))
    return full

  monkeypatch.setattr(FakeSession, "snapshot", snapshot)
  monkeypatch.setattr("absl.logging.error", lambda *told, **options: None)  # pytest keeps it
  with running(state_dir=tmp_path) as run, run.viewer() as viewer:
    viewer.block(), viewer.block()
    viewer.say("save", id=2)
    error = viewer.event("error")
    assert (error["code"], error["id"]) == ("not_saved", 2)
    wait_for(lambda: gc.collect() >= 0 and copies[0]() is None)  # no error holds it
    viewer.say("played", position=FACTS.first_frame(2))
    viewer.block()
    assert run.service.sessions.shelf.cards == {}
  assert run.backend.made == run.backend.closed == 1
