/**
 * Plays frames at the video's pace from a small buffer. Frames are decoded a little ahead; what
 * comes late is skipped, what is missing is waited for, and after each wait a larger buffer is
 * gathered before playing goes on.
 */

const DECODED = 12; // frames decoded ahead
const LATE_FRAMES = 2; // later than this is a stall
const RESET_MS = 1000; // after such a gap (a hidden tab) nothing is made up for

export class Player {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {import("./frames.js").FrameStore} store
   * @param {{frame: (frame: number, at: number) => void, state: (name: string) => void}} on
   */
  constructor(canvas, store, on) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", {alpha: false});
    this.on = on;
    /** @type {Map<number, ImageBitmap | null>} null: being decoded */
    this.decoded = new Map();
    this.tick = this.tick.bind(this);
    this.request = 0;
    this.reset(store);
  }

  /** Begins anew, with the frame after `cursor` as the next one. */
  reset(store, cursor = -1) {
    this.store = store;
    this.epoch = (this.epoch ?? 0) + 1;
    for (const bitmap of this.decoded.values()) bitmap?.close();
    this.decoded.clear();
    this.cursor = cursor;
    this.still = -1; // a frame to be drawn as soon as it is decoded
    this.state = "filling";
    this.paused = false;
    this.finished = false; // no more frames will come
    this.due = 0;
    this.target = 0; // frames to gather before playing; 0: one message
    this.stalls = this.skipped = this.drawn = 0;
    this.times = []; // of the last frames
  }

  /** @param {{width: number, height: number, sizes: {fps: number, per: number}}} session */
  begin(session) {
    this.frameMs = 1000 / session.sizes.fps;
    this.per = session.sizes.per;
    if (this.canvas.width !== session.width) this.canvas.width = session.width;
    if (this.canvas.height !== session.height) this.canvas.height = session.height;
    if (!this.request) this.request = requestAnimationFrame(this.tick);
  }

  enter(state) {
    if (this.state === state) return;
    this.state = state;
    this.on.state(state);
  }

  /** New frames have arrived, or all have. */
  more() {
    if (this.drawn === 0 && this.cursor < 0) this.decode(0, true);
    if (this.paused || !["filling", "stalled", "done"].includes(this.state)) return;
    const ahead = this.store.ahead(this.cursor + 1);
    if (ahead >= Math.max(1, this.target) || (ahead > 0 && this.finished)) this.go();
    else if (this.finished) this.enter("done");
  }

  go() {
    this.fresh = true; // nothing is late until the first frame is decoded
    this.due = performance.now();
    this.times = [];
    this.enter("playing");
  }

  pause(paused) {
    if (this.paused === paused) return;
    this.paused = paused;
    this.times = [];
    this.due = performance.now();
    this.fresh = true;
    if (!paused) this.more();
  }

  /** The frame on the screen, or the one that will be when it is decoded. */
  get aim() {
    return this.still < 0 ? this.cursor : this.still;
  }

  /** Shows a frame that is kept, and goes on from there. */
  seek(frame) {
    this.forgetDecoded();
    this.cursor = frame - 1;
    this.still = frame;
    this.fresh = true;
    this.times = [];
    this.due = performance.now();
    this.decode(frame, true);
    if (this.state === "done" || this.state === "stalled") this.enter("filling");
    this.more();
  }

  /** Frames from this one on are not what they were. */
  dropFrom(frame) {
    this.forgetDecoded();
    this.cursor = Math.min(this.cursor, frame - 1);
    this.still = -1;
    this.finished = false;
    if (this.state !== "filling") this.enter("filling");
  }

  forgetDecoded() {
    this.epoch += 1;
    for (const bitmap of this.decoded.values()) bitmap?.close();
    this.decoded.clear();
  }

  async decode(frame, draw = false) {
    const blob = this.store.get(frame);
    if (!blob || this.decoded.has(frame)) return;
    const epoch = this.epoch;
    this.decoded.set(frame, null);
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob);
    } catch {
      if (epoch === this.epoch) this.decoded.delete(frame);
      return;
    }
    if (epoch !== this.epoch) {
      bitmap.close();
      return;
    }
    this.decoded.set(frame, bitmap);
    if (draw && this.cursor < frame) this.show(frame, performance.now());
  }

  decodeAhead() {
    for (let i = 1; i <= DECODED; i++) this.decode(this.cursor + i);
    for (const [frame, bitmap] of this.decoded) {
      if (frame > this.cursor && frame <= this.cursor + 2 * DECODED) continue;
      bitmap?.close();
      this.decoded.delete(frame);
    }
  }

  tick(now) {
    this.request = requestAnimationFrame(this.tick);
    if (this.state !== "playing" || this.paused) return;
    this.decodeAhead();
    if (now < this.due) return;
    if (now - this.due > RESET_MS) this.due = now;
    const steps = 1 + Math.floor((now - this.due) / this.frameMs);
    const there = Math.min(steps, this.store.ahead(this.cursor + 1));
    for (let frame = this.cursor + there; frame > this.cursor; frame--) {
      if (!this.decoded.get(frame)) continue;
      this.skipped += frame - this.cursor - 1;
      this.due += (frame - this.cursor) * this.frameMs;
      this.show(frame, now);
      return;
    }
    if (there > 0 && this.fresh) this.due = now;
    else if (there === 0 && this.finished) this.enter("done");
    else if (now - this.due > LATE_FRAMES * this.frameMs) this.starve(there);
  }

  /** The next frame is not here, or not decoded in time. */
  starve(there) {
    this.stalls += 1;
    this.target = Math.min(this.per, Math.max(8, 2 * this.target));
    if (there) this.due = performance.now(); // it is here: decoding is late
    else this.enter("stalled");
  }

  show(frame, now) {
    const bitmap = this.decoded.get(frame);
    if (!bitmap) return;
    this.context.drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
    bitmap.close();
    this.decoded.delete(frame);
    this.cursor = frame;
    this.still = -1;
    this.fresh = false;
    this.drawn += 1;
    this.times.push([now, frame]);
    if (this.times.length > 48) this.times.shift();
    this.on.frame(frame, now);
  }

  /** Frames of the video a second, over the last two seconds. */
  rate() {
    if (this.times.length < 12) return 0;
    const [[start, from], [end, to]] = [this.times[0], this.times[this.times.length - 1]];
    return end > start ? (1000 * (to - from)) / (end - start) : 0;
  }
}
