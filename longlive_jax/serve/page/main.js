/** Puts the parts together. */

import {Control} from "./control.js";
import {Player} from "./player.js";
import {FrameStore} from "./frames.js";
import {Timeline} from "./timeline.js";
import {createStore, cursorBlock, looksBack} from "./state.js";
import {$, examples, isLive, render, summary, writeHelp} from "./view.js";
import {listenToKeys, transitionOf} from "./keys.js";

const MOST_BYTES = ((navigator.deviceMemory ?? 4) >= 4 ? 128 : 48) << 20; // of frames kept

const store = createStore();
const makePlayer = (on) => new Player($("screen"), new FrameStore(MOST_BYTES), on);
const control = new Control(store, makePlayer, MOST_BYTES);
const timeline = new Timeline($("cells"), {
  frames: () => control.frames,
  seek: (block) => control.seekBlock(block),
});

store.listen(render);
store.listen((state) => {
  timeline.render(state);
  $("strip-empty").hidden = state.session !== null;
});
store.listen(({model}) => model && examples(model, pick));
store.listen(askForToken);

/** Sends what is typed: begins a video, or changes the one that plays. */
function send(transition) {
  const prompt = $("prompt").value.trim().replace(/\s+/g, " ");
  if (!prompt) {
    $("prompt").focus();
    return control.say("error", "Type what to see first.");
  }
  if (isLive(store.get())) return control.change(prompt, transition);
  if ($("watch").disabled) return undefined;
  if (!$("seed").reportValidity()) return undefined;
  const seed = $("seed").value;
  return control.watch(prompt, seed === "" ? null : Number(seed));
}

function pick(prompt) {
  $("prompt").value = prompt;
  $("prompt").focus({preventScroll: true});
  if (matchMedia("(pointer: coarse)").matches) $("prompt").blur();
}

const typed = () => $("prompt").value.trim().replace(/\s+/g, " ");
/** The block that is looked at, or will be in a moment. */
const aimed = () => cursorBlock({...store.get(), cursor: control.player.aim});

function stepFrame(step) {
  if (!store.get().paused) control.pause(true);
  control.seek(control.player.aim + step);
}

function toBlock(block) {
  control.seekBlock(block);
  timeline.focus(block);
}

function forward() {
  const state = store.get();
  if (!looksBack(state)) return;
  const last = cursorBlock({...state, cursor: state.shown - 1});
  if (aimed() >= last) control.live();
  else toBlock(aimed() + 1);
}

function backward() {
  if (store.get().session) toBlock(Math.max(0, aimed() - 1));
}

function newVideo() {
  control.leave();
  $("seed").value = "";
  $("prompt").focus();
}

function askForToken({link, notice}) {
  const dialog = $("ask-token");
  if (link === "token" && !dialog.open) dialog.showModal();
  if (link !== "token" && dialog.open) dialog.close();
  $("token-notice").hidden = !notice;
  $("token-notice").textContent = notice?.text ?? "";
}

const clicks = {
  keep: () => send("keep"),
  recache: () => send("recache"),
  cut: () => send("cut"),
  pause: () => control.pause(),
  "step-back": backward,
  "step-on": forward,
  fork: () => control.branches.fork(),
  "back-fork": () => control.branches.fork(),
  "back-live": () => control.live(),
  "go-on": () => control.goOn(typed()),
  film: () => control.download(),
  new: newVideo,
  again: () => control.again(),
  "image-off": () => control.setImage(null),
  "help-open": () => $("help").showModal(),
};
for (const [id, act] of Object.entries(clicks)) $(id).addEventListener("click", act);

listenToKeys({
  " ": () => control.pause(),
  ArrowLeft: backward,
  ArrowRight: forward,
  ",": () => stepFrame(-1),
  ".": () => stepFrame(1),
  Home: () => control.seek(0),
  End: () => control.live(),
  g: () => looksBack(store.get()) && control.goOn(typed()),
  f: () => control.branches.fork(),
  d: () => control.download(),
  "/": () => $("prompt").focus(),
  "?": () => $("help").showModal(),
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send("keep");
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault();
  send(transitionOf(event));
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  control.useToken($("token").value);
  $("token").value = "";
});
$("ask-token").addEventListener("cancel", (event) => event.preventDefault());
$("branch").addEventListener("change", ({target}) => control.branches.open(target.value));
$("image").addEventListener("change", ({target}) => {
  if (target.files[0]) control.setImage(target.files[0]);
  target.value = "";
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer?.files[0];
  if (file && !isLive(store.get())) control.setImage(file);
});

writeHelp();
render(store.get());
control.arrive();

/** For tests: what has been played, and a way to lose the connection. */
window.longlive = {
  stats: () => summary(store.get(), control.player, control.times),
  drop: () => control.link.drop(),
};
