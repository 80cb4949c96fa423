"""Files that cannot be removed, deletions under way, and saved sessions that are damaged."""

import dataclasses
import errno
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longlive_jax.serve.card import Card
from longlive_jax.serve.errors import Seldom
from longlive_jax.serve.server import take_folder
from longlive_jax.serve.shelf import Shelf
from longlive_jax.serve.video_files import VideoFiles
from tests.serve.fake import FACTS, FakeBackend
from tests.serve.running import QUICK, Running, Viewer, running, wait_for

ID = "session_" + 32 * "a"
TEND, RETRY = "longlive_jax.serve.service.TEND_SECONDS", "longlive_jax.serve.saver.RETRY_SECONDS"


@dataclasses.dataclass
class Files:
  """While `stuck`, files and folders of saved sessions and videos cannot be removed."""

  stuck: bool = True

  def check(self, path: Path) -> None:
    """Raises PermissionError if it is so."""
    if self.stuck and {"sessions", "videos"} & set(Path(path).parts):
      raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.fixture(params=["the first file", "the folder"])
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Files:
  made, unlink, rmtree = Files(), Path.unlink, shutil.rmtree

  def no_unlink(path: Path, missing_ok: bool = False) -> None:
    if path.name in ("session.json", "video.json"):
      made.check(path)
    unlink(path, missing_ok)

  def no_rmtree(path: Path, *arguments, **options) -> None:
    made.check(path)
    rmtree(path, *arguments, **options)

  if request.param == "the first file":
    monkeypatch.setattr(Path, "unlink", no_unlink)
  else:
    monkeypatch.setattr(shutil, "rmtree", no_rmtree)
  return made


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[logging.LogRecord]:
  """What the log says about something; always without a traceback."""
  found = [record for record in caplog.records if text in record.getMessage()]
  assert not any(record.exc_info or "\n" in record.getMessage() for record in found)
  return found


def saved(run: Running, *, live: bool = False) -> str:
  """The id of a session that has been saved, and may be live."""
  with run.viewer("a") as viewer:
    viewer.block(), viewer.block()
    viewer.say("save")
    viewer.event("saved")
    if not live:
      viewer.say("stop")
      assert viewer.close_code() == 1000
  return viewer.session["id"]


def video(client, **fields: object) -> str:
  """The id of a video that is finished."""
  name = client.post("/v1/videos", json={"prompt": "a", "seconds": 0.2} | fields).json()["id"]
  wait_for(lambda: client.get(f"/v1/videos/{name}").json()["status"] == "completed")
  return name


def assert_stays(client, url: str) -> None:
  """A deletion is refused, and nothing is said to be deleted."""
  answer = client.delete(url)
  error = answer.json()["error"]
  assert (answer.status_code, error["code"]) == (507, "not_removed")
  assert "cannot be removed" in error["message"] and "/" not in error["message"]
  assert client.get(url).status_code == 200
  listed = client.get(url.rpartition("/")[0]).json()["data"]
  assert url.rpartition("/")[2] in [item["id"] for item in listed]


@pytest.mark.parametrize("kind", ["video", "saved session", "live session"])
def test_what_cannot_be_removed_is_not_deleted(files: Files, caplog, tmp_path: Path, kind):
  with running(state_dir=tmp_path) as run, run.http() as client:
    name = video(client) if kind == "video" else saved(run, live=kind == "live session")
    url = f"/v1/{'videos' if kind == 'video' else 'sessions'}/{name}"
    assert_stays(client, url)
    assert_stays(client, url)
    assert len(lines(caplog, f"{name} cannot be removed: ")) == 1
    files.stuck = False
    assert client.delete(url).json()["deleted"] and client.get(url).status_code == 404
    assert not list(tmp_path.glob("*/*_*"))


def test_a_video_that_is_cancelled_but_cannot_be_removed_has_failed(files: Files, tmp_path: Path):
  backend = FakeBackend(block_seconds=0.02)
  with running(backend, state_dir=tmp_path) as run, run.http() as client:
    name = client.post("/v1/videos", json={"prompt": "a", "seconds": 60}).json()["id"]
    assert_stays(client, f"/v1/videos/{name}")
    assert client.get(f"/v1/videos/{name}").json()["status"] == "failed"
    assert backend.made == backend.closed
    files.stuck = False


