/** Draws the state into the page; reads nothing back from it. */

import {blockAt, firstFrame} from "./protocol.js";
import {canGoBack, cursorBlock, looksBack, phase, shotOf} from "./state.js";
import {HELP} from "./keys.js";
import {EXAMPLES, anyPrompt, knowsShapes} from "./words.js";
import {clock} from "./timeline.js";

/** @returns {any} */
export const $ = (id) => document.getElementById(id);

/** Sets a text only if it changes, so that screen readers are told once. */
function text(id, value) {
  const element = $(id);
  if (element.textContent !== value) element.textContent = value;
}

function show(id, visible) {
  const element = $(id);
  if (element.hidden === visible) element.hidden = !visible;
}

function enable(id, enabled) {
  const element = $(id);
  if (element.disabled === enabled) element.disabled = !enabled;
}

const CURTAINS = {
  connecting: "One moment",
  compiling: "Getting ready",
  token: "A token is needed",
  ready: "What would you like to see?",
  waiting: "Almost there",
  lost: "Connection lost",
  error: "This did not work",
  taken: "Watched elsewhere",
};

/** Whether a session goes on, so that prompts change it. */
export function isLive(state) {
  return state.session !== null && ["open", "lost", "connecting"].includes(state.link) && !state.ended;
}

/** The whole page but the timeline. */
export function render(state) {
  const [name, words] = phase(state);
  if (document.body.dataset.phase !== name) document.body.dataset.phase = name;
  text("phase", words);
  facts(state);
  curtain(state, name, words);
  coming(state);
  back(state);
  transport(state);
  desk(state);
  readings(state);
}

function facts({model, session}) {
  if (!model) return;
  const size = session ? `${session.width}×${session.height}` : model.size.replace("x", "×");
  text("facts", `${model.id} · ${size} · ${session?.sizes.fps ?? model.fps} fps`);
}

function curtain(state, name, words) {
  const picture = state.cursor >= 0;
  const title = CURTAINS[name];
  show("curtain", Boolean(title) && (!picture || ["lost", "taken", "error"].includes(name)));
  text("curtain-title", title ?? "");
  text("curtain-text", name === "ready" ? "Type it, or take an example." : words);
  show("again", ["lost", "taken", "error"].includes(name));
  text("again", name === "error" ? "Start again" : "Connect now");
  const label = state.session && picture ? shotOf(state, cursorBlock(state))?.prompt : "";
  const wanted = label ? `Video: ${label}` : "No video yet";
  if ($("screen").ariaLabel !== wanted) $("screen").ariaLabel = wanted;
}

/** When the new prompt will be seen. */
function coming(state) {
  const {change, session, sent} = state;
  const open = change !== null && change.seen === null;
  show("coming", sent.length > 0 || open);
  if (open) text("announce", `Takes effect in block ${change.block}: ${change.prompt}`);
  else if (change) text("announce", `Now shown: ${change.prompt}`);
  if (sent.length) text("coming", `Sent: ${sent.at(-1).prompt}`);
  else if (open) {
    const left = firstFrame(change.block, session.sizes) - 1 - state.cursor;
    const seconds = Math.max(1, Math.ceil(left / session.sizes.fps));
    const how = {keep: "From", recache: "Re-cached from", cut: "Cut at"}[change.transition];
    text("coming", `${how} block ${change.block}, in ${seconds} s: ${change.prompt}`);
  }
}

function back(state) {
  const open = looksBack(state) && isLive(state);
  const away = open && state.shown - 1 - state.cursor > 2;
  show("back", away);
  if (!away) return;
  const block = cursorBlock(state);
  const prompt = shotOf(state, block)?.prompt ?? "";
  text("back-text", `Block ${block}: ${prompt}`);
  const typed = $("prompt").value.trim();
  const other = typed && typed !== prompt;
  const able = canGoBack(state, block);
  enable("go-on", able);
  enable("back-fork", able);
  const words = other ? "Go on with the new prompt" : "Go on from here";
  text("go-on", able ? words : "Too long ago to go on");
}

function transport(state) {
  const {session, cursor, shown, film, paused} = state;
  const has = session !== null;
  const pause = $("pause");
  const label = paused ? "Go on" : "Pause";
  if (pause.ariaLabel !== label) {
    pause.ariaLabel = label;
    pause.title = `${label} (Space)`;
    pause.classList.toggle("off", paused);
  }
  enable("pause", has && !(state.ended && state.player === "done"));
  enable("step-back", has && cursor > state.oldest);
  enable("step-on", has && cursor + 1 < shown);
  enable("fork", isLive(state) && state.link === "open");
  enable("film", has && state.made > 0 && !film);
  text("film", film ? `Making the file: ${film.progress} %` : "Download");
  show("branch-row", state.branches.length > 1);
  if (!has) return text("time", "0:00.0");
  const {fps} = session.sizes;
  text("time", clock(cursor + 1, fps));
  text("ahead", `block ${cursorBlock(state)} · ${clock(state.buffered, fps)} made`);
  return branches(state);
}

