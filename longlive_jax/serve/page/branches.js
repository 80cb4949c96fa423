/** Branches of a video: each is a session, and one of them is watched. */

import {firstFrame} from "./protocol.js";
import {cursorBlock, initial, looksBack} from "./state.js";

const OWN = ["session", "shots", "made", "buffered", "oldest", "shown", "cursor", "first"];

export class Branches {
  /** @param {import("./control.js").Control} control */
  constructor(control) {
    this.control = control;
    /** @type {Map<string, {values: object, frames: import("./frames.js").FrameStore}>} */
    this.kept = new Map();
  }

  clear() {
    this.kept.clear();
  }

  /** Opens a branch that goes on from the block looked at, or from the newest one. */
  async fork() {
    const {control} = this;
    const {state} = control; // blocks made that have not arrived here would be missing
    const block = looksBack(state) ? cursorBlock(state) : state.made;
    const answer = await control.link.ask("fork", {block});
    if (answer.type !== "forked") return;
    this.keep();
    const {session, shots, made, shown, cursor} = control.state;
    const end = firstFrame(answer.block, session.sizes);
    const values = {
      ...this.kept.get(session.id).values,
      session: {...session, id: answer.session},
      shots: shots.filter((shot) => shot.block <= answer.block),
      made: Math.min(made, answer.block),
      buffered: end,
      shown: Math.min(shown, end),
      cursor: Math.min(cursor, end - 1),
    };
    this.kept.set(answer.session, {frames: control.frames.copy(answer.block), values});
    this.open(answer.session);
  }

  /** Keeps what there is of the branch that is watched. */
  keep() {
    const {state, frames} = this.control;
    const values = Object.fromEntries(OWN.map((name) => [name, state[name]]));
    this.kept.set(state.session.id, {frames, values});
  }

  /** Changes to another branch. */
  open(id) {
    const {control} = this;
    if (id !== control.state.session.id) this.keep();
    const {values, frames} = this.kept.get(id);
    const {model, image} = control.state;
    const branches = [...this.kept.keys()];
    control.set({...initial, model, image, branches, ...values, link: "connecting"});
    control.frames = frames;
    control.player.reset(frames, values.cursor);
    control.player.begin(values.session);
    control.link.resume(id, values.shown);
  }
}
