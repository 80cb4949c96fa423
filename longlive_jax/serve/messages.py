"""What a client may say over the WebSocket, checked before anything is done with it."""

import dataclasses
import json
from typing import NoReturn

from longlive_jax.checks import suggest
from longlive_jax.data.prompts import TRANSITIONS
from longlive_jax.serve.errors import Refused

MOST_NUMBER = 2**53  # what JSON keeps exactly
ID_CHARS = 64


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a message: its type in JSON, and whether it must be there."""

  kind: type
  needed: bool = True


TEXT, MAYBE_TEXT = Field(str), Field(str, needed=False)
NUMBER, MAYBE_NUMBER = Field(int), Field(int, needed=False)
KINDS: dict[str, dict[str, Field]] = {
  "start": {
    "prompt": TEXT,
    "seed": MAYBE_NUMBER,
    "image": MAYBE_TEXT,
    "token": MAYBE_TEXT,
  },
  "resume_session": {"id": TEXT, "token": MAYBE_TEXT, "position": MAYBE_NUMBER},
  "prompt": {"text": TEXT, "transition": MAYBE_TEXT},
  "cut": {"text": TEXT},
  "pause": {},
  "resume": {},
  "played": {"position": NUMBER},
  "seek": {"position": NUMBER},
  "fork": {"block": MAYBE_NUMBER},
  "rewind": {"block": NUMBER},
  "save": {},
  "stop": {},
}
FIRST = ("start", "resume_session")


@dataclasses.dataclass(frozen=True)
class Message:
  """A checked message.

  Attributes:
    kind: one of `KINDS`.
    number: the client's own "id", given back in answers; None if it has none.
    values: its fields.
  """

  kind: str
  number: str | int | None
  values: dict[str, str | int]

  def text(self, name: str, default: str = "") -> str:
    """A field that is a string."""
    return str(self.values.get(name, default))

  def whole(self, name: str) -> int | None:
    """A field that is a whole number; None if it is not there."""
    value = self.values.get(name)
    return None if value is None else int(value)


def not_a_number(name: str) -> NoReturn:
  """Refuses NaN and infinities, which are not JSON."""
  raise ValueError(f"{name} is not JSON")


def parse_json(text: str | bytes) -> object:
  """Reads JSON.

  Raises:
    Refused: 400, it is none.
  """
  try:
    return json.loads(text, parse_constant=not_a_number)
  except (ValueError, RecursionError) as error:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise Refused(400, "bad_json", f"not JSON: {reason[:200]}") from error


def parse(text: str) -> Message:
  """Reads a message of a client.

  Raises:
    Refused: 400, with what is wrong.
  """
  tree = parse_json(text)
  if not isinstance(tree, dict) or not isinstance(tree.get("type"), str):
    raise bad("a message must be a JSON object with a type")
  kind = tree.pop("type")
  if kind not in KINDS:
    raise bad(f"there is no message of type {kind[:40]!r}{suggest(kind[:40], KINDS)}")
  number = None if "id" in KINDS[kind] else tree.pop("id", None)
  if number is not None and not is_number(number):
    raise bad(f"id must be a whole number or a text of at most {ID_CHARS} characters", "id")
  fields, values = KINDS[kind], {}
  for name, value in tree.items():
    if name not in fields:
      hint = suggest(name[:40], fields) or f"; it has {', '.join(fields) or 'none'}"
      raise bad(f"{kind} has an unknown field {name[:40]!r}{hint}", name[:40])
    if value is None and not fields[name].needed:
      continue
    values[name] = typed(value, fields[name].kind, f"{name} of {kind}", name)
  missing = [name for name, field in fields.items() if field.needed and name not in values]
  if missing:
    raise bad(f"{kind} needs {', '.join(missing)}", missing[0])
  return Message(kind, number, values)


def typed(value: object, kind: type, what: str, name: str) -> str | int:
  """A value of the right type; whole numbers may be written with a decimal point."""
  if kind is str and isinstance(value, str):
    return value
  if kind is int and isinstance(value, int | float) and not isinstance(value, bool):
    if abs(value) <= MOST_NUMBER and value == int(value):
      return int(value)
    raise bad(f"{what} must be a whole number", name)
  raise bad(f"{what} must be a {'text' if kind is str else 'whole number'}", name)


def is_number(value: object) -> bool:
  """Whether a value may be the id of a message."""
  if isinstance(value, str):
    return len(value) <= ID_CHARS
  return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_NUMBER


def bad(message: str, param: str | None = None) -> Refused:
  """The refusal of a message."""
  return Refused(400, "bad_message", message, param)


def check_prompt(prompt: str, most_chars: int, param: str = "prompt") -> str:
  """A prompt that may be given to the text encoder.

  Raises:
    Refused: 400, it is empty, too long or not Unicode.
  """
  if not prompt.strip():
    raise Refused(400, "bad_prompt", "the prompt is empty", param)
  if len(prompt) > most_chars:
    message = f"the prompt has {len(prompt)} characters; at most {most_chars} are allowed"
    raise Refused(400, "bad_prompt", message, param)
  if any("\ud800" <= char <= "\udfff" for char in prompt) or "\0" in prompt:
    raise Refused(400, "bad_prompt", "the prompt has characters that are no text", param)
  return prompt


def check_transition(transition: str) -> str:
  """Raises Refused unless it is one of `TRANSITIONS`."""
  if transition not in TRANSITIONS:
    hint = suggest(transition[:40], TRANSITIONS)
    message = f"transition={transition[:40]!r} must be one of {', '.join(TRANSITIONS)}{hint}"
    raise Refused(400, "bad_message", message, "transition")
  return transition


def check_seed(seed: object) -> int:
  """Raises Refused unless it is a whole number from 0 to 2**32 - 1."""
  if type(seed) is not int or not 0 <= seed < 2**32:
    raise Refused(400, "bad_seed", "seed must be a whole number from 0 to 4294967295", "seed")
  return seed