function branches({branches: ids, session}) {
  const select = $("branch");
  while (select.length < ids.length) select.add(new Option("", ""));
  while (select.length > ids.length) select.remove(select.length - 1);
  ids.forEach((id, i) => {
    const option = select.options[i];
    if (option.value !== id) Object.assign(option, {value: id, text: `${i + 1} of ${ids.length}`});
    const name = `${i + 1} of ${ids.length}`;
    if (option.text !== name) option.text = name;
  });
  if (select.value !== session.id) select.value = session.id;
}

function desk(state) {
  const live = isLive(state);
  const begun = state.session !== null || state.link === "connecting";
  show("send-live", live);
  show("send-new", !live);
  show("new", live);
  text("prompt-label", live ? "What to see next" : "What to see");
  enable("watch", ["idle", "ended", "failed"].includes(state.link) || Boolean(state.ended));
  for (const id of ["keep", "recache", "cut"]) enable(id, state.link === "open");
  enable("seed", !live && (!begun || state.link === "ended"));
  if (live && $("seed").value !== String(state.session.seed)) $("seed").value = state.session.seed;
  enable("image", !live);
  show("image-label", !live);
  const picture = live ? state.first : state.image;
  show("image-shown", picture !== null);
  show("image-off", picture !== null && !live);
  if (picture && $("image-shown").src !== picture.url) $("image-shown").src = picture.url;
  show("notice", state.notice !== null);
  text("notice", state.notice?.text ?? "");
  $("notice").classList.toggle("good", state.notice?.kind === "info");
}

function readings(state) {
  const {stats, session, model, change} = state;
  const steps = model?.steps;
  show("steps-row", steps !== undefined);
  if (steps !== undefined) text("r-steps", String(steps));
  if (!session) {
    for (const id of ["fps", "model", "latency", "response", "ahead"]) text(`r-${id}`, "–");
    return;
  }
  const moves = state.player === "playing" && !state.paused;
  text("r-fps", moves && state.rate ? `${state.rate.toFixed(0)} fps` : "–");
  const ahead = Math.max(0, state.buffered - state.cursor - 1) / session.sizes.fps;
  text("r-ahead", `${ahead.toFixed(1)} s`);
  text("r-response", change?.seen ? `${(change.seen / 1000).toFixed(1)} s` : "–");
  if (!stats) return;
  text("r-model", `${stats.model_fps.toFixed(0)} fps`);
  text("r-latency", `${(stats.latency_ms / 1000).toFixed(2)} s`);
  text("r-memory", `${(stats.memory / 2 ** 30).toFixed(1)} GiB`);
}

/** Examples and a hint, if the model is one whose words are known. */
export function examples(model, pick) {
  if (!knowsShapes(model) || $("chips").childElementCount) return;
  const chip = (words, prompt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "chip";
    button.textContent = words;
    button.addEventListener("click", () => pick(prompt()));
    $("chips").append(button);
  };
  for (const example of EXAMPLES) chip(example, () => example);
  chip("Surprise me", anyPrompt);
  text(
    "hint",
    "This small model knows circles, squares and triangles in six colours, moving left, right, up or" +
      " down over night, snow, fog, sand, slate or checker.",
  );
}

/** The help, from the table of keys. */
export function writeHelp() {
  for (const {keys, what} of HELP) {
    const row = document.createElement("div");
    const term = document.createElement("dt");
    const meaning = document.createElement("dd");
    for (const combination of keys) {
      const key = document.createElement("kbd");
      key.textContent = combination;
      term.append(key, " ");
    }
    meaning.textContent = what;
    row.append(term, meaning);
    $("help-keys").append(row);
  }
}

/** For tests and for whoever wants to know: what has been played. */
export function summary(state, player, times) {
  const {session} = state;
  return {
    phase: phase(state)[0],
    session: session?.id ?? null,
    frame: state.cursor,
    block: session && state.cursor >= 0 ? blockAt(state.cursor, session.sizes) : -1,
    shown: state.shown,
    made: state.made,
    making: state.making,
    buffered: state.buffered,
    fps: player.rate(),
    drawn: player.drawn,
    skipped: player.skipped,
    stalls: player.stalls,
    firstFrameMs: times.first,
    resumed: times.resumed,
    change: state.change,
    shots: state.shots,
    notice: state.notice?.text ?? null,
    stats: state.stats,
  };
}
