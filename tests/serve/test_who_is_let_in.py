"""Tokens, hosts, origins, headers: what a stranger or another page cannot do."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest
from starlette.datastructures import Headers
from websockets.exceptions import InvalidStatus

from longlive_jax.serve.protocol import SPARE
from longlive_jax.serve.security import TOKEN, Access, check_tokens, new_id
from longlive_jax.serve.server import is_loopback, listen
from tests.serve.running import QUICK, Running, Viewer, running, wait_for

ALICE, BOB = "alice-" + 20 * "a", "bob-" + 20 * "b"


@pytest.fixture(scope="module")
def server():
  with running() as run:
    yield run


@pytest.fixture(scope="module")
def guarded():
  with running(tokens=(ALICE, BOB)) as run:
    yield run


def ask(server: Running, text: str, *, end: bool = True) -> bytes:
  """Sends raw bytes and reads the answer, empty if the server closes without one."""
  data = text.replace("\n", "\r\n").encode("latin-1") + (b"\r\n\r\n" if end else b"")
  got = b""
  with socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as raw:
    with contextlib.suppress(ConnectionError):
      raw.sendall(data)
    with contextlib.suppress(ConnectionError):
      while not is_answer(got) and (part := raw.recv(65536)):
        got += part
  return got


def is_answer(data: bytes) -> bool:
  """Whether an answer is there with its body."""
  head, gap, body = data.partition(b"\r\n\r\n")
  length = re.search(rb"content-length: (\d+)", head.lower())
  return bool(gap) and (length is None or len(body) >= int(length[1]))


def status(answer: bytes) -> int:
  return int(answer.split()[1]) if answer else 0


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/models", "/v1/sessions", "/metrics"])
def test_a_token_is_needed(guarded: Running, path):
  with guarded.http() as client:
    for given in (None, "Bearer", "Bearer x", f"Bearer {ALICE}x", f"Basic {ALICE}", "Bearer é"):
      headers = {} if given is None else {"authorization": given.encode()}
      answer = client.get(path, headers=headers)
      assert answer.status_code == 401, given
      assert answer.headers["www-authenticate"] == "Bearer"
      assert ALICE not in answer.text
    assert client.get(path, headers={"authorization": f"Bearer {ALICE}"}).status_code == 200
    assert client.get(path, headers={"authorization": f"bearer  {BOB}"}).status_code == 200


def test_pages_and_health_need_no_token(guarded: Running):
  with guarded.http() as client:
    for path in ("/", "/healthz", "/readyz"):
      assert client.get(path).status_code == 200


def test_owners_do_not_see_each_other(guarded: Running):
  alice, bob = {"authorization": f"Bearer {ALICE}"}, {"authorization": f"Bearer {BOB}"}
  with guarded.http() as client, guarded.websocket(f"?token={ALICE}") as opened:
    video = client.post("/v1/videos", json={"prompt": "a"}, headers=alice).json()["id"]
    viewer = Viewer(opened)
    viewer.say("start", prompt="a")
    session = viewer.event("session")["id"]
    for path in (f"videos/{video}", f"sessions/{session}"):
      for method in ("GET", "DELETE"):
        assert client.request(method, f"/v1/{path}", headers=bob).status_code == 404
      assert client.get(f"/v1/{path}", headers=alice).status_code == 200
    assert client.get("/v1/videos", headers=bob).json()["data"] == []
    assert client.get("/v1/sessions", headers=bob).json()["data"] == []
    assert len(client.get("/v1/sessions", headers=alice).json()["data"]) == 1
    with guarded.websocket(f"?token={BOB}") as other:
      thief = Viewer(other)
      thief.say("resume_session", id=session)
      assert thief.close_code() == 4404


def test_a_token_for_a_websocket(guarded: Running):
  def works(query: str = "", token: str | None = None, **options) -> int:
    with guarded.websocket(query, **options) as opened:
      viewer = Viewer(opened)
      viewer.say("start", prompt="a", **({"token": token} if token else {}))
      if viewer.receive()["type"] != "session":
        return viewer.close_code()
      assert opened.subprotocol == ("longlive" if "subprotocols" in options else None)
      return 1000

  assert works(token=ALICE) == 1000
  assert works(f"?token={ALICE}") == 1000
  assert works(subprotocols=["longlive", f"token.{ALICE}"]) == 1000
  assert works(additional_headers={"authorization": f"Bearer {BOB}"}) == 1000
  assert works() == 4401
  assert works(token="wrong") == 4401
  for wrong in ({"subprotocols": ["longlive", "token.x"]}, {"query": "?token=x"}):
    with pytest.raises(InvalidStatus) as refused, guarded.websocket(**wrong):
      pass
    assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
  ("origin", "code"),
  [("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), ("file://", 403)],
)
def test_pages_of_other_servers_change_nothing(server: Running, origin, code):
  with server.http() as client:
    for method, path in (("POST", "/v1/videos"), ("DELETE", f"/v1/videos/{new_id('video')}")):
      assert client.request(method, path, headers={"origin": origin}).status_code == code
    assert "access-control-allow-origin" not in client.get("/", headers={"origin": origin}).headers
  with pytest.raises(InvalidStatus) as refused, server.websocket(origin=origin):
    pass
  assert refused.value.response.status_code == code


def test_the_own_page_may(server: Running):
  origin = f"http://127.0.0.1:{server.port}"
  with server.http(origin=origin) as client:
    assert client.post("/v1/videos", json={"prompt": "a"}).status_code == 200
    crossed = {"sec-fetch-site": "same-site"}
    assert client.post("/v1/videos", json={"prompt": "a"}, headers=crossed).status_code == 403
  with server.websocket(origin=origin) as opened:
    viewer = Viewer(opened)
    viewer.say("start", prompt="a")
    viewer.event("session")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "[::1", "a b"])
def test_other_names_are_not_answered(server: Running, host):
  for path in ("/", "/v1/videos", "/v1/realtime"):
    assert 400 <= status(ask(server, f"GET {path} HTTP/1.1\nhost: {host}")) < 500
  head = f"GET /v1/realtime HTTP/1.1\nhost: {host}\nupgrade: websocket\nconnection: upgrade"
  key = "sec-websocket-version: 13\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
  assert 400 <= status(ask(server, f"{head}\n{key}")) < 500


def test_names_of_this_machine_are_answered(server: Running):
  for host in ("localhost", "LOCALHOST:9", "127.0.0.1:1234", "[::1]:80", "localhost."):
    assert status(ask(server, f"GET /healthz HTTP/1.1\nhost: {host}")) == 200
  assert status(ask(server, "GET /healthz HTTP/1.1\nhost: localhost\nhost: localhost")) == 400


UPGRADE = (
  "upgrade: websocket\nconnection: upgrade\nsec-websocket-version: 13\n"
  "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
)
RAW = {
  "many headers": ("GET /healthz HTTP/1.1\nhost: localhost" + "\na: b" * 100, (431,)),
  "large headers": ("GET / HTTP/1.1\nhost: localhost\na: " + "b" * 20_000, (400, 431)),
  "huge headers": ("GET / HTTP/1.1\nhost: localhost\na: " + "b" * 300_000, (400, 431, 0)),
  "a long path": ("GET /" + "a" * 100_000 + " HTTP/1.1\nhost: localhost", (400, 404, 414, 431)),
  "no request": ("hello", (400,)),
  "no host": ("GET / HTTP/1.1", (400,)),
  "binary": ("\x00\xff\x16\x03\x01", (400,)),
  "old": ("GET /healthz HTTP/1.0\nhost: localhost", (200,)),
  "up": ("GET /../../../../etc/passwd HTTP/1.1\nhost: localhost", (404,)),
  "up, encoded": ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\nhost: localhost", (404,)),
  "up, in an id": ("GET /v1/videos/../../x/content HTTP/1.1\nhost: localhost", (404,)),
  "zero": ("GET /%00 HTTP/1.1\nhost: localhost", (404,)),
  "a length": ("POST /v1/videos HTTP/1.1\nhost: localhost\ncontent-length: -1", (400,)),
  "two lengths": (
    "POST /v1/videos HTTP/1.1\nhost: localhost\ncontent-length: 1\ncontent-length: 2",
    (400,),
  ),
  "a large length": (
    "POST /v1/videos HTTP/1.1\nhost: localhost\ncontent-length: 99999999999",
    (413,),
  ),
  "many headers of a websocket": (
    f"GET /v1/realtime HTTP/1.1\nhost: localhost\n{UPGRADE}" + "\na: b" * 200,
    (431,),
  ),
  "a long header of a websocket": (
    f"GET /v1/realtime HTTP/1.1\nhost: localhost\n{UPGRADE}\na: " + "b" * 9_000,
    (400, 431),
  ),
  "a websocket elsewhere": (f"GET /v1/videos HTTP/1.1\nhost: localhost\n{UPGRADE}", (404,)),
  "a websocket without key": (
    "GET /v1/realtime HTTP/1.1\nhost: localhost\nupgrade: websocket\nconnection: upgrade",
    (400, 426),
  ),
  "no websocket": ("GET /v1/realtime HTTP/1.1\nhost: localhost", (404, 405)),
}


@pytest.mark.parametrize("name", RAW)
def test_odd_requests(server: Running, name):
  text, codes = RAW[name]
  answer = ask(server, text)
  assert status(answer) in codes, answer[:200]
  assert b"root:" not in answer
  with server.http() as client:
    assert client.get("/healthz").status_code == 200


def test_a_websocket_elsewhere_is_told_where(server: Running):
  answer = ask(server, f"GET /v1/other HTTP/1.1\nhost: localhost\n{UPGRADE}")
  assert status(answer) == 404 and b"x-content-type-options: nosniff" in answer.lower()
  error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
  assert error["code"] == "not_found" and "/v1/realtime" in error["message"]


def test_answers_have_their_headers(server: Running):
  with server.http() as client:
    for path in ("/", "/v1/models", "/nothing", "/v1/videos/x"):
      headers = client.get(path).headers
      assert headers["x-content-type-options"] == "nosniff"
      assert headers["x-frame-options"] == "DENY" and "server" not in headers
      policy = headers["content-security-policy"]
      assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
      assert headers["cache-control"] in ("no-store", "no-cache")


def test_clients_that_say_nothing_are_let_go(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr("longlive_jax.serve.protocol.HEADER_SECONDS", 0.2)
  with running() as run:
    start = time.monotonic()
    assert ask(run, "GET / HTTP/1.1\nhost: local", end=False) == b""
    assert ask(run, "", end=False) == b""
    slow = "POST /v1/videos HTTP/1.1\nhost: localhost\ncontent-type: application/json"
    assert time.monotonic() - start < 4.0
    monkeypatch.setattr("longlive_jax.serve.video_request.BODY_SECONDS", 0.2)
    assert status(ask(run, f"{slow}\ncontent-length: 50")) == 408


def test_there_is_a_limit_of_connections(server: Running):
  with contextlib.ExitStack() as stack:
    for _ in range(QUICK.websockets):
      stack.enter_context(server.websocket())
    with pytest.raises(InvalidStatus) as refused, server.websocket():
      pass
    assert refused.value.response.status_code == 429
    with server.http() as client:
      assert client.get("/healthz").status_code == 200


def test_a_flood_of_connections_leaves_the_server_alive(server: Running):
  with contextlib.ExitStack() as stack:
    for _ in range(QUICK.connections + SPARE + 20):
      raw = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5.0))
    raw.settimeout(5.0)
    with contextlib.suppress(ConnectionError):
      assert raw.recv(1) == b""  # the last one was not even listened to
  with server.http() as client:
    wait_for(lambda: client.get("/healthz").status_code == 200)


def test_this_machine_has_more_than_one_name():
  if not socket.has_ipv6:
    pytest.skip("no IPv6 here")
  access = Access()
  access.check_host(Headers({"host": "[::1]:8000"}))
  access.check_origin(Headers({"host": "[::1]:8000", "origin": "http://[::1]:8000"}))
  assert is_loopback("::1") and not is_loopback("::")


@pytest.mark.parametrize("token", ["", "short", "a" * 300, "with space and so on", "ä" * 20])
def test_tokens_that_will_not_do(token):
  with pytest.raises(ValueError, match="--token must be 16 to 256"):
    check_tokens([ALICE, token])


def test_ids_and_tokens():
  assert check_tokens([ALICE, BOB, ALICE]) == (ALICE, BOB)
  assert len({new_id("video") for _ in range(100)}) == 100
  assert TOKEN.fullmatch(new_id("session"))
  access = Access((ALICE, BOB))
  assert access.owner(ALICE) != access.owner(BOB) and ALICE not in access.owner(ALICE)


def test_which_hosts_are_this_machine_alone():
  assert is_loopback("127.0.0.1") and is_loopback("localhost") and is_loopback("127.3.2.1")
  assert not is_loopback("0.0.0.0")
  with pytest.raises(ValueError, match="--host='no such host' is no address"):
    is_loopback("no such host")


def test_a_socket_that_cannot_be_had():
  with contextlib.closing(listen("127.0.0.1", 0)) as taken:
    assert taken.proto == socket.IPPROTO_TCP  # else every answer takes 40 ms
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"--port={port}: address already in use; choose another"):
      listen("127.0.0.1", port)
  with pytest.raises(ValueError, match="cannot listen"):
    listen("192.0.2.1", 0)


def test_answers_come_while_the_model_is_made():
  started, release = threading.Event(), threading.Event()

  def build():
    started.set()
    release.wait(10)
    raise ValueError("the weights are not there")

  with running(build=build) as run, run.http() as client:
    assert started.wait(5)
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert client.post("/v1/videos", json={"prompt": "a"}).status_code == 503
    with pytest.raises(InvalidStatus) as refused, run.websocket():
      pass
    assert refused.value.response.status_code == 503
    release.set()
    run.thread.join(10)  # it ends by itself
    assert str(run.failure) == "the weights are not there"
