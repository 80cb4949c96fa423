/** Encoded frames that are kept: bounded, oldest blocks first to go. */

import {blockAt, firstFrame} from "./protocol.js";

/** @typedef {{first: number, frames: Blob[], bytes: number, last: boolean}} Kept */

export class FrameStore {
  /** @param {number} mostBytes what has been shown is forgotten beyond this */
  constructor(mostBytes) {
    this.mostBytes = mostBytes;
    /** @type {Map<number, Kept>} */
    this.blocks = new Map();
    this.bytes = 0;
    this.sizes = null;
  }

  /** Forgets everything; `sizes` are those of the session. */
  reset(sizes = null) {
    this.blocks.clear();
    this.bytes = 0;
    this.sizes = sizes;
  }

  /**
   * Keeps a message's frames; a block that is sent again replaces what there was.
   * @returns {number} the first frame after those of this block that are here
   */
  add({block, firstFrame: first, last, frames}) {
    const start = firstFrame(block, this.sizes);
    if (first === start) this.forget(block);
    const kept = this.blocks.get(block) ?? {first: start, frames: [], bytes: 0, last: false};
    frames.forEach((blob, i) => {
      kept.frames[first - start + i] = blob;
      kept.bytes += blob.size;
      this.bytes += blob.size;
    });
    kept.last = last;
    this.blocks.set(block, kept);
    return start + kept.frames.length;
  }

  forget(block) {
    this.bytes -= this.blocks.get(block)?.bytes ?? 0;
    this.blocks.delete(block);
  }

  /** Forgets this block and later ones. */
  dropFrom(block) {
    for (const known of [...this.blocks.keys()]) if (known >= block) this.forget(known);
  }

  /** Makes room: forgets the oldest blocks, but none from `keep` on. */
  trim(keep) {
    for (const block of [...this.blocks.keys()].sort((a, b) => a - b)) {
      if (this.bytes <= this.mostBytes || block >= keep) return;
      this.forget(block);
    }
  }

  /** @returns {Blob | undefined} */
  get(frame) {
    if (!this.sizes || frame < 0) return undefined;
    const kept = this.blocks.get(blockAt(frame, this.sizes));
    return kept?.frames[frame - kept.first];
  }

  /** How many frames there are from this one on, without a gap. */
  ahead(frame) {
    if (!this.sizes) return 0;
    let count = 0;
    for (let block = blockAt(frame, this.sizes); ; block++) {
      const kept = this.blocks.get(block);
      if (!kept) return count;
      const end = kept.first + kept.frames.length;
      count += Math.max(0, end - Math.max(frame, kept.first));
      if (!kept.last) return count;
    }
  }

  /** First frame that is kept. */
  oldest() {
    const blocks = [...this.blocks.keys()];
    return blocks.length ? firstFrame(Math.min(...blocks), this.sizes) : 0;
  }

  /** A copy with blocks before `end`; the pictures themselves are shared. */
  copy(end = Infinity) {
    const other = new FrameStore(this.mostBytes);
    other.sizes = this.sizes;
    for (const [block, kept] of this.blocks) {
      if (block >= end) continue;
      other.blocks.set(block, {...kept, frames: [...kept.frames]});
      other.bytes += kept.bytes;
    }
    return other;
  }
}