def test_a_video_is_made_though_the_oldest_cannot_be_dropped(files: Files, caplog, tmp_path: Path):
  limits = dataclasses.replace(QUICK, videos_kept=1)
  with running(limits=limits, state_dir=tmp_path) as run, run.http() as client:
    names = [video(client, seed=seed) for seed in range(4)]
    kept = [item["id"] for item in client.get("/v1/videos").json()["data"]]
    assert kept == names[::-1]
    for name in names[:2]:  # which was to go when the third, or the fourth began
      assert len(lines(caplog, f"{name} cannot be removed: ")) == 1
    files.stuck = False
    last = video(client)
    assert [item["id"] for item in client.get("/v1/videos").json()["data"]] == [last, names[-1]]


def test_one_file_that_stays_does_not_stop_the_rest(files: Files, caplog, monkeypatch, tmp_path):
  monkeypatch.setattr(TEND, 0.02)
  limits = dataclasses.replace(QUICK, saved_sessions=1, park_seconds=0.05, resume_seconds=0.3)
  with running(limits=limits, state_dir=tmp_path) as run, run.http() as client:
    oldest = saved(run)
    saved(run)
    wait_for(lambda: lines(caplog, f"{oldest} cannot be removed: "))
    with run.viewer("b") as viewer:
      viewer.block(), viewer.block()
      live = run.service.sessions.live[viewer.session["id"]]
      wait_for(lambda: live.hosted.state == "parked")
    wait_for(lambda: viewer.session["id"] not in run.service.sessions.live)
    assert client.get(f"/v1/sessions/{oldest}").status_code == 200
    monkeypatch.setattr(RETRY, 0.05)
    time.sleep(0.2)
    assert len(lines(caplog, f"{oldest} cannot be removed: ")) == 1
    files.stuck = False
    wait_for(lambda: not (tmp_path / "sessions" / oldest).exists())
    assert client.get(f"/v1/sessions/{oldest}").status_code == 404


def test_what_is_expired_stays_unknown_and_is_removed_later(files: Files, monkeypatch, tmp_path):
  monkeypatch.setattr(TEND, 0.02)
  limits = dataclasses.replace(QUICK, disk_seconds=0.05, resume_seconds=0.2)
  with running(limits=limits, state_dir=tmp_path) as run, run.http() as client:
    with run.viewer("a") as viewer:
      viewer.block(), viewer.block()
      live = run.service.sessions.live[viewer.session["id"]]
      wait_for(lambda: live.hosted.state == "disk")
    wait_for(lambda: run.service.sessions.saver.unwanted)
    assert client.get(f"/v1/sessions/{live.card.id}").status_code == 404
    assert client.get("/v1/sessions").json()["data"] == []
    monkeypatch.setattr(RETRY, 0.05)
    files.stuck = False
    wait_for(lambda: not any((tmp_path / "sessions").iterdir()))
    wait_for(lambda: not run.service.sessions.saver.unwanted)


def test_a_server_starts_beside_what_cannot_be_removed(caplog, monkeypatch, tmp_path: Path):
  for folder in (tmp_path / "sessions" / ID, tmp_path / "videos" / ("video_" + 32 * "a")):
    folder.mkdir(parents=True)  # half removed
  monkeypatch.setattr(shutil, "rmtree", lambda path, **options: Files().check(path))
  assert Shelf(tmp_path / "sessions", 2).cards == {} and not VideoFiles(tmp_path / "videos").load()
  assert len(lines(caplog, "cannot be removed: Permission denied")) == 2


def refused(run: Running, session: str) -> tuple[str, str, int]:
  """Code and message of the error, and close code, of what cannot be resumed."""
  with run.websocket() as socket:
    viewer = Viewer(socket)
    viewer.say("resume_session", id=session)
    error = viewer.event("error")
    return error["code"], error["message"], viewer.close_code()


def test_a_session_is_unknown_as_soon_as_it_is_being_deleted(tmp_path: Path):
  with running(state_dir=tmp_path) as run, run.http() as client, ThreadPoolExecutor(1) as other:
    name, busy = saved(run, live=True), threading.Event()
    run.service.engine._thread.submit(busy.wait, 20.0)  # so that it cannot be freed yet
    deleting = other.submit(client.delete, f"/v1/sessions/{name}")
    wait_for(lambda: name not in run.service.sessions.live)
    with run.http() as second:
      assert second.get(f"/v1/sessions/{name}").status_code == 404
      assert second.get("/v1/sessions").json()["data"] == []
    assert refused(run, name)[::2] == ("unknown_session", 4404)
    busy.set()
    assert deleting.result().status_code == 200
    assert refused(run, name)[::2] == ("unknown_session", 4404)
    assert not any((tmp_path / "sessions").iterdir())


