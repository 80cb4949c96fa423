/**
 * All that the page knows, in one value. `reduce` makes the next one from an action; views only
 * read it. Frames themselves are in `frames.js`, because they are large.
 */

import {blockAt, firstFrame, sizesOf} from "./protocol.js";

/** State before anything has happened. */
export const initial = Object.freeze({
  link: "checking", // checking, starting, token, idle, connecting, open, lost, ended, failed, taken
  attempt: 0, // of connecting again
  model: null, // of /v1/models
  session: null, // {id, seed, width, height, sizes, most}
  shots: [], // {block, prompt, transition}
  sent: [], // prompts without an answer: {id, prompt, transition, at, shown}
  change: null, // the last answered one: {prompt, transition, block, at, shown, seen}
  making: -1, // block that the model makes now
  made: 0, // blocks that have arrived
  oldest: 0, // first frame that is kept here
  cursor: -1, // frame on the screen
  shown: 0, // frames that have been shown; what the server follows
  buffered: 0, // frames that have arrived
  player: "empty", // empty, filling, playing, stalled, done
  paused: false,
  stats: null,
  rate: 0, // frames a second on the screen
  notice: null, // {kind: "error" | "info", text}
  ended: null, // {reason, saved}
  image: null, // {name, url} of the first frame that was chosen
  first: null, // the picture that this video began with
  branches: [], // ids of the sessions that there are
  film: null, // {status, progress}
});

/**
 * Whether the event "session" is of another session than before, or of an earlier state of it than
 * has been shown: the server was killed and lost blocks, or went back and could not say so.
 */
export function isFresh(state, event) {
  return state.session?.id !== event.id || state.shown > firstFrame(event.block, sizesOf(event));
}

/** Where a session is: begun or gone on with. */
function onSession(state, event) {
  const same = !isFresh(state, event);
  const sizes = sizesOf(event);
  const session = {
    id: event.id,
    seed: event.seed,
    width: event.width,
    height: event.height,
    sizes,
    most: event.most_blocks,
  };
  const begun = [{block: 0, prompt: event.prompt, transition: "keep"}];
  const known = same || state.shots.length > 0;
  return {
    ...state,
    session,
    link: "open",
    attempt: 0,
    shots: known ? state.shots : begun,
    shown: same ? state.shown : event.position,
    cursor: same ? state.cursor : event.position - 1,
    paused: event.paused,
    made: same ? state.made : blockAt(event.position, sizes),
    buffered: same ? Math.max(state.buffered, event.position) : event.position,
    change: same ? state.change : null,
    making: -1,
    ended: null,
    sent: [],
  };
}

function onPromptReceived(state, event) {
  const asked = state.sent.find((entry) => entry.id === event.id);
  if (!asked) return state;
  const block = event.takes_effect_block;
  const shot = {block, prompt: asked.prompt, transition: asked.transition};
  const shots = [...state.shots.filter((other) => other.block < block), shot];
  const change = {...shot, at: asked.at, shown: asked.shown, seen: null};
  return {...state, shots, change, sent: state.sent.filter((entry) => entry !== asked)};
}

function onRewound(state, event) {
  const kept = state.shots.filter((shot) => shot.block <= event.block);
  return {
    ...state,
    shots: kept.length ? kept : state.shots.slice(0, 1),
    change: state.change && state.change.block <= event.block ? state.change : null,
    making: -1,
    made: Math.min(state.made, event.block),
    shown: Math.min(state.shown, event.first_frame),
    cursor: Math.min(state.cursor, event.first_frame - 1),
    buffered: Math.min(state.buffered, event.first_frame),
  };
}

/** What the server says; see docs/serving.md. */
const events = {
  session: onSession,
  prompt_received: onPromptReceived,
  rewound: onRewound,
  block_started: (state, event) => ({...state, making: event.block}),
  stats: (state, event) => ({...state, stats: event}),
  waiting: (state) => ({...state, making: -1}),
  ended: (state, event) => ({...state, ended: event, making: -1}),
  error: (state, event) => ({
    ...state,
    sent: state.sent.filter((entry) => entry.id !== event.id),
    notice: {kind: "error", text: event.message},
  }),
};

