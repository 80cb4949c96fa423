"""Forks of the page outlive a reload; its own modules in node, with a server that is played."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "longlive_jax" / "serve" / "page"
NODE = """
const kept = new Map();
globalThis.sessionStorage = {
  getItem: (key) => kept.get(key) ?? null,
  setItem: (key, value) => kept.set(key, value),
  removeItem: (key) => kept.delete(key),
};
globalThis.document = {baseURI: "http://localhost/"};
globalThis.addEventListener = () => {};
const model = {limits: {rewind_blocks: 3}};
globalThis.fetch = async (url) =>
  url.pathname.includes("sessions") ? {ok: false, json: async () => ({})}
  : {ok: true, status: 200, json: async () => ({data: [model]})};
let socket = null;
globalThis.WebSocket = class {
  static OPEN = 1;
  constructor() { this.readyState = 1; this.sent = []; socket = this; }
  send(text) { this.sent.push(JSON.parse(text)); }
  close() {}
};
const {Control} = await import("./control.js");
const {createStore} = await import("./state.js");
const names = ["reset", "begin", "more", "pause", "dropFrom", "seek", "rate"];
const player = () => Object.fromEntries(names.map((name) => [name, () => 0]));
const sizes = {first_block_frames: 5, block_frames: 8, fps: 24, width: 32, height: 16};
const settle = () => new Promise((done) => setTimeout(done, 5));
const say = (event) => socket.onmessage({data: JSON.stringify(event)});
const begin = (id, block = 4, position = 0) => {
  socket.onopen();
  const rest = {seed: 7, prompt: "a", most_blocks: 99, paused: false};
  say({type: "session", id, block, position, ...sizes, ...rest});
};
const load = async () => {
  const control = new Control(createStore(() => {}), player, 1 << 20);
  await control.arrive();
  return control;
};
const told = [];
const tell = ({state: {session, branches, shown, link}}) =>
  told.push([session?.id ?? null, branches, shown, link, socket.sent[0]?.id]);
let page = await load();
page.watch("a", null);
begin("one");
for (const name of ["two", "three"]) {
  const forking = page.branches.fork();
  say({type: "forked", id: socket.sent.at(-1).id, session: name, block: 0});
  await forking;
  begin(name);
}
tell(page);
page = await load(); // a reload
begin("three", 4, 5);
tell(page);
page.branches.open("two");
page.branches.open("one"); // before the other one has answered
begin("one");
tell(page);
page.branches.open("two");
socket.onopen();
await socket.onclose({code: 4404}); // the server no longer has it
begin("three");
tell(page);
page.set({shown: 30, buffered: 37});
page.link.resume("three", 30);
begin("three", 4, 29); // 29 frames are made: the server was killed and has lost some
tell(page);
page = await load();
socket.onopen();
await socket.onclose({code: 4404});
begin("one");
tell(page);
await settle();
say({type: "ended", reason: "length", saved: false});
await socket.onclose({code: 1000});
console.log(JSON.stringify({told, kept: [...kept.values()]}));
process.exit(0);
"""


def test_forks_outlive_a_reload_and_leave_when_the_server_has_them_no_more():
  program = shutil.which("node")
  if program is None:
    pytest.skip("there is no node, which runs modules outside a browser")
  command = [program, "--input-type=module", "-e", NODE]
  done = subprocess.run(command, cwd=PAGE, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  names = ["one", "two", "three"]
  assert result["told"] == [
    ["three", names, 0, "open", "three"],
    ["three", names, 5, "open", "three"],
    ["one", names, 0, "open", "one"],
    ["three", ["one", "three"], 5, "open", "three"],
    ["three", ["one", "three"], 29, "open", "three"],
    ["one", ["one"], 0, "open", "one"],
  ]
  assert result["kept"] == []
