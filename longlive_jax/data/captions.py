"""Lists of captions as scripts: how many blocks each caption gets.

Source: inference.md §2.2.
"""

import re
from collections.abc import Sequence

from longlive_jax.data.prompts import Script, Shot


def distribute_blocks(
  n_shots: int,
  n_blocks: int,
  per_shot: int | None = None,
  durations: Sequence[int] | None = None,
) -> tuple[int, ...]:
  """Shares the blocks of a video among its captions.

  Shots are used in order until the video is full, the last one shortened; if they do not fill
  it, the last one is lengthened.

  Args:
    n_shots: captions, >= 1.
    n_blocks: blocks of the video, >= 1.
    per_shot: blocks a shot, >= 1; without it, an even split whose first shots are one longer.
    durations: blocks of the first shots, each >= 1, before any other rule; more than `n_shots`
      are ignored.

  Returns:
    Lengths of the shots that are used, at most `n_shots`; their sum is `n_blocks`.

  Raises:
    ValueError: a number is below 1, or `durations` is empty.

  >>> distribute_blocks(2, 12, per_shot=4)
  (4, 8)
  >>> distribute_blocks(3, 12, durations=[2, 6, 4])
  (2, 6, 4)
  >>> distribute_blocks(5, 12)
  (3, 3, 2, 2, 2)
  """
  wanted = durations if durations is not None else [1 if per_shot is None else per_shot]
  smallest = min([n_shots, n_blocks, *wanted]) if wanted else 0
  if smallest < 1:
    raise ValueError(
      f"n_shots={n_shots}, n_blocks={n_blocks}, per_shot={per_shot} and durations={durations}"
      " must all be at least 1"
    )
  if durations is not None:
    lengths = list(durations[:n_shots])
  else:
    lengths = [per_shot] * n_shots if per_shot else even_split(n_shots, n_blocks)
  used: list[int] = []
  for length in lengths:
    left = n_blocks - sum(used)
    if left and length:
      used.append(min(length, left))
  used[-1] += n_blocks - sum(used)
  return tuple(used)


def even_split(n_shots: int, n_blocks: int) -> list[int]:
  """Blocks of each shot, as equal as can be, the longer ones first; some may be 0."""
  base, longer = divmod(n_blocks, n_shots)
  return [base + (i < longer) for i in range(n_shots)]


def parse_durations(text: str) -> tuple[int, ...]:
  """Whole numbers separated by commas, blanks or both, as in a `shot_durations.txt`.

  >>> parse_durations("2, 6 4")
  (2, 6, 4)
  """
  words = re.split(r"[,\s]+", text.strip(", \t\r\n"))
  if not all(word.isdecimal() for word in words):
    raise ValueError(f"shot durations must be whole numbers such as '2, 6, 4', not {text!r}")
  return tuple(int(word) for word in words)


def script_from_captions(
  captions: Sequence[str],
  n_blocks: int,
  per_shot: int | None = None,
  durations: Sequence[int] | None = None,
) -> Script:
  """A script with one shot a caption, cut where `distribute_blocks` says; it may leave some out.

  >>> [shot.blocks for shot in script_from_captions(["a", "b"], 12, per_shot=4).shots]
  [4, 8]
  """
  lengths = distribute_blocks(len(captions), n_blocks, per_shot, durations)
  return Script(tuple(Shot(c, n) for c, n in zip(captions, lengths, strict=False)))
