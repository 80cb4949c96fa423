/** The WebSocket: one session, connected again with growing pauses when the connection is lost. */

import {backoff, unpack, verdict} from "./protocol.js";
import {token} from "./api.js";

/** @typedef {(kind: string, detail?: object) => void} Tell */

export class Link {
  /**
   * @param {{event: (e: object) => void, frames: (f: object) => void, state: Tell,
   *   probe: () => Promise<string>, position: () => number}} on `probe` finds out why a connection
   *   was refused: "token", "starting", "lost" or "failed"
   */
  constructor(on) {
    this.on = on;
    this.socket = null;
    this.first = null; // the first message of the next connection
    this.attempt = 0;
    this.timer = 0;
    this.number = 0;
    /** @type {Map<number, (answer: object) => void>} */
    this.asked = new Map();
    addEventListener("online", () => this.timer && this.retryNow());
  }

  /** Begins a session. */
  start(fields) {
    this.begin({type: "start", ...fields});
  }

  /** Goes on with a session. */
  resume(id, position) {
    this.begin({type: "resume_session", id, ...(position === undefined ? {} : {position})});
  }

  begin(first) {
    this.close();
    this.first = first;
    this.attempt = 0;
    this.connect();
  }

  /** Leaves the session; the server keeps it for a while. */
  close() {
    clearTimeout(this.timer);
    this.timer = 0;
    const socket = this.socket;
    this.socket = this.first = null;
    if (socket) socket.onmessage = socket.onclose = null;
    socket?.close();
    this.giveUp();
  }

  /** Answers that will not come any more. */
  giveUp() {
    for (const done of this.asked.values()) done({type: "error", message: "connection lost"});
    this.asked.clear();
  }

  connect() {
    const address = new URL("v1/realtime", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    const protocols = ["longlive", ...(token() ? [`token.${token()}`] : [])];
    const socket = new WebSocket(address, protocols);
    let opened = false;
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      opened = true;
      socket.send(JSON.stringify(this.first));
    };
    socket.onmessage = ({data}) => {
      if (typeof data === "string") this.receive(JSON.parse(data));
      else this.on.frames(unpack(data));
    };
    socket.onclose = ({code}) => this.closed(code, opened);
  }

  receive(event) {
    if (event.type === "session") {
      this.attempt = 0;
      this.first = {type: "resume_session", id: event.id};
    }
    this.on.event(event);
    const done = this.asked.get(event.id);
    if (!done || event.type === "session") return;
    this.asked.delete(event.id);
    done(event);
  }

  async closed(code, opened) {
    this.socket = null;
    this.giveUp();
    let what = verdict(code);
    if (!opened) {
      const first = this.first;
      what = await this.on.probe();
      if (first !== this.first || this.socket) return; // something else has begun
      if (what === "starting") this.attempt = 0;
    }
    if (what === "retry" || what === "lost" || what === "starting") {
      this.attempt += 1;
      this.timer = setTimeout(() => this.retryNow(), backoff(this.attempt - 1));
      this.on.state(what === "starting" ? "starting" : "lost", {attempt: this.attempt});
    } else {
      this.on.state(what, {code});
    }
  }

  retryNow() {
    clearTimeout(this.timer);
    this.timer = 0;
    if (!this.first) return;
    const goesOn = this.first.type === "resume_session";
    if (goesOn) this.first = {...this.first, position: this.on.position()};
    this.connect();
  }

  get open() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  /** @returns {number} the message's id; 0 if there is no connection */
  send(type, fields = {}) {
    if (!this.open) return 0;
    const id = ++this.number;
    this.socket.send(JSON.stringify({type, id, ...fields}));
    return id;
  }

  /** Sends a message that is answered. @returns {Promise<object>} the answer; maybe an "error" */
  ask(type, fields = {}) {
    const id = this.send(type, fields);
    if (!id) return Promise.resolve({type: "error", message: "there is no connection"});
    return new Promise((resolve) => this.asked.set(id, resolve));
  }

  /** Cuts the connection as a network would; for tests. */
  drop() {
    this.socket?.close(4000);
  }
}
