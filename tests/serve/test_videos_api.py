"""The REST interface: videos from creation to deletion, and everything that it refuses."""

import base64
import dataclasses
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longlive_jax.io.video import read_video
from tests.serve.fake import FakeBackend
from tests.serve.running import QUICK, Running, running, wait_for


@pytest.fixture(scope="module")
def server():
  with running() as run:
    yield run


@pytest.fixture(scope="module")
def client(server: Running):
  with server.http() as http:
    yield http


def finished(client, video: dict) -> dict:
  """The video once nothing changes any more."""
  url = f"/v1/videos/{video['id']}"
  wait_for(lambda: client.get(url).json()["status"] in ("completed", "failed"))
  return client.get(url).json()


def png(width: int = 64, height: int = 32, **options) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (width, height), (9, 200, 30)).save(file, "PNG", **options)
  return file.getvalue()


def test_a_video_from_its_prompt(client, tmp_path: Path):
  answer = client.post("/v1/videos", json={"prompt": "a red circle", "seconds": 1, "seed": 7})
  assert answer.status_code == 200
  video = answer.json()
  assert video["object"] == "video" and video["status"] in ("queued", "in_progress")
  video = finished(client, video)
  expected = {
    "status": "completed",
    "progress": 100,
    "size": "32x16",
    "prompt": "a red circle",
    "seed": 7,
    "error": None,
    "seconds": round(21 / 24, 3),
    "model": "fake",
  }
  assert {name: video[name] for name in expected} == expected
  assert abs(video["created_at"] - time.time()) < 60
  content = client.get(f"/v1/videos/{video['id']}/content")
  assert content.headers["content-type"] == "video/mp4"
  (tmp_path / "a.mp4").write_bytes(content.content)
  assert read_video(tmp_path / "a.mp4").shape == (21, 16, 32, 3)
  listed = client.get("/v1/videos").json()
  assert listed["object"] == "list" and video in listed["data"]


def test_parts_of_the_content(client):
  video = finished(client, client.post("/v1/videos", json={"prompt": "a", "seconds": 0.5}).json())
  url = f"/v1/videos/{video['id']}/content"
  whole = client.get(url).content
  part = client.get(url, headers={"range": "bytes=10-19"})
  assert (part.status_code, part.content) == (206, whole[10:20])
  assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
  assert client.get(url, headers={"range": "bytes=-5"}).content == whole[-5:]
  for wrong in ("bytes=a-b", "bytes=abc", "bytes=5-2", "items=0-5", "5-6", "bytes="):
    answer = client.get(url, headers={"range": wrong})
    assert (answer.status_code, answer.content) == (200, whole), wrong
  for beyond in (f"bytes={len(whole)}-", "bytes=99999999-"):
    answer = client.get(url, headers={"range": beyond})
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "bad_range")
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"
  assert client.get(url, headers={"if-range": '"x"', "range": "bytes=1-2"}).status_code == 200
  head = client.head(url)
  assert head.headers["content-length"] == str(len(whole)) and not head.content


def test_a_script_with_cuts(client, server):
  script = {"seed": 5, "shots": [{"prompt": "one", "blocks": 2}, {"prompt": "two", "blocks": 1}]}
  for given in (script, json.dumps(script)):
    video = finished(client, client.post("/v1/videos", json={"script": given}).json())
    assert (video["seed"], video["prompt"], video["seconds"]) == (5, "one", round(21 / 24, 3))
  assert [block for seed, block in server.backend.log if seed == 5] == [0, 1, 2] * 2


def test_a_form_with_a_first_frame(client, tmp_path: Path):
  files = {"input_reference": ("first.png", png(), "image/png")}
  form = {"prompt": "a", "seconds": "0.3", "size": "32x16", "seed": "3", "model": "fake"}
  answer = client.post("/v1/videos", data=form, files=files)
  assert answer.status_code == 200, answer.text
  video = finished(client, answer.json())
  content = client.get(f"/v1/videos/{video['id']}/content").content
  (tmp_path / "a.mp4").write_bytes(content)
  frame = read_video(tmp_path / "a.mp4")[0]
  assert np.abs(frame.astype(int) - [9, 200, 30]).max() < 12
  text = base64.b64encode(png()).decode()
  answer = client.post("/v1/videos", json={"prompt": "a", "input_reference": text})
  assert answer.status_code == 200


