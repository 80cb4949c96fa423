/** What a viewer can do, and what happens when the server says something. */

import {blockAt, firstFrame, scriptOf, shotsOf} from "./protocol.js";
import {cursorBlock, initial, isFresh, shotOf} from "./state.js";
import {getModel, getSession, isReady, makeFilm, setToken, token, whyRefused} from "./api.js";
import {Branches} from "./branches.js";
import {forget, forgetAll, recall, remember} from "./memory.js";
import {FrameStore} from "./frames.js";
import {Link} from "./socket.js";
import {readPicture} from "./picture.js";

const REPORT_MS = 400; // at least so often the server is told what has been shown
const LOOK_MS = 1000; // between looks at a server that compiles

export class Control {
  /**
   * @param {ReturnType<import("./state.js").createStore>} store
   * @param {(on: object) => import("./player.js").Player} makePlayer
   * @param {number} mostBytes of frames that are kept
   */
  constructor(store, makePlayer, mostBytes) {
    this.store = store;
    this.frames = new FrameStore(mostBytes);
    this.player = makePlayer({
      frame: (frame, at) => this.onFrame(frame, at),
      state: (player) => this.set({player}),
    });
    this.link = new Link({
      event: (event) => this.onEvent(event),
      frames: (packed) => this.onFrames(packed),
      state: (what, detail) => this.onLink(what, detail),
      probe: whyRefused,
      position: () => this.state.shown,
    });
    this.reported = {position: 0, at: 0};
    this.refusal = "";
    this.looking = 0; // timer of `arrive`
    this.times = {asked: 0, first: null, resumed: 0};
    this.branches = new Branches(this);
  }

  get state() {
    return this.store.get();
  }

  set(values) {
    this.store.dispatch({type: "set", values});
  }

  say(kind, text) {
    this.set({notice: text ? {kind, text} : null});
  }

  /** Looks for the server and waits until its model is ready. */
  async arrive() {
    clearTimeout(this.looking);
    let link = "idle";
    try {
      const ready = await isReady();
      this.set({model: await getModel()});
      if (!ready) link = "starting";
    } catch (error) {
      link = error.status === 401 ? "token" : "lost";
      if (error.status && (error.status !== 401 || token())) this.say("error", error.message);
    }
    const known = recall();
    if (link === "idle" && known) {
      this.branches.restore(known.branches);
      return this.comeBack(known);
    }
    this.set({link});
    if (link === "starting" || link === "lost") this.looking = setTimeout(() => this.arrive(), LOOK_MS);
  }

  /** Goes on with a session of which no frames are here, as after a reload. */
  comeBack({id, shots = [], first}) {
    const {model, image, branches} = this.state;
    const kept = {model, image, branches, shots, first};
    this.set({...initial, ...kept, link: "connecting", player: "filling"});
    this.frames = new FrameStore(this.frames.mostBytes);
    this.player.reset(this.frames);
    this.link.resume(id);
  }

  useToken(given) {
    setToken(given.trim());
    this.say("info", "");
    const {session, shown, link} = this.state;
    if (session && link === "token") this.link.resume(session.id, shown);
    else this.arrive();
  }

  /** Begins a video. */
  watch(prompt, seed) {
    const image = this.state.image;
    this.store.dispatch({type: "begin"});
    this.frames = new FrameStore(this.frames.mostBytes);
    this.player.reset(this.frames);
    this.times = {asked: performance.now(), first: null, resumed: 0};
    const fields = {prompt, ...(seed === null ? {} : {seed})};
    this.link.start(image ? {...fields, image: image.url} : fields);
  }

  /** Ends the video, so that another one can begin. */
  leave() {
    if (!this.state.ended) this.link.send("stop");
    this.link.close();
    forgetAll();
    this.branches.clear();
    this.player.reset(new FrameStore(0));
    this.store.dispatch({type: "idle"});
  }

  /** A new prompt: `transition` is keep, recache or cut. */
  change(prompt, transition) {
    const id = this.link.send("prompt", {text: prompt, transition});
    if (!id) return this.say("error", "There is no connection; try again in a moment.");
    const entry = {id, prompt, transition, at: performance.now(), shown: this.state.shown};
    return this.store.dispatch({type: "sent", entry});
  }

  pause(paused = !this.state.paused) {
    if (!this.state.session) return;
    this.link.send(paused ? "pause" : "resume");
    this.set({paused});
    this.player.pause(paused);
  }

  /** Shows an earlier or later frame, if it is kept here. */
  seek(frame) {
    const {session, shown} = this.state;
    if (!session) return;
    const target = Math.max(this.frames.oldest(), Math.min(frame, Math.max(0, shown - 1)));
    if (this.frames.get(target)) this.player.seek(target);
  }

  seekBlock(block) {
    const {session} = this.state;
    if (!session) return;
    const frame = firstFrame(block, session.sizes);
    if (this.frames.get(frame)) this.seek(frame);
    else this.say("info", `The frames of block ${block} are no longer kept here.`);
  }