def test_a_session_that_is_deleted_while_it_is_loaded_is_unknown(monkeypatch, tmp_path: Path):
  loading, go, load = threading.Event(), threading.Event(), FakeBackend.load

  def slow(self: FakeBackend, path: Path):
    loading.set()
    assert go.wait(20.0)
    return load(self, path)

  with running(state_dir=tmp_path) as run, run.http() as client, ThreadPoolExecutor(2) as others:
    name = saved(run)
    monkeypatch.setattr(FakeBackend, "load", slow)
    resuming = others.submit(refused, run, name)
    assert loading.wait(20.0)
    deleting = others.submit(client.delete, f"/v1/sessions/{name}")
    wait_for(lambda: name not in run.service.sessions.live)
    go.set()
    assert resuming.result()[::2] == ("unknown_session", 4404)
    assert deleting.result().status_code == 200
    assert client.get(f"/v1/sessions/{name}").status_code == 404
    assert run.backend.made == run.backend.closed


def damaged(self: FakeBackend, path: Path) -> None:
  raise ValueError(f"saved session '{path}' is damaged: 'arrays/000' has 100 bytes, not 6733824")


@pytest.mark.parametrize("part", ["state", "frames", "session"])
def test_a_damaged_session_tells_nothing_of_the_machine(caplog, monkeypatch, tmp_path, part):
  with running(state_dir=tmp_path) as run:
    name = saved(run)
    (file,) = (tmp_path / "sessions" / name).glob(f"{part}*")
    file.write_bytes(file.read_bytes()[:10])
    if part == "state":
      monkeypatch.setattr(FakeBackend, "load", damaged)
    code, message, close = refused(run, name)
    assert (code, close) == ("not_resumable", 4409)
    assert message.startswith("the saved session is damaged")
    assert "/" not in message and "bytes" not in message
    (line,) = lines(caplog, f"session {name} cannot be resumed: ")
    assert part == "session" or file.name in line.getMessage()


def test_a_session_that_went_to_disk_and_is_damaged_tells_no_more(caplog, monkeypatch, tmp_path):
  monkeypatch.setattr(TEND, 0.02)
  monkeypatch.setattr(FakeBackend, "load", damaged)
  limits = dataclasses.replace(QUICK, disk_seconds=0.05)
  with running(limits=limits, state_dir=tmp_path) as run, run.viewer("a") as viewer:
    viewer.block(), viewer.block()
    live = run.service.sessions.live[viewer.session["id"]]
    wait_for(lambda: live.hosted.state == "disk")
    viewer.say("played", position=FACTS.first_frame(2))
    error = viewer.event("error")
    assert error["code"] == "model_failed" and "is damaged" in error["message"]
    assert "/" not in error["message"] and viewer.close_code() == 1011
    assert len(lines(caplog, f"session {live.card.id} failed: ")) == 1


@pytest.mark.parametrize("name", ["sessions", "videos"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name):
  (tmp_path / name).write_text("")
  with pytest.raises(NotADirectoryError, match=f"it is a file; .*/{name}"):
    take_folder(tmp_path)


def full(path: Path, *arguments: object) -> None:
  raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_first_save_on_a_full_disk_leaves_nothing(tmp_path: Path):
  shelf = Shelf(tmp_path, 2)
  with pytest.raises(OSError, match="No space left"):
    shelf.write(Card(ID, "", 1, 2), [], full)
  assert not any(tmp_path.iterdir())


def test_a_later_save_on_a_full_disk_leaves_what_was(monkeypatch, tmp_path: Path):
  shelf = Shelf(tmp_path, 2)
  shelf.write(Card(ID, "", 1, 2), [], lambda path: path.write_text("state"))
  monkeypatch.setattr(Path, "write_bytes", full)
  with pytest.raises(OSError, match="No space left"):
    shelf.write(Card(ID, "", 1, 2), [], lambda path: path.write_text("another"))
  left = sorted(path.name for path in (tmp_path / ID).iterdir())
  assert left == ["frames-1", "session.json", "state-1"]


def test_a_video_on_a_full_disk_leaves_nothing(monkeypatch, tmp_path: Path):
  with running(state_dir=tmp_path) as run, run.http() as client:
    monkeypatch.setattr(Path, "write_text", full)
    answer = client.post("/v1/videos", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "not_saved")
    assert not any((tmp_path / "videos").iterdir())


def test_what_lasts_is_told_once_an_hour(caplog, monkeypatch):
  seldom, now = Seldom(), [0.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  for now[0] in (0.0, 1.0, 3599.0, 3600.0):
    seldom.tell("one", KeyError("x"))
    seldom.tell("two", OSError("y"))
  assert [record.getMessage() for record in caplog.records] == 2 * ["one: KeyError: 'x'", "two: y"]