def test_texts_of_a_form_may_be_files(client):
  script = json.dumps(
    {"seed": 5, "shots": [{"prompt": "caf\u00e9", "blocks": 1}]}, ensure_ascii=False
  )
  files = {
    "script": ("demo.json", script.encode() + b"\n"),
    "size": ("size.txt", b"32x16\r\n"),
    "seed": ("seed.txt", b"6\n"),
    "input_reference": ("first.png", png()),
  }
  answer = client.post("/v1/videos", files=files)
  assert answer.status_code == 200, answer.text
  assert (answer.json()["seed"], answer.json()["prompt"]) == (6, "caf\u00e9")
  answer = client.post("/v1/videos", files={"prompt": ("a", b"one"), "seconds": ("b", b"long")})
  assert answer.json()["error"]["message"] == "seconds='long' must be a number"


FORM = "--x\r\ncontent-disposition: form-data; name=prompt\r\n\r\n{}\r\n"
FORMS = {  # content type, body: what is said
  ("boundary=x", FORM.format("a") + FORM.format("b") + "--x--"): "'prompt' is given twice",
  ("boundary=x", FORM.format("a")): "the last boundary is missing",
  ("boundary=x", FORM.format("a") + "--x\r\n" + FORM[5:70]): "the last boundary is missing",
  ("boundary=x", FORM.format("a") * 8 + "--x--"): "it has more than 7 parts",
  ("boundary=x", FORM.format("\xe9") + "--x--"): "'prompt' is no text in UTF-8",
  ("boundary=x", FORM.replace("prompt", "\xe9") + "--x--"): "there is no field",
  ("boundary=x", "--x\r\n\r\na\r\n--x--"): "there is no field ''",
  ("boundary=x", "--x--"): "needs a prompt or a script",
  ("boundary=x; charset=undefined", FORM.format("") + "--x--"): "prompt must be a text",
  ("boundary=x; charset=punycode", FORM.format("\xe9") + "--x--"): "no text in UTF-8",
  ("boundary=", FORM + "--x--"): "names no boundary",
  (f"boundary={1000 * 'x'}", FORM + "--x--"): "the form cannot be read: ",
}


@pytest.mark.parametrize("given", FORMS, ids=range(len(FORMS)))
def test_wrong_forms(client, given):
  kind, body = given
  headers = {"content-type": f"multipart/form-data; {kind}"}
  answer = client.post("/v1/videos", content=body.encode("latin-1"), headers=headers)
  assert answer.status_code == 400, answer.text
  assert FORMS[given] in answer.json()["error"]["message"]


def test_errors_of_the_server_look_like_all_others(client, monkeypatch, caplog):
  def broken(value):
    raise KeyError("odd")

  monkeypatch.setattr("longlive_jax.serve.routes.video_tree", broken)
  answer = client.post("/v1/videos", json={"prompt": "a", "seconds": 0.2})
  assert answer.status_code == 500 and answer.content.endswith(b"}\n")
  error = answer.json()["error"]
  assert (error["code"], error["type"]) == ("internal_error", "server_error")
  assert "odd" not in answer.text and answer.headers["x-content-type-options"] == "nosniff"
  assert answer.headers["cache-control"] == "no-store"
  wait_for(lambda: [r for r in caplog.records if r.exc_info])  # it is logged after the answer
  assert len([r for r in caplog.records if r.exc_info]) == 1


def test_a_video_that_the_model_fails(client):
  video = finished(client, client.post("/v1/videos", json={"prompt": "explode"}).json())
  assert video["status"] == "failed"
  assert video["error"] == {"code": "failed", "message": "numbers are not finite"}
  answer = client.get(f"/v1/videos/{video['id']}/content")
  assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ready")


