/** The strip of shots: a thumbnail a block, what has been played and what is ready. */

import {blockAt, firstFrame} from "./protocol.js";
import {cursorBlock, shotOf} from "./state.js";

const WIDTH = 88; // pixels of a thumbnail's picture
const CELL = 92; // of a block

/** Minutes and seconds of a frame. */
export function clock(frame, fps) {
  const seconds = Math.max(0, frame) / fps;
  const whole = Math.floor(seconds % 60);
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${String(whole).padStart(2, "0")}.${Math.floor((seconds % 1) * 10)}`;
}

/** How much of a block there is of something that reaches to a frame, from 0 to 1. */
export function share(block, frame, sizes) {
  const start = firstFrame(block, sizes);
  const length = firstFrame(block + 1, sizes) - start;
  return Math.max(0, Math.min(1, (frame - start) / length));
}

/** How many blocks the strip shows: those made, the one in the making, and the next change. */
export function count(state) {
  if (!state.session) return 0;
  const next = state.change && state.change.seen === null ? state.change.block + 1 : 0;
  return Math.max(state.made, state.making + 1, next, 1);
}

export class Timeline {
  /**
   * @param {HTMLElement} strip
   * @param {{frames: () => import("./frames.js").FrameStore, seek: (block: number) => void}} on
   */
  constructor(strip, on) {
    this.strip = strip;
    this.on = on;
    this.cells = [];
    this.id = "";
    this.held = 0; // until when the viewer scrolls by hand
    for (const kind of ["wheel", "touchmove", "pointerdown"]) {
      strip.addEventListener(kind, () => (this.held = performance.now() + 4000), {passive: true});
    }
    strip.addEventListener("click", ({target}) => {
      const cell = target.closest("button");
      if (cell) this.on.seek(Number(cell.dataset.block));
    });
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
  }

  render(state) {
    const id = state.session?.id ?? "";
    if (id !== this.id) this.clear(id);
    const wanted = count(state);
    while (this.cells.length > wanted) this.cells.pop().cell.remove();
    while (this.cells.length < wanted) this.grow();
    this.strip.hidden = wanted === 0;
    for (let block = 0; block < wanted; block++) this.paint(block, state);
    if (wanted) this.follow(cursorBlock(state));
  }

  clear(id) {
    this.id = id;
    for (const {cell} of this.cells) cell.remove();
    this.cells = [];
  }

  grow() {
    const block = this.cells.length;
    const cell = document.createElement("button");
    const picture = document.createElement("canvas");
    const bar = document.createElement("span");
    const ready = document.createElement("i");
    const played = document.createElement("b");
    const name = document.createElement("span");
    cell.type = "button";
    cell.className = "block";
    cell.dataset.block = String(block);
    picture.className = "thumb";
    bar.className = "bar";
    name.className = "name";
    bar.append(ready, played);
    cell.append(name, picture, bar);
    this.strip.append(cell);
    this.cells.push({cell, picture, ready, played, name, painted: "", drawn: null});
  }

  /** Takes the focus along, if it is in the strip. */
  focus(block) {
    if (this.strip.contains(document.activeElement)) this.cells[block]?.cell.focus();
  }

  /** Changes only what is different, as this runs with every frame. */
  paint(block, state) {
    const parts = this.cells[block];
    const {sizes} = state.session;
    const played = share(block, state.cursor + 1, sizes);
    const ready = share(block, state.buffered, sizes);
    const kept = firstFrame(block, sizes) >= state.oldest && ready > 0;
    const shot = shotOf(state, block);
    const begins = shot?.block === block;
    const next = state.shots.find((other) => other.block > block)?.block ?? Infinity;
    const length = begins ? Math.min(next, Math.max(this.cells.length, block + 3)) - block : 0;
    const now = blockAt(Math.max(0, state.cursor), sizes) === block;
    const making = state.making === block;
    if (parts.progress !== played) parts.played.style.scale = `${(parts.progress = played)} 1`;
    const key = [ready, kept, length, shot?.prompt, now, making].join("|");
    if (key !== parts.painted) this.dress(block, state, {ready, kept, length, shot, now, making});
    parts.painted = key;
    if (ready === 1 && kept) this.draw(block, parts, sizes);
  }

  dress(block, state, {ready, kept, length, shot, now, making}) {
    const {cell, name, ready: bar} = this.cells[block];
    const begins = length > 0;
    const {fps} = state.session.sizes;
    bar.style.scale = `${ready} 1`;
    cell.classList.toggle("now", now);
    cell.classList.toggle("making", making);
    cell.classList.toggle("gone", ready > 0 && !kept);
    cell.classList.toggle("later", ready === 0);
    cell.classList.toggle("begins", begins);
    cell.classList.toggle("cut", begins && shot.transition === "cut");
    name.textContent = begins ? shot.prompt : "";
    name.style.maxWidth = `${length * CELL - 10}px`;
    cell.tabIndex = now ? 0 : -1;
    if (now) cell.setAttribute("aria-current", "true");
    else cell.removeAttribute("aria-current");
    const from = clock(firstFrame(block, state.session.sizes), fps);
    const what = making ? ", being made" : ready === 0 ? ", to come" : kept ? "" : ", not kept";
    cell.setAttribute("aria-label", `Block ${block}, ${from}${what}: ${shot?.prompt ?? ""}`);
    cell.title = `Block ${block}, ${from}${what}\n${shot?.prompt ?? ""}`;
  }

  /** The picture in the middle of a block, once for the frames that it has now. */
  async draw(block, parts, sizes) {
    const middle = Math.floor((firstFrame(block, sizes) + firstFrame(block + 1, sizes)) / 2);
    const blob = this.on.frames().get(middle);
    if (!blob || parts.drawn === blob) return;
    parts.drawn = blob;
    const bitmap = await createImageBitmap(blob, {resizeWidth: WIDTH, resizeQuality: "low"});
    parts.picture.width = bitmap.width;
    parts.picture.height = bitmap.height;
    parts.picture.getContext("2d", {alpha: false}).drawImage(bitmap, 0, 0);
    bitmap.close();
  }

  /** Keeps the block on the screen in view, unless the viewer scrolls. */
  follow(block) {
    if (block === this.followed || performance.now() < this.held) return;
    this.followed = block;
    const cell = this.cells[block]?.cell;
    if (!cell) return;
    const left = cell.offsetLeft - this.strip.clientWidth / 2;
    this.strip.scrollTo({left, behavior: this.calm.matches ? "auto" : "smooth"});
  }
}