  live() {
    this.seek(this.state.shown - 1);
  }

  /** Makes this block again, and all that follows, under `prompt` if it is another one. */
  async goOn(prompt) {
    const block = cursorBlock(this.state);
    const {paused} = this.state;
    const other = prompt && prompt !== shotOf(this.state, block)?.prompt;
    const quiet = other && !paused; // or the block would be made before the prompt is there
    if (quiet) this.link.send("pause");
    const answer = await this.link.ask("rewind", {block});
    const done = answer.type === "rewound";
    if (done && other) this.change(prompt, "keep");
    if (quiet) this.link.send("resume");
    if (done && paused) this.pause(false);
  }

  async setImage(file) {
    try {
      this.set({image: file ? await readPicture(file) : null});
    } catch (error) {
      this.say("error", error.message);
    }
  }

  /** Has the server make the file; its frames are those that were seen. */
  async download() {
    const {session, shots, made, first, film} = this.state;
    if (!session || film || !made) return;
    const fields = {script: scriptOf(shots, made, session.seed)};
    if (first) fields.input_reference = first.url;
    try {
      const tell = (status, progress) => this.set({film: {status, progress}});
      tell("queued", 0);
      save(await makeFilm(fields, tell), `longlive-${session.seed}.mp4`);
      this.say("info", "The file has been saved.");
    } catch (error) {
      this.say("error", error.message);
    }
    this.set({film: null});
  }

  onEvent(event) {
    if (event.type === "error" && event.code === "bad_position") return;
    if (event.type === "rewound") {
      this.frames.dropFrom(event.block);
      this.player.dropFrom(event.first_frame);
      this.reported.position = Math.min(this.reported.position, event.first_frame);
    }
    if (event.type === "error") this.refusal = event.code; // the reason, if the connection ends now
    const fresh = event.type === "session" && isFresh(this.state, event);
    this.store.dispatch({type: "server", event});
    if (event.type === "session") this.onSession(fresh);
    if (event.type === "ended") this.player.finished = event.reason !== "server_stop";
    if (["session", "prompt_received", "rewound"].includes(event.type)) remember(this.state);
    this.player.more();
  }

  onSession(fresh) {
    const {session, shown, cursor, paused} = this.state;
    this.reported = {position: shown, at: 0};
    if (fresh) {
      this.frames.reset(session.sizes);
      this.player.reset(this.frames, cursor);
      this.player.begin(session);
    } else {
      this.times.resumed += 1;
    }
    this.player.pause(paused);
    this.learnShots();
  }

  /** Asks for the session's prompts: one may have been received as a connection was lost. */
  async learnShots() {
    const {session, shots} = this.state;
    const tree = await getSession(session.id).catch(() => null);
    if (!tree || this.state.session?.id !== session.id) return;
    if (this.state.shots !== shots) return this.learnShots(); // something has come meanwhile
    this.set({shots: shotsOf(tree)});
    remember(this.state);
  }

  onFrames(packed) {
    const end = this.frames.add(packed);
    const {block, last} = packed;
    this.frames.trim(blockAt(Math.max(0, this.state.cursor), this.frames.sizes));
    this.store.dispatch({type: "arrived", block, end, last, oldest: this.frames.oldest()});
    this.player.more();
  }

  onFrame(frame, at) {
    this.times.first ??= at - this.times.asked;
    this.store.dispatch({type: "frame", frame, at, rate: this.player.rate()});
    this.report(at);
  }

  /** Tells the server what has been shown, of blocks that are here as a whole. */
  report(at) {
    const {shown, made, session} = this.state;
    const position = Math.min(shown, firstFrame(made, session.sizes));
    const before = this.reported;
    if (position <= before.position) return;
    const ends = blockAt(position, session.sizes) > blockAt(before.position, session.sizes);
    if (!ends && at - before.at < REPORT_MS) return;
    if (this.link.send("played", {position})) this.reported = {position, at};
  }

  /** The connection is not what it was; see `Link`. */
  onLink(what, {attempt = 0} = {}) {
    if (what === "taken" && this.refusal === "not_resumable") what = "failed";
    if (what === "gone" && this.branches.drop(this.link.first?.id)) return undefined;
    const links = {busy: "failed", refused: "failed", gone: "ended"};
    this.set({link: links[what] ?? what, attempt, making: -1});
    if (what === "gone") {
      this.set({ended: {reason: "gone", saved: false}});
      if (!this.frames.bytes) this.leave();
    }
    if (what === "ended") forget(this.state.session?.id);
    if (what === "ended" || what === "gone") this.player.finished = true;
    return this.player.more();
  }

  /** Connects now: after a loss, or when another page had taken over. */
  again() {
    const {session, shown, link} = this.state;
    if (link === "lost" && this.link.timer) this.link.retryNow();
    else if (session && link === "taken") this.link.resume(session.id, shown);
    else if (session && !this.state.ended) this.link.resume(session.id, shown);
    else this.arrive();
  }
}

/** Hands a file to the viewer. */
function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