WRONG = {
  "{": "not JSON",
  "[]": "the body must be a JSON object",
  "{}": "needs a prompt or a script",
  '{"prompt": "a", "script": {"shots": [{"prompt": "a"}]}}': "and not both",
  '{"prompt": ""}': "prompt must be a text",
  '{"prompt": ["a"]}': "prompt must be a text",
  '{"prompt": "a", "size": "64x64"}': "size='64x64' must be '32x16', the only one here",
  '{"prompt": "a", "model": "sora"}': "model='sora' must be 'fake'",
  '{"prompt": "a", "seconds": 0}': "seconds=0 must be more than 0 and at most 60",
  '{"prompt": "a", "seconds": 61}': "at most 60",
  '{"prompt": "a", "seconds": 60.0001}': "seconds=60.0001 must be more than 0 and at most 60",
  '{"prompt": "a", "seconds": "soon"}': "seconds='soon' must be a number",
  '{"prompt": "a", "seconds": "nan"}': "seconds='nan' must be a number",
  '{"prompt": "a", "seconds": 1e999}': "seconds='inf' must be a number",
  '{"prompt": "a", "seed": -1}': "seed must be a whole number from 0",
  '{"prompt": "a", "seed": 1.5}': "seed='1.5' must be a whole number",
  '{"prompt": "a", "seed": true}': "seed must be a whole number",
  '{"prompt": "a", "sed": 1}': "there is no field 'sed' (did you mean 'seed'?)",
  '{"prompt": "a", "input_reference": "!"}': "not base64",
  '{"prompt": "a", "input_reference": "aGVsbG8="}': "it is neither PNG, JPEG nor WebP",
  '{"prompt": "a", "input_reference": 3}': "input_reference must be a text",
  '{"script": "x"}': "not JSON",
  '{"script": 5}': "must be a JSON object",
  '{"script": {"shots": []}}': "the script is empty",
  '{"script": {"shots": [{"prompt": "a"}]}, "seconds": 3}': "leave seconds out",
  '{"script": {"shots": [{"prompt": "a"}], "image": "/etc/passwd"}}': "input_reference",
  '{"script": {"shots": [{"prompt": "a", "blocks": 1000}]}}': "1000 blocks; at most 180",
  '{"script": {"shots": [{"prompt": "a", "transition": "x"}]}}': "must be one of cut",
  '{"prompt": "\\ud800"}': "no text",
  '{"\\ud800": 1}': "there is no field",
  '{"script": {"\\ud800": 1}}': "unknown field",
  '{"prompt": "' + 2001 * "a" + '"}': "2001 characters; at most 2000",
  '{"prompt": "' + 1001 * "a" + '"}': "1001 tokens",
  100_000 * "[": "nested too deeply",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:60])
def test_wrong_requests(client, text):
  answer = client.post("/v1/videos", content=text, headers={"content-type": "application/json"})
  assert answer.status_code == 400, answer.text
  error = answer.json()["error"]
  assert WRONG[text] in error["message"] and error["type"] == "invalid_request_error"
  assert len(error["message"]) < 400


def test_other_wrong_requests(client):
  def status(content=b"{}", **headers: str) -> int:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/v1/videos", content=content, headers=headers).status_code

  assert status(content_type="text/plain") == 415
  assert status(content_type="multipart/form-data") == 400
  assert status(content_type="multipart/form-data; boundary=x") == 400
  assert status(b"--x\r\n\r\nabc\r\n--x--", content_type="multipart/form-data; boundary=x") == 400
  big = b'{"prompt": "' + (10 << 20) * b"a" + b'"}'
  assert status(big, content_type="application/json") == 413
  assert status(iter([big[:1000]] * 10_000), content_type="application/json") == 413  # no length
  files = [("input_reference", ("a", png())), ("input_reference", ("b", png()))]
  assert client.post("/v1/videos", data={"prompt": "a"}, files=files).status_code == 400
  assert (
    client.post("/v1/videos", data={"prompt": "a", "x": "1"}, files=files[:1]).status_code == 400
  )
  cut = {"input_reference": ("a.png", png()[:40])}
  answer = client.post("/v1/videos", data={"prompt": "a"}, files=cut)
  assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
  "name",
  ["video_" + 32 * "0", "x", "..%2f..%2fetc%2fpasswd", "video_" + 32 * "A", "%00", 5000 * "a"],
)
def test_unknown_ids(client, name):
  for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
    answer = client.request(method, f"/v1/videos/{name}{end}")
    assert answer.status_code in (404, 405), (method, end)
    assert "error" in answer.json()
  assert client.get(f"/v1/sessions/{name}").status_code == 404
  assert client.delete(f"/v1/sessions/{name}").status_code in (404, 405)


