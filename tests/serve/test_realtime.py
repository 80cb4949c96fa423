"""Live sessions over the WebSocket: prompts, flow control, forks, rewinds, ends."""

import base64
import contextlib
import dataclasses
import io
import json
import threading
import time

import numpy as np
import pytest
import websockets.exceptions
from PIL import Image

from longlive_jax.serve.frames import Form, decode, encode_frame
from longlive_jax.serve.hosted import Hosted, Residents
from tests.serve.fake import FACTS, FakeBackend, FakeSession, picture
from tests.serve.running import QUICK, Running, Viewer, running, wait_for


@pytest.fixture(scope="module")
def server():
  with running() as run:
    yield run


def frames_of(messages) -> np.ndarray:
  return np.concatenate([decode(message) for message in messages])


def test_frames_decode_to_the_pictures_that_the_session_made(server: Running):
  with server.viewer("a red circle", seed=7) as viewer:
    first, second = viewer.block(), viewer.block()
  np.testing.assert_array_equal(frames_of(first), picture(7, 0, "a red circle"))
  np.testing.assert_array_equal(frames_of(second), picture(7, 1, "a red circle"))
  assert [m.first_frame for m in first] == [0, 3]
  assert [m.first_frame for m in second] == [5, 8, 11]
  assert [len(m.images) for m in second] == [3, 3, 2]
  assert [m.last for m in second] == [False, False, True]
  kinds = [event["type"] for event in viewer.events]
  assert kinds[:2] == ["session", "block_started"]
  assert kinds.index("frames") < kinds.index("stats")
  header = next(event for event in viewer.events if event["type"] == "frames")
  size = sum(len(image) for m in first for image in m.images)
  expected = {"block": 0, "first_frame": 0, "count": 5, "messages": 2, "format": "webp"}
  assert {name: header[name] for name in expected} == expected
  assert header["bytes"] == size + 2 * 16 + 4 * 5


def test_generation_follows_the_viewer(server: Running):
  with server.viewer(seed=11) as viewer:
    viewer.block(), viewer.block()
    assert viewer.event("waiting")["reason"] == "viewer"
    time.sleep(0.1)
    made = [block for seed, block in server.backend.log if seed == 11]
    assert made == [0, 1]
    viewer.say("played", position=FACTS.first_frame(1) - 1)  # not the whole block
    viewer.say("played", position=FACTS.first_frame(1))
    viewer.block()
    assert viewer.event("waiting")["reason"] == "viewer"
    made = [block for seed, block in server.backend.log if seed == 11]
    assert made == [0, 1, 2]
    viewer.say("seek", position=0)
    viewer.say("played", position=FACTS.first_frame(2))  # one block more than before
    viewer.block()
    assert len(viewer.messages) and viewer.messages[-1].block == 3


def test_what_was_not_sent_cannot_have_been_played(server: Running):
  with server.viewer() as viewer:
    viewer.block(), viewer.block()
    for position in (FACTS.first_frame(2) + 1, -1, 2**52):
      viewer.say("played", position=position, id="x")
      error = viewer.event("error")
      assert (error["code"], error["id"]) == ("bad_position", "x")
    viewer.say("played", position=FACTS.first_frame(2))
    viewer.block()


def test_a_prompt_says_at_which_block_it_takes_effect(server: Running):
  with server.viewer("one", seed=3) as viewer:
    viewer.block(), viewer.block()
    viewer.say("prompt", text="another", id=5)
    told = viewer.event("prompt_received")
    assert told == {"type": "prompt_received", "id": 5, "takes_effect_block": 2}
    viewer.say("prompt", text="a third one", transition="recache", id="n")
    assert viewer.event("prompt_received")["id"] == "n"
    viewer.say("cut", text="at last")
    assert viewer.event("prompt_received")["takes_effect_block"] == 2
    viewer.unseen.clear()
    viewer.say("played", position=FACTS.first_frame(2))
    started = viewer.event("block_started")
    assert started == {"type": "block_started", "block": 2, "prompt": "at last"}
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(3, 2, "at last"))


def test_while_paused_nothing_is_made(server: Running):
  with server.viewer(seed=21) as viewer:
    viewer.block(), viewer.block()
    viewer.say("pause")
    assert viewer.event("waiting")["reason"] == "viewer"
    viewer.say("played", position=FACTS.first_frame(2))
    assert viewer.event("waiting")["reason"] == "paused"
    time.sleep(0.1)
    assert [block for seed, block in server.backend.log if seed == 21] == [0, 1]
    viewer.say("resume")
    assert viewer.block()[0].block == 2


