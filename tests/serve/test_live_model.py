"""The server with the smallest real model: its frames are those of a session of the library."""

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from longlive_jax.data.prompts import Script, Shot
from longlive_jax.io.video import read_video, write_video
from longlive_jax.sample.sampler import Sampler
from longlive_jax.sample.session import Session
from longlive_jax.serve.adapter import SamplerBackend
from longlive_jax.serve.contract import Facts
from longlive_jax.serve.frames import decode
from tests.sample.compiles import counting
from tests.sample.tiny import experiment, models
from tests.serve.running import Running, running, wait_for

CONFIG = experiment()


@pytest.fixture(scope="module")
def backend() -> SamplerBackend:
  made = SamplerBackend(Sampler(models(CONFIG)), rewind_blocks=3)
  made.warm_up()
  return made


@contextlib.contextmanager
def serving(backend: SamplerBackend, folder: Path) -> Iterator[Running]:
  with running(backend, facts=Facts.of(CONFIG), state_dir=folder) as run:
    yield run


def frames_of(messages) -> np.ndarray:
  return np.concatenate([decode(message) for message in messages])


def test_a_live_session_is_that_of_the_library(backend: SamplerBackend, tmp_path: Path):
  facts, session = Facts.of(CONFIG), Session(backend.sampler, seed=7)
  session.push("a circle")
  expected = [session.next_block(), session.next_block()]
  session.push("it rises")
  expected.append(session.next_block())
  session.cut("a square")
  expected.append(session.next_block())
  with counting() as counts, serving(backend, tmp_path) as run:  # noqa: SIM117
    with run.viewer("a circle", seed=7) as viewer:
      np.testing.assert_array_equal(frames_of(viewer.block()), expected[0])
      np.testing.assert_array_equal(frames_of(viewer.block()), expected[1])
      viewer.say("prompt", text="it rises")
      assert viewer.event("prompt_received")["takes_effect_block"] == 2
      viewer.say("played", position=facts.first_frame(1))
      np.testing.assert_array_equal(frames_of(viewer.block()), expected[2])
      viewer.say("cut", text="a square")
      viewer.event("prompt_received")
      viewer.say("played", position=facts.first_frame(2))
      np.testing.assert_array_equal(frames_of(viewer.block()), expected[3])
      viewer.say("rewind", block=2)
      assert viewer.event("rewound")["block"] == 2
      viewer.messages.clear()
      np.testing.assert_array_equal(frames_of(viewer.block()), expected[2])
      viewer.block()
      viewer.say("fork", block=2)
      forked = viewer.event("forked")
      with run.resumed(forked["session"]) as other:
        np.testing.assert_array_equal(frames_of(other.block()), expected[2])
  assert counts["compilations"] == 0
  session.close()
  session = Session(backend.sampler, seed=7)  # block 3 was made again, too, without the cut
  session.push("a circle")
  session.next_block(), session.next_block()
  session.push("it rises")
  expected = [session.next_block(), session.next_block()]
  session.cut("a square")
  expected.append(session.next_block())
  with serving(backend, tmp_path) as run, run.resumed(viewer.session["id"]) as again:
    assert (again.session["prompt"], again.session["block"]) == ("it rises", 4)
    again.say("cut", text="a square")
    again.say("played", position=facts.first_frame(3))
    for block in expected:
      np.testing.assert_array_equal(frames_of(again.block()), block)
  session.close()


def test_a_video_is_that_of_the_sampler(backend: SamplerBackend, tmp_path: Path):
  shots = (Shot("a circle", 2), Shot("it rises", 1, transition="keep"), Shot("a square", 1))
  script = Script(shots, seed=7)
  write_video(tmp_path / "expected.mp4", backend.sampler.stream(script), CONFIG.video.fps)
  with serving(backend, tmp_path / "state") as run, run.http() as client:
    video = client.post("/v1/videos", json={"script": script.to_json()}).json()
    url = f"/v1/videos/{video['id']}"
    wait_for(lambda: client.get(url).json()["status"] == "completed")
    (tmp_path / "made.mp4").write_bytes(client.get(f"{url}/content").content)
    long = client.post("/v1/videos", json={"prompt": 30 * "x"})
    assert long.status_code == 400 and "tokens" in long.json()["error"]["message"]
  expected, made = read_video(tmp_path / "expected.mp4"), read_video(tmp_path / "made.mp4")
  assert made.shape == expected.shape  # x264 is not the same to the bit from run to run
  assert np.abs(made.astype(int) - expected).mean() < 1.0


def view_and_stop(backend: SamplerBackend, folder: Path) -> None:
  with serving(backend, folder) as run:
    for _ in range(3):
      with run.viewer("a circle") as viewer:
        viewer.block()
        viewer.say("stop")
        assert viewer.close_code() == 1000
    wait_for(lambda: not run.service.sessions.live)


def test_sessions_of_the_model_leave_no_arrays(backend: SamplerBackend, tmp_path: Path):
  gc.collect()
  before = len(jax.live_arrays())
  view_and_stop(backend, tmp_path)
  gc.collect()
  assert len(jax.live_arrays()) <= before


@pytest.mark.parametrize("prompt", ["&#32;", "\u200b", "\ud800"])
def test_a_prompt_that_says_nothing_is_refused_as_in_the_library(
  backend: SamplerBackend, tmp_path: Path, prompt: str
):
  with pytest.raises(ValueError, match="must be text that is not empty|are no text") as caught:
    Session(backend.sampler, seed=7).push(prompt)
  shots = [{"prompt": "a"}, {"prompt": prompt, "transition": "cut"}]
  headers = {"content-type": "application/json"}
  with serving(backend, tmp_path) as run, run.http() as client:
    for body in ({"prompt": prompt}, {"script": {"shots": shots}}):
      answer = client.post("/v1/videos", content=json.dumps(body), headers=headers)
      assert answer.status_code == 400, answer.text
      message = answer.json()["error"]["message"]
      assert message == str(caught.value) or "no text" in message