LIMITS = (0, "x", 10**9, "0000000010000", "000000001" + 5000 * "0", "\u0663")


def test_the_list_in_pages(client):
  ids = [
    client.post("/v1/videos", json={"prompt": "a", "seconds": 0.2}).json()["id"] for _ in "abc"
  ]
  page = client.get("/v1/videos", params={"limit": 2}).json()
  assert [v["id"] for v in page["data"]] == [ids[2], ids[1]] and page["has_more"]
  rest = client.get("/v1/videos", params={"limit": 1, "after": page["last_id"]}).json()
  assert rest["data"][0]["id"] == ids[0]
  oldest = client.get("/v1/videos", params={"order": "asc", "limit": 100}).json()["data"]
  assert [v["id"] for v in oldest[-3:]] == ids
  for query in (*({"limit": limit} for limit in LIMITS), {"order": "up"}):
    assert client.get("/v1/videos", params=query).status_code == 400
  assert client.get("/v1/videos", params={"after": "video_" + 32 * "0"}).status_code == 404


def test_deleting_frees_everything_at_any_state(tmp_path: Path):
  backend = FakeBackend(block_seconds=0.02)
  limits = dataclasses.replace(QUICK, videos_at_once=1, queue=2)
  with running(backend, limits=limits, state_dir=tmp_path) as run, run.http() as client:
    done = finished(client, client.post("/v1/videos", json={"prompt": "a", "seconds": 0.2}).json())
    running_, queued, third = (
      client.post("/v1/videos", json={"prompt": "a", "seconds": 60}).json() for _ in range(3)
    )
    full = client.post("/v1/videos", json={"prompt": "a"})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert "retry-after" in full.headers
    url = f"/v1/videos/{running_['id']}"
    wait_for(lambda: client.get(url).json()["progress"] > 0)
    assert client.get(f"/v1/videos/{queued['id']}").json()["status"] == "queued"
    for video in (queued, running_, done, third):
      answer = client.delete(f"/v1/videos/{video['id']}")
      assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
      assert client.get(f"/v1/videos/{video['id']}").status_code == 404
      assert client.delete(f"/v1/videos/{video['id']}").status_code == 404
    assert list((tmp_path / "videos").iterdir()) == []
    assert client.get("/v1/videos").json()["data"] == []
    assert backend.made == backend.closed


def test_only_the_newest_videos_are_kept():
  limits = dataclasses.replace(QUICK, videos_kept=2)
  with running(limits=limits) as run, run.http() as client:
    ids = []
    for _ in range(4):
      video = client.post("/v1/videos", json={"prompt": "a", "seconds": 0.2}).json()
      ids.append(finished(client, video)["id"])
    assert [v["id"] for v in client.get("/v1/videos").json()["data"]] == ids[:0:-1]


def test_the_model_and_the_state_of_the_server(client):
  model = client.get("/v1/models").json()["data"][0]
  assert (model["id"], model["size"], model["first_block_frames"]) == ("fake", "32x16", 5)
  assert model["steps"] == 4
  assert model["limits"]["prompt_chars"] == QUICK.prompt_chars
  assert client.get("/healthz").text == "ok\n"
  assert client.get("/readyz").status_code == 200
  metrics = client.get("/metrics").text
  assert 'longlive_blocks_total{kind="video"}' in metrics
  assert "longlive_ready 1.0" in metrics and "longlive_refusals_total" in metrics
  page = client.get("/")
  assert page.headers["content-type"].startswith("text/html") and "<title>" in page.text
  assert client.get("/nothing").status_code == 404
  assert client.put("/v1/videos").status_code == 405