def test_a_fork_goes_on_by_itself(server: Running):
  with server.viewer("one", seed=4) as viewer:
    viewer.block(), viewer.block()
    viewer.say("fork", block=1, id=1)
    forked = viewer.event("forked")
    assert forked["block"] == 1 and forked["session"] != viewer.session["id"]
    with server.websocket() as socket:
      other = Viewer(socket)
      other.say("resume_session", id=forked["session"])
      session = other.event("session")
      assert session["block"] >= 1 and session["position"] == FACTS.first_frame(1)
      np.testing.assert_array_equal(frames_of(other.block()), picture(4, 1, "one"))
      other.say("stop")
      assert other.close_code() == 1000
    viewer.say("fork")
    assert viewer.event("forked")["block"] == 2
    viewer.say("fork", block=9)
    assert viewer.event("error")["code"] == "bad_block"


def test_going_back_makes_blocks_again(server: Running):
  with server.viewer("one", seed=5) as viewer:
    viewer.block(), viewer.block()
    viewer.say("prompt", text="two")
    viewer.say("rewind", block=1, id=8)
    rewound = viewer.event("rewound")
    assert rewound == {"type": "rewound", "id": 8, "block": 1, "first_frame": 5}
    viewer.messages.clear()
    np.testing.assert_array_equal(frames_of(viewer.block()), picture(5, 1, "two"))
    viewer.say("rewind", block=7)
    assert viewer.event("error")["code"] == "bad_block"
    viewer.say("played", position=FACTS.first_frame(2))
    for block in (2, 3):
      assert viewer.block()[0].block == block
    viewer.say("played", position=FACTS.first_frame(4))
    for block in (4, 5):
      assert viewer.block()[0].block == block
    viewer.say("rewind", block=0)
    error = viewer.event("error")
    assert error["code"] == "bad_block" and "oldest block" in error["message"]


def test_stopping_frees_the_session():
  with running() as run, run.viewer() as viewer:
    viewer.block()
    viewer.say("stop")
    assert viewer.event("ended")["reason"] == "stopped"
    assert viewer.close_code() == 1000
    wait_for(lambda: run.backend.closed == run.backend.made == 1)
    with run.websocket() as socket:
      again = Viewer(socket)
      again.say("resume_session", id=viewer.session["id"])
      assert again.event("error")["code"] == "unknown_session"
      assert again.close_code() == 4404
    assert all(name.startswith("model") for name in run.backend.threads)
    assert len(run.backend.threads) == 1


def test_a_lost_connection_goes_on_where_it_was(server: Running):
  with server.viewer("one", seed=6) as viewer:
    viewer.block(), viewer.block()
    viewer.say("played", position=FACTS.first_frame(1))
    viewer.block()
    viewer.socket.socket.close()  # no goodbye
  with server.websocket() as socket:
    again = Viewer(socket)
    again.say("resume_session", id=viewer.session["id"], position=FACTS.first_frame(1) + 1)
    session = again.event("session")
    assert (session["block"], session["seed"]) == (3, 6)
    np.testing.assert_array_equal(frames_of(again.block()), picture(6, 1, "one"))
    np.testing.assert_array_equal(frames_of(again.block()), picture(6, 2, "one"))
    again.say("played", position=FACTS.first_frame(3))
    np.testing.assert_array_equal(frames_of(again.block()), picture(6, 3, "one"))


def test_a_second_connection_takes_over(server: Running):
  with server.viewer() as viewer, server.websocket() as socket:
    other = Viewer(socket)
    other.say("resume_session", id=viewer.session["id"])
    other.event("session")
    assert viewer.event("error")["code"] == "taken_over"
    assert viewer.close_code() == 4409
    other.block()


def test_a_position_beyond_the_end_counts_as_the_end(server: Running):
  with server.viewer("one", seed=31) as viewer:
    viewer.block(), viewer.block()
    assert viewer.event("waiting")["reason"] == "viewer"
  with server.resumed(viewer.session["id"], position=FACTS.first_frame(9)) as again:
    assert again.session["block"] == 2
    assert [again.block()[0].block for _ in range(3)] == [0, 1, 2]  # all made counts as shown
    again.say("seek", position=FACTS.first_frame(9))
    error = again.event("error")
    assert error["code"] == "bad_position" and "must be from 0 to" in error["message"]


