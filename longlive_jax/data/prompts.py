"""Shots and scripts: what is shown, for how long, and how one prompt gives way to the next.

A script is written as JSON

    {"seed": 7, "image": "first.png", "shots": [
      {"prompt": "A red circle moves left.", "blocks": 3},
      {"prompt": "A blue square rises.", "seconds": 4.0, "transition": "cut"}]}

or as plain text with one prompt a line, each a shot of its own. `transition` says how an entry
begins; that of the first entry has no effect.

    cut      a new shot: the cut prefix is put before its first block's prompt
    keep     the same shot goes on under another prompt
    recache  like keep, and the window is computed again under the new prompt

Before the sampler sees a script, `expand` turns it into one entry a block.
Source: spec/inference.md sections 2.1 to 2.3.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from longlive_jax.checks import check_choice, suggest

TRANSITIONS = ("cut", "keep", "recache")
DEFAULT_BLOCKS = 3  # of an entry that says neither blocks nor seconds
FRAMES_A_LATENT = 4
MOST_BLOCKS, MOST_SECONDS = 100_000, 100_000  # of an entry: more than a day of video


@dataclasses.dataclass(frozen=True)
class Shot:
  """One entry of a script.

  Attributes:
    prompt: what is shown; not empty.
    blocks: length in blocks, >= 1.
    seconds: length in seconds, > 0, rounded to the nearest number of blocks; at most one of the
      two lengths is given, and with neither the entry has `DEFAULT_BLOCKS`.
    transition: how it begins: "cut", "keep" or "recache".

  Raises:
    ValueError: a value that does not work.
  """

  prompt: str
  blocks: int | None = None
  seconds: float | None = None
  transition: str = "cut"

  def __post_init__(self) -> None:
    if not isinstance(self.prompt, str) or not self.prompt.strip():
      raise ValueError(f"prompt={self.prompt!r} must be text that is not empty")
    if self.blocks is not None and self.seconds is not None:
      raise ValueError(f"blocks={self.blocks} and seconds={self.seconds} are both given; give one")
    if self.blocks is not None and (type(self.blocks) is not int or self.blocks < 1):
      raise ValueError(f"blocks={self.blocks!r} must be a whole number of at least 1")
    if self.blocks is not None and self.blocks > MOST_BLOCKS:
      raise ValueError(f"blocks={self.blocks} must be at most {MOST_BLOCKS}")
    if self.seconds is not None and not is_positive(self.seconds):
      raise ValueError(f"seconds={self.seconds!r} must be a number of more than 0")
    if self.seconds is not None and self.seconds > MOST_SECONDS:
      raise ValueError(f"seconds={self.seconds} must be at most {MOST_SECONDS}")
    check_choice("transition", self.transition, TRANSITIONS)

  def count_blocks(self, fps: float, block_latents: int) -> int:
    """Length in blocks, at least 1, of `4 * block_latents` frames each."""
    if self.seconds is None:
      return self.blocks or DEFAULT_BLOCKS
    return max(1, math.floor(self.seconds * fps / (FRAMES_A_LATENT * block_latents) + 0.5))


def is_positive(value: object) -> bool:
  """Whether a value is a finite number above 0."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and 0 < value < math.inf