/** What the page itself does. */
const actions = {
  server: (state, {event}) => events[event.type]?.(state, event) ?? state,
  set: (state, {values}) => ({...state, ...values}),
  begin: (state) => ({
    ...initial,
    model: state.model,
    image: state.image,
    first: state.image,
    link: "connecting",
    player: "filling",
  }),
  idle: (state) => ({...initial, model: state.model, image: state.image, link: "idle"}),
  sent: (state, {entry}) => ({...state, sent: [...state.sent, entry], notice: null}),
  arrived: (state, {block, end, last, oldest}) => ({
    ...state,
    oldest,
    buffered: Math.max(state.buffered, end),
    made: last ? Math.max(state.made, block + 1) : state.made,
    making: last && state.making === block ? -1 : state.making,
  }),
  frame: onFrame,
};

/** A frame is on the screen. */
function onFrame(state, {frame, at, rate}) {
  const shown = Math.max(state.shown, frame + 1);
  let change = state.change;
  if (change && change.seen === null && frame >= firstFrame(change.block, state.session.sizes)) {
    change = {...change, seen: at - change.at};
  }
  return {...state, cursor: frame, shown, change, rate};
}

/** The next state. */
export function reduce(state, action) {
  return actions[action.type](state, action);
}

/** Holds the state; tells listeners at most once a picture of the screen. */
export function createStore(schedule = requestAnimationFrame) {
  let state = initial;
  let waiting = false;
  const listeners = new Set();
  const tell = () => {
    waiting = false;
    for (const listener of listeners) listener(state);
  };
  return {
    get: () => state,
    listen: (listener) => listeners.add(listener),
    dispatch(action) {
      const next = reduce(state, action);
      if (next === state) return;
      state = next;
      if (!waiting) schedule(tell);
      waiting = true;
    },
  };
}

/** The shot that a block belongs to. */
export function shotOf(state, block) {
  return state.shots.findLast((shot) => shot.block <= block) ?? null;
}

/** Whether an earlier part is looked at. */
export function looksBack(state) {
  return state.session !== null && state.cursor >= 0 && state.cursor + 1 < state.shown;
}

/** The block on the screen. */
export function cursorBlock(state) {
  return state.session ? blockAt(Math.max(0, state.cursor), state.session.sizes) : 0;
}

/** Whether the server can make a block again; it may yet refuse, as after a restart. */
export function canGoBack(state, block) {
  const most = state.model?.limits.rewind_blocks ?? Infinity;
  return block >= Math.max(state.made, state.making) - most;
}

/** One word for what is going on, and a sentence for it. */
export function phase(state) {
  const before = {
    checking: ["connecting", "Looking for the server"],
    starting: ["compiling", "The model is being compiled; this page waits for it"],
    token: ["token", "The server asks for a token"],
    connecting: ["connecting", "Connecting"],
    failed: ["error", "The server refused"],
    taken: ["taken", "Another page goes on with this session"],
    idle: ["ready", "Ready"],
  };
  if (state.link === "lost" && !["playing"].includes(state.player)) return lost(state);
  if (before[state.link]) return before[state.link];
  if (state.player === "playing" && !state.paused) {
    if (state.link === "lost") return ["lost", "Connection lost; playing what has arrived"];
    return looksBack(state) ? ["back", "Looking back"] : ["playing", "Playing"];
  }
  if (state.link === "ended" || state.ended) return ["ended", endWords(state.ended)];
  if (state.paused) return ["paused", "Paused"];
  if (state.player === "stalled") return ["stalled", "Waiting for the next block"];
  const others = state.stats?.waiting ?? 0;
  return ["waiting", others ? `Waiting its turn; ${others} before` : "Making the first block"];
}

function lost(state) {
  return ["lost", `Connection lost; trying again${state.attempt > 1 ? ` (${state.attempt})` : ""}`];
}

function endWords(ended) {
  const words = {
    stopped: "Ended",
    length: "Ended: the longest length is reached",
    deleted: "Ended: deleted",
    failed: "Ended: the model failed",
    server_stop: "Ended: the server stopped",
    expired: "Ended: nobody watched for too long",
    gone: "Ended: the server no longer has this session",
  };
  return words[ended?.reason] ?? "Ended";
}
