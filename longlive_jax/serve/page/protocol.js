/**
 * The protocol of docs/serving.md as pure functions: blocks and frames, binary messages, and what the
 * end of a connection means.
 */

/**
 * Sizes of a video, from the event "session" or from /v1/models.
 * @typedef {{first: number, per: number, fps: number}} Sizes
 */

/** @returns {Sizes} */
export function sizesOf(tree) {
  return {first: tree.first_block_frames, per: tree.block_frames, fps: tree.fps};
}

/** Index of a block's first frame: how many frames come before it. */
export function firstFrame(block, /** @type {Sizes} */ sizes) {
  return block <= 0 ? 0 : sizes.first + (block - 1) * sizes.per;
}

/** The block that holds a frame. */
export function blockAt(frame, /** @type {Sizes} */ sizes) {
  return frame < sizes.first ? 0 : 1 + Math.floor((frame - sizes.first) / sizes.per);
}

/**
 * Reads a binary message.
 * @param {ArrayBuffer} buffer
 * @returns {{block: number, firstFrame: number, last: boolean, frames: Blob[]}}
 */
export function unpack(buffer) {
  const view = new DataView(buffer);
  const magic = String.fromCharCode(...new Uint8Array(buffer, 0, 4));
  if (magic !== "LLF1") throw new Error("a binary message does not begin with LLF1");
  const type = view.getUint8(4) === 1 ? "image/jpeg" : "image/webp";
  const count = view.getUint16(6, true);
  const frames = [];
  let at = 16 + 4 * count;
  for (let i = 0; i < count; i++) {
    const size = view.getUint32(16 + 4 * i, true);
    frames.push(new Blob([new Uint8Array(buffer, at, size)], {type}));
    at += size;
  }
  const last = (view.getUint8(5) & 1) === 1;
  return {block: view.getUint32(8, true), firstFrame: view.getUint32(12, true), last, frames};
}

/**
 * What is to be done when a connection has ended.
 * "retry": connect again and resume; "refused": the first message was wrong; the rest as named.
 */
export function verdict(code) {
  const known = {
    1000: "ended",
    1009: "refused",
    1011: "ended",
    4400: "refused",
    4401: "token",
    4404: "gone",
    4409: "taken",
    4415: "refused",
    4429: "busy",
  };
  return known[code] ?? "retry";
}

/** Milliseconds until the next attempt to connect; `chance` from 0 to 1 spreads clients out. */
export function backoff(attempt, chance = Math.random()) {
  return Math.min(10000, 400 * 2 ** Math.min(attempt, 8)) * (0.75 + 0.5 * chance);
}

/** The shots of a session, from /v1/sessions/ID. */
export function shotsOf(tree) {
  return tree.prompts.map(({block, text, transition}) => ({block, prompt: text, transition}));
}

/**
 * The script of a session: made from it, a video has the same frames.
 * @param {{block: number, prompt: string, transition: string}[]} shots
 * @param {number} blocks length of the video
 * @param {number} seed
 */
export function scriptOf(shots, blocks, seed) {
  const list = [];
  shots.forEach((shot, i) => {
    const end = Math.min(blocks, shots[i + 1]?.block ?? blocks);
    if (end <= shot.block) return;
    const entry = {prompt: shot.prompt, blocks: end - shot.block};
    list.push(list.length ? {...entry, transition: shot.transition} : entry);
  });
  return {seed, shots: list};
}
