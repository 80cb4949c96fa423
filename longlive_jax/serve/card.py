"""What the server remembers of a live session beside the model's state; it is saved with it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

from longlive_jax.checks import check_at_least
from longlive_jax.data.prompts import TRANSITIONS


class Said(NamedTuple):
  """A prompt.

  Attributes:
    block: first one made under it.
    text: the prompt.
    transition: how it takes effect; "keep" at block 0, where nothing was before.
  """

  block: int
  text: str
  transition: str


@dataclasses.dataclass
class Card:
  """A session's data.

  Attributes:
    id: "session_" and 32 hexadecimal digits.
    owner: of `security.Access`.
    seed: of the noise.
    created_at: Unix time, whole seconds.
    prompts: in the order of their blocks.
    made: number of blocks made.
    position: frames that the viewer has played.
    keep: whether the client has saved it, so that it outlives its connection.
    saved_at: Unix time at which it was last written to disk; 0: never.
  """

  id: str
  owner: str
  seed: int
  created_at: int
  prompts: list[Said] = dataclasses.field(default_factory=list)
  made: int = 0
  position: int = 0
  keep: bool = False
  saved_at: int = 0

  def prompt_of(self, block: int) -> str:
    """The prompt under which a block is made."""
    return next((said.text for said in reversed(self.prompts) if said.block <= block), "")

  def push(self, block: int, prompt: str, transition: str) -> None:
    """Notes that a prompt holds from this block on."""
    said = Said(block, prompt, transition if block else "keep")
    self.prompts = [*(before for before in self.prompts if before.block < block), said]

  def rewind(self, block: int, position: int) -> None:
    """Notes that `block` is the next one; the viewer has played at most `position` frames."""
    self.made, self.position = block, min(self.position, position)
    kept = [said for said in self.prompts if said.block <= block]
    self.prompts = kept or self.prompts[:1]

  def to_json(self) -> str:
    """The JSON form; `from_json` gives back an equal card."""
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_tree(cls, tree: object) -> "Card":
    """Reads what `to_json` wrote, parsed.

    Raises:
      ValueError: a field is missing, unknown or of another type.
    """
    if not isinstance(tree, Mapping):
      raise ValueError("the card of a session must be a JSON object")
    try:
      card = cls(**tree)
    except TypeError as error:
      raise ValueError(f"the card of a session has other fields: {error}") from error
    for field in dataclasses.fields(cls):
      value = getattr(card, field.name)
      if type(value).__name__ != getattr(field.type, "__name__", ""):
        raise ValueError(f"{field.name}={value!r} of a saved session has another type")
    if not all(
      isinstance(p, list) and list(map(type, p)) == [int, str, str] and p[2] in TRANSITIONS
      for p in card.prompts
    ):
      raise ValueError("prompts of a saved session must be a block, a text and a transition each")
    card.prompts = [Said(*p) for p in card.prompts]
    for name in ("seed", "made", "position", "created_at", "saved_at"):
      check_at_least(name, getattr(card, name), 0)
    return card