def test_a_position_that_cannot_be_takes_nothing_from_the_viewer(server: Running):
  with server.viewer() as viewer:
    viewer.block(), viewer.block()
    for position, code in ((-5, "bad_position"), (1.5, "bad_message")):
      with server.websocket() as socket:
        other = Viewer(socket)
        other.say("resume_session", id=viewer.session["id"], position=position)
        assert other.receive()["code"] == code
        assert other.close_code() == 4400
    viewer.say("played", position=FACTS.first_frame(1))
    viewer.block()


def test_an_error_of_the_server_is_told_and_the_session_can_be_resumed(
  server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
  def broken(self, paused):
    raise KeyError("odd")

  monkeypatch.setattr("longlive_jax.serve.live.Live.pause", broken)
  with server.viewer() as viewer:
    viewer.say("pause")
    error = viewer.event("error")
    assert error["code"] == "internal_error" and "odd" not in error["message"]
    assert viewer.close_code() == 1011
  with server.resumed(viewer.session["id"]) as again:
    again.block()
  wait_for(lambda: [r for r in caplog.records if r.exc_info])
  assert len([r for r in caplog.records if r.exc_info]) == 1


def test_a_model_that_fails_ends_one_session_alone():
  with running() as run, run.viewer("good") as good, run.viewer("explode") as bad:
    error = bad.event("error")
    assert error["code"] == "model_failed" and "not finite" in error["message"]
    assert bad.event("ended")["reason"] == "failed"
    assert bad.close_code() == 1011
    good.block(), good.block()
    good.say("prompt", text="refused by the model", id=3)
    error = good.event("error")
    assert (error["code"], error["id"]) == ("bad_request", 3)
    good.say("played", position=FACTS.first_frame(2))
    good.block()
    wait_for(lambda: run.backend.closed == 1)
    good.say("prompt", text="broken")
    error = good.event("error")
    assert error["code"] == "model_failed" and "KeyError" in error["message"]
    assert "something odd" not in error["message"]
    assert good.close_code() == 1011
    with run.viewer("another") as third:
      third.block()


def test_a_session_ends_when_it_is_long_enough():
  limits = dataclasses.replace(QUICK, seconds=1.0, ahead=9)
  with running(limits=limits) as run, run.viewer() as viewer:
    assert viewer.session["most_blocks"] == 3
    ended = viewer.event("ended")
    assert ended == {"type": "ended", "reason": "length", "saved": False}
    assert [m.block for m in viewer.messages if m.last] == [0, 1, 2]
    assert viewer.close_code() == 1000
    wait_for(lambda: run.backend.closed == 1)


def test_sessions_without_a_client_give_way():
  limits = dataclasses.replace(QUICK, sessions=2)
  with running(limits=limits) as run, run.viewer() as first:
    with run.viewer() as second:
      with run.websocket() as socket:
        third = Viewer(socket)
        third.say("start", prompt="no room")
        assert third.event("error")["code"] == "too_many_sessions"
        assert third.close_code() == 4429
      assert run.backend.made == 2
    wait_for(lambda: run.service.sessions.live[second.session["id"]].gone_at)
    with run.viewer():
      pass
    first.say("stop")
    assert first.close_code() == 1000
    assert second.session["id"] not in run.service.sessions.live


def test_a_client_that_does_not_come_back_is_forgotten(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("longlive_jax.serve.service.TEND_SECONDS", 0.02)
  limits = dataclasses.replace(QUICK, resume_seconds=0.1, park_seconds=0.02)
  with running(limits=limits) as run:
    with run.viewer() as viewer:
      viewer.block(), viewer.block()
      wait_for(lambda: run.backend.parked == 1)
      viewer.say("played", position=FACTS.first_frame(2))
      assert viewer.block()[0].block == 2  # it has come back
    wait_for(lambda: run.backend.closed == 1)
    assert not run.service.sessions.live


def test_more_sessions_than_the_accelerator_holds_take_turns_on_it():
  limits = dataclasses.replace(QUICK, resident_sessions=2)
  with running(limits=limits) as run, contextlib.ExitStack() as stack:
    viewers = [stack.enter_context(run.viewer("one", seed=seed)) for seed in range(4)]
    for block in range(6):
      for seed, viewer in enumerate(viewers):
        np.testing.assert_array_equal(frames_of(viewer.block()), picture(seed, block, "one"))
        viewer.say("played", position=FACTS.first_frame(block + 1))
    assert run.backend.most_awake == 2
    for viewer in viewers:
      viewer.say("stop")
      assert viewer.close_code() == 1000
    wait_for(lambda: run.backend.closed == 4)
    assert run.backend.parked == 0


def test_a_fork_finds_room_where_one_session_has_it():
  limits = dataclasses.replace(QUICK, resident_sessions=1)
  with running(limits=limits) as run, run.viewer("one", seed=4) as viewer:
    viewer.block(), viewer.block()
    viewer.say("fork", block=1)
    with run.resumed(viewer.event("forked")["session"]) as other:
      for block in (1, 2):
        np.testing.assert_array_equal(frames_of(other.block()), picture(4, block, "one"))
      viewer.say("played", position=FACTS.first_frame(2))
      np.testing.assert_array_equal(frames_of(viewer.block()), picture(4, 2, "one"))
    assert run.backend.most_awake == 1


def test_a_session_that_cannot_be_parked_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch):
  def lost(self: FakeSession) -> None:
    raise ValueError("block 3 was interrupted")

  monkeypatch.setattr(FakeSession, "park", lost)
  backend, residents = FakeBackend(), Residents(1)
  first, second = (Hosted(lambda: backend.new(1, None), residents) for _ in range(2))
  first.wake()
  assert second.next_block().block == 0
  assert (first.state, second.state) == ("awake", "awake")  # the first is about to be closed


def test_frames_are_encoded_by_several_threads_and_never_by_that_of_the_model(monkeypatch):
  threads: list[str] = []

  def encode(frame: np.ndarray, form: Form) -> bytes:
    threads.append(threading.current_thread().name)
    time.sleep(0.001)
    return encode_frame(frame, form)

  monkeypatch.setattr("longlive_jax.serve.frames.encode_frame", encode)
  with running() as run, run.viewer(seed=2) as viewer:
    for block in range(2):
      np.testing.assert_array_equal(
        frames_of(viewer.block()), picture(2, block, viewer.session["prompt"])
      )
  assert {name.rpartition("_")[0] for name in threads} == {"encoder"}
  assert len(set(threads)) == 2


def test_what_can_be_asked_of_the_model_and_what_was_said_can_be_read(server: Running):
  with server.viewer("one") as viewer, server.http() as client:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == FACTS.name and model["limits"]["rewind_blocks"] == 3
    viewer.block(), viewer.block()
    viewer.say("cut", text="two")
    viewer.say("played", position=FACTS.first_frame(2))
    viewer.block(), viewer.block()
    viewer.say("prompt", text="three", transition="recache")
    for _ in range(2):
      viewer.event("prompt_received")
    found = client.get(f"/v1/sessions/{viewer.session['id']}").json()
    assert (found["block"], found["prompt"]) == (4, "three")
    assert found["prompts"] == [
      {"block": 0, "text": "one", "transition": "keep"},
      {"block": 2, "text": "two", "transition": "cut"},
      {"block": 4, "text": "three", "transition": "recache"},
    ]
    viewer.say("rewind", block=2)
    viewer.event("rewound")
    found = client.get(f"/v1/sessions/{viewer.session['id']}").json()
    assert [said["text"] for said in found["prompts"]] == ["one", "two"]


def test_the_first_frame_may_be_given(server: Running):
  image = np.full((64, 128, 3), [9, 200, 30], np.uint8)
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  text = base64.b64encode(file.getvalue()).decode()
  with server.viewer(image=f"data:image/png;base64,{text}") as viewer:
    frame = frames_of(viewer.block())[0]
  np.testing.assert_array_equal(frame, np.broadcast_to([9, 200, 30], frame.shape))


FIRST = {
  "not json": 4400,
  "[]": 4400,
  '{"type": 5}': 4400,
  '{"type": "strat", "prompt": "a"}': 4400,
  '{"type": "prompt", "text": "a"}': 4400,
  '{"type": "start"}': 4400,
  '{"type": "start", "prompt": 7}': 4400,
  '{"type": "start", "prompt": " "}': 4400,
  '{"type": "start", "prompt": "\\ud800"}': 4400,
  '{"type": "start", "prompt": "a", "seed": -1}': 4400,
  '{"type": "start", "prompt": "a", "seed": 1.5}': 4400,
  '{"type": "start", "prompt": "a", "seed": true}': 4400,
  '{"type": "start", "prompt": "a", "seed": 1e400}': 4400,
  '{"type": "start", "prompt": "a", "seed": NaN}': 4400,
  '{"type": "start", "prompt": "a", "image": "!"}': 4400,
  '{"type": "start", "prompt": "a", "image": "aGVsbG8="}': 4400,
  '{"type": "start", "prompt": "a", "promt": "b"}': 4400,
  '{"type": "start", "prompt": "' + 2001 * "a" + '"}': 4400,
  '{"type": "start", "prompt": "' + 1001 * "a" + '"}': 4400,  # too many tokens
  '{"type": "resume_session", "id": "../../etc/passwd"}': 4404,
  '{"type": "resume_session", "id": "session_' + 32 * "0" + '"}': 4404,
  100_000 * "[": 4400,
  '{"type": "start", "prompt": "a", "seed": ' + 5000 * "9" + "}": 4400,
  '{"type": "start", "prompt": "a", "seed": ' + 400 * "9" + "}": 4400,
}


@pytest.mark.parametrize("text", FIRST, ids=lambda text: text[:50])
def test_a_wrong_first_message_ends_the_connection(server: Running, text):
  with server.websocket() as socket:
    viewer = Viewer(socket)
    socket.send(text)
    error = viewer.event("error")
    assert len(error["message"]) < 400
    assert viewer.close_code() == FIRST[text]


def test_text_that_is_none_ends_the_connection_without_a_word_in_the_log(server: Running, caplog):
  for parts in (b"\xff", [b"caf\xc3", b"\xff"]):
    with server.websocket() as socket:
      socket.send(parts, text=True)
      assert Viewer(socket).close_code() == 1007
  with server.websocket() as socket:
    socket.send([b'{"type": "start", "prompt": "caf\xc3', b'\xa9"}'], text=True)
    assert Viewer(socket).event("session")["prompt"] == "caf\u00e9"
  assert not caplog.records


def test_other_ways_to_lose_a_connection(server: Running):
  with server.websocket() as socket:
    socket.send(b"binary")
    assert Viewer(socket).close_code() == 4415
  with server.websocket() as socket:
    with contextlib.suppress(websockets.exceptions.ConnectionClosed):
      socket.send("x" * (QUICK.request_bytes + 1))
    assert Viewer(socket).close_code() == 1009
  with server.websocket() as socket:
    assert Viewer(socket).close_code() == 4408  # nothing was said
  with server.viewer() as viewer:
    viewer.socket.send(b"binary")
    assert viewer.close_code() == 4415


def test_a_wrong_message_is_told_and_the_session_goes_on(server: Running):
  wrong = [
    ("not json", "bad_json"),
    ('{"type": "start", "prompt": "a"}', "bad_message"),
    ('{"type": "prompt", "text": ""}', "bad_prompt"),
    ('{"type": "prompt", "text": "a", "transition": "keeep"}', "bad_message"),
    ('{"type": "played"}', "bad_message"),
    ('{"type": "rewind", "block": -1}', "bad_block"),
    ('{"type": "pause", "id": {}}', "bad_message"),
    ('{"type": "save"}', "not_saved"),
  ]
  with server.viewer() as viewer:
    viewer.block(), viewer.block()
    for text, code in wrong:
      viewer.socket.send(text)
      assert viewer.event("error")["code"] == code
    viewer.say("played", position=FACTS.first_frame(1))
    viewer.block()


def test_a_client_that_talks_too_fast_is_cut_off():
  limits = dataclasses.replace(QUICK, messages_a_second=5.0)
  with running(limits=limits) as run, run.viewer() as viewer:
    with contextlib.suppress(websockets.exceptions.ConnectionClosed):
      for _ in range(20):
        viewer.say("played", position=0)
    assert viewer.event("error")["code"] == "too_fast"
    assert viewer.close_code() == 4429


def test_a_client_that_does_not_read_stalls_nobody():
  large = dataclasses.replace(FACTS, width=512, height=512)
  backend = FakeBackend(facts=large)
  limits = dataclasses.replace(QUICK, ahead=2)
  with (
    running(backend, limits=limits, facts=large, form=Form()) as run,
    run.viewer("slow", seed=1) as slow,
    run.viewer("fast", seed=2) as fast,
  ):
    for block in range(20):
      assert fast.block()[0].block == block
      fast.messages.clear()
      fast.say("played", position=large.first_frame(block + 1))
    assert [b for seed, b in backend.log if seed == 1] == [0, 1]
    slow.block()


def test_json_events_are_json(server: Running):
  with server.viewer("caf\u00e9 \N{CLAPPER BOARD}") as viewer:
    assert viewer.event("block_started")["prompt"] == "caf\u00e9 \N{CLAPPER BOARD}"
    assert json.dumps(viewer.session)