@dataclasses.dataclass(frozen=True)
class Script:
  """A list of shots, with the seed of the noise and the first frame if they are given.

  Attributes:
    shots: at least one entry.
    seed: of the noise, 0 <= seed < 2**32; None takes `sample.seed`.
    image: path of the first frame (image-to-video).
  """

  shots: tuple[Shot, ...]
  seed: int | None = None
  image: str | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, "shots", tuple(self.shots))
    if not self.shots:
      raise ValueError("the script is empty: it needs at least one shot with a prompt")
    if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**32):
      raise ValueError(f"seed={self.seed!r} must be a whole number, at least 0 and below 2**32")
    if self.image is not None and (not isinstance(self.image, str) or not self.image):
      raise ValueError(f"image={self.image!r} must be the path of an image")

  @classmethod
  def of(cls, *prompts: str, blocks: int | None = None, seed: int | None = None) -> "Script":
    """One shot a prompt, all of the same length."""
    return cls(tuple(Shot(prompt, blocks) for prompt in prompts), seed)

  @classmethod
  def from_text(cls, text: str) -> "Script":
    """One prompt a line, each a shot; blank lines and lines that begin with # are skipped."""
    lines = (line.strip() for line in text.lstrip("\ufeff").splitlines())
    return cls.of(*(line for line in lines if line and not line.startswith("#")))

  @classmethod
  def from_json(cls, text: str) -> "Script":
    """Reads the JSON form above.

    Raises:
      ValueError: not JSON (with the line), an unknown field, or a value that does not work.
    """
    try:
      tree = json.loads(text.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
      raise ValueError(
        f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
      ) from error
    except RecursionError as error:
      raise ValueError("not JSON: nested too deeply") from error
    values = fields_of(cls, tree, "the script")
    entries = values.pop("shots", [])
    if not isinstance(entries, list):
      raise ValueError("shots must be a list of entries with a prompt")
    return cls(tuple(parse_shot(entry, i) for i, entry in enumerate(entries)), **values)

  def to_json(self) -> str:
    """The JSON form; `from_json` gives back an equal script."""
    tree = {name: value for name, value in vars(self).items() if value is not None}
    tree["shots"] = [
      {name: value for name, value in vars(shot).items() if value is not None}
      for shot in self.shots
    ]
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def fields_of(kind: type, tree: object, where: str) -> dict:
  """The entries of a JSON object, all of them fields of the dataclass `kind`."""
  known = [field.name for field in dataclasses.fields(kind)]
  if not isinstance(tree, Mapping):
    raise ValueError(f"{where} must be a JSON object with the fields {', '.join(known)}")
  for name in tree:
    if name not in known:
      hint = suggest(name, known) or f"; the fields are {', '.join(known)}"
      raise ValueError(f"{where} has an unknown field '{name}'{hint}")
  return dict(tree)


def parse_shot(entry: object, index: int) -> Shot:
  """One entry of the JSON form; errors name its place."""
  where = f"shots[{index}]"
  values = fields_of(Shot, entry, where)
  if "prompt" not in values:
    raise ValueError(f"{where} has no prompt")
  try:
    return Shot(**values)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def load_script(path: str | Path) -> Script:
  """Reads a script file: `.json`, or `.txt` with one prompt a line.

  A relative image path is relative to the folder of the script.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another suffix, or the text is not a script.
  """
  path = Path(path)
  readers = {".json": Script.from_json, ".txt": Script.from_text}
  if path.suffix.lower() not in readers:
    raise ValueError(f"script file '{path}' must end in .json or .txt")
  if not path.is_file():
    raise FileNotFoundError(f"script file '{path}' does not exist")
  try:
    script = readers[path.suffix.lower()](path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"script file '{path}': {error}") from error
  if script.image is None:
    return script
  return dataclasses.replace(script, image=str(path.parent / script.image))


def script_files(path: str | Path, setting: str) -> list[tuple[str, Script]]:
  """(name, script) of a script file, or of all in a folder in the order of their names.

  Args:
    path: of the file or folder.
    setting: that names it, for errors.

  Raises:
    FileNotFoundError, ValueError: there is none, or one cannot be read.
  """
  path = Path(path)
  if not path.is_dir():
    return [(path.stem, load_script(path))]
  files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".txt"))
  if not files:
    raise ValueError(f"{setting}='{path}' is a folder without a .json or .txt script")
  return [(file.stem, load_script(file)) for file in files]


@dataclasses.dataclass(frozen=True)
class BlockPrompt:
  """What the sampler is told about one block.

  Attributes:
    prompt: text to encode; the first block of a cut begins with the cut prefix.
    shot: index of the shot, the number of cuts so far.
    transition: "start" for the first block of the video, "cut", "keep" or "recache" for the
      first block of a later entry, None for a block that goes on.
  """

  prompt: str
  shot: int
  transition: str | None = None


BlockPlan = tuple[BlockPrompt, ...]


def expand(script: Script, video_fps: float, block_latents: int, cut_prefix: str) -> BlockPlan:
  """Lays a script out in blocks.

  What a prompt says never makes a cut; only `transition` does. The prefix may be empty.

  Args:
    script: any script.
    video_fps: `video.fps`.
    block_latents: `model.block_latents`.
    cut_prefix: `sample.cut_prefix`.

  Returns:
    One entry a block.

  Source: inference.md §2.1.

  >>> script = Script((Shot("A", 2), Shot("B", 2), Shot("C", 1, transition="keep")))
  >>> [(b.prompt, b.shot, b.transition) for b in expand(script, 24, 8, "Cut. ")]
  ... # doctest: +NORMALIZE_WHITESPACE
  [('A', 0, 'start'), ('A', 0, None), ('Cut. B', 1, 'cut'), ('B', 1, None), ('C', 1, 'keep')]
  """
  plan: list[BlockPrompt] = []
  for entry in script.shots:
    first = first_block(entry, plan[-1] if plan else None, cut_prefix)
    rest = entry.count_blocks(video_fps, block_latents) - 1
    plan.extend([first, *[BlockPrompt(entry.prompt, first.shot)] * rest])
  return tuple(plan)


def first_block(entry: Shot, before: BlockPrompt | None, cut_prefix: str) -> BlockPrompt:
  """The first block of an entry.

  Args:
    entry: any.
    before: the block before it; None at the start of a video, where a transition has no effect.
    cut_prefix: `sample.cut_prefix`.
  """
  if before is None:
    return BlockPrompt(entry.prompt, 0, "start")
  if entry.transition == "cut":
    return BlockPrompt(cut_prefix + entry.prompt, before.shot + 1, "cut")
  return BlockPrompt(entry.prompt, before.shot, entry.transition)
