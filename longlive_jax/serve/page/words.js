/** Prompts that the small model of this repository understands: the words of its world of shapes. */

export const COLOURS = ["red", "green", "blue", "yellow", "purple", "cyan"];
export const SHAPES = ["circle", "square", "triangle"];
export const BACKGROUNDS = ["night", "snow", "fog", "sand", "slate", "checker"];
const PAIRS = [
  {lanes: ["north", "south"], directions: ["left", "right"]},
  {lanes: ["west", "east"], directions: ["up", "down"]},
];

export const EXAMPLES = [
  "one red circle moving left, over snow",
  "one purple triangle moving up, over sand",
  "north yellow square moving right, south blue circle heading left, over night",
];

/** Whether a model (its entry in /v1/models) is the small one. */
export function knowsShapes(model) {
  return model.id.startsWith("tiny");
}

/**
 * A prompt drawn at random.
 * @param {() => number} chance from 0 to 1
 */
export function anyPrompt(chance = Math.random) {
  const pick = (list) => list[Math.floor(chance() * list.length)];
  const {lanes, directions} = pick(PAIRS);
  const first = pick(COLOURS);
  const thing = (colour, verb) => `${colour} ${pick(SHAPES)} ${verb} ${pick(directions)}`;
  if (chance() < 0.5) return `one ${thing(first, "moving")}, over ${pick(BACKGROUNDS)}`;
  const second = pick(COLOURS.filter((colour) => colour !== first));
  const things = `${lanes[0]} ${thing(first, "moving")}, ${lanes[1]} ${thing(second, "heading")}`;
  return `${things}, over ${pick(BACKGROUNDS)}`;
}
