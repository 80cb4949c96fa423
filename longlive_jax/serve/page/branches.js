/** Branches of a video: each is a session, and one of them is watched. */

import {firstFrame} from "./protocol.js";
import {cursorBlock, initial, looksBack} from "./state.js";
import {forget} from "./memory.js";

const OWN = ["session", "shots", "made", "buffered", "oldest", "shown", "cursor", "first"];

export class Branches {
  /** @param {import("./control.js").Control} control */
  constructor(control) {
    this.control = control;
    /**
     * By id; null: nothing of it is here, as after a reload.
     * @type {Map<string, {values: object, frames: import("./frames.js").FrameStore} | null>}
     */
    this.kept = new Map();
  }

  clear() {
    this.kept.clear();
  }

  /** After a reload: the branches that there were. */
  restore(ids = []) {
    for (const id of ids) if (!this.kept.has(id)) this.kept.set(id, null);
    this.control.set({branches: [...this.kept.keys()]});
  }

  /**
   * The server no longer has this one: opens another, unless frames of it can still be looked at.
   * @returns {boolean} whether another one is opened
   */
  drop(id) {
    const {control} = this;
    forget(id);
    if (control.frames.bytes || !this.kept.delete(id) || !this.kept.size) return false;
    control.set({session: null}); // nothing of it is to be kept
    this.open([...this.kept.keys()].at(-1));
    control.say("info", "The server no longer has that branch.");
    return true;
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
    const {model, image, session, first} = control.state;
    if (session && id !== session.id) this.keep();
    const branches = [...this.kept.keys()];
    const kept = this.kept.get(id);
    if (!kept) {
      control.set({branches});
      return control.comeBack({id, first});
    }
    const {values, frames} = kept;
    control.set({...initial, model, image, branches, ...values, link: "connecting"});
    control.frames = frames;
    control.player.reset(frames, values.cursor);
    control.player.begin(values.session);
    return control.link.resume(id, values.shown);
  }
}
