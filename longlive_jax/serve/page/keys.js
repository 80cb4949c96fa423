/** The keyboard: one table, from which the help is written too. */

/** @typedef {{keys: string[], what: string}} Help */

/** @type {Help[]} */
export const HELP = [
  {keys: ["Space"], what: "pause, go on"},
  {keys: ["Enter"], what: "begin; switch to the new prompt, the picture goes on"},
  {keys: ["Shift Enter"], what: "re-cache: switch, and leave no trace of the old prompt"},
  {keys: ["Ctrl Enter", "Alt Enter"], what: "cut to a new shot"},
  {keys: ["←", "→"], what: "a block back, forward"},
  {keys: [",", "."], what: "a frame back, forward"},
  {keys: ["Home", "End"], what: "the oldest frame kept, the newest one shown"},
  {keys: ["G"], what: "go on from the block looked at"},
  {keys: ["F"], what: "fork: a branch from here, the other stays"},
  {keys: ["D"], what: "download as mp4"},
  {keys: ["/"], what: "to the prompt; Esc leaves it"},
  {keys: ["?"], what: "this help"},
];

const WRITES = "textarea, input, select, dialog *";

/** How the prompt is sent when Enter is pressed. */
export function transitionOf(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return "cut";
  return event.shiftKey ? "recache" : "keep";
}

/**
 * @param {Record<string, () => void>} act by name of key; see `main.js`
 */
export function listenToKeys(act) {
  addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented) return;
    const target = /** @type {Element} */ (event.target);
    if (target.matches(WRITES)) {
      if (event.key === "Escape" && !target.closest("dialog")) target.blur();
      return;
    }
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === " " && target.matches("button, a, label")) return;
    const done = act[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!done) return;
    event.preventDefault();
    done();
  });
}
