"""What `POST /v1/videos` asks for, in JSON or as a form: read within limits, and checked.

Fields: `prompt` or `script`; `seconds`, `size`, `seed`, `model`, `input_reference`.
"""

import asyncio
import dataclasses
import json
import math
import secrets

from starlette.requests import Request

from longlive_jax.checks import suggest
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.serve.contract import Facts
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.form import Part, read_parts
from longlive_jax.serve.limits import Limits
from longlive_jax.serve.messages import check_prompt, check_seed, parse_json
from longlive_jax.serve.pictures import from_base64

FIELDS = ("prompt", "script", "seconds", "size", "seed", "model", "input_reference")
DEFAULT_SECONDS = 4.0
BODY_SECONDS = 6  # a body may take this many times `limits.patience_seconds`


async def read_body(request: Request, limits: Limits) -> bytes:
  """The body, read no further than allowed.

  Raises:
    Refused: 413, it is too large; 408, it takes too long.
  """
  most = limits.request_bytes
  too_large = Refused(413, "too_large", f"a request has at most {most} bytes")
  length = request.headers.get("content-length", "0")
  if not length.isascii() or not length.isdigit() or int(length[:20]) > most:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS * limits.patience_seconds):
      async for part in request.stream():
        body += part
        if len(body) > most:
          raise too_large
  except TimeoutError as error:
    raise Refused(408, "too_slow", "the body of the request took too long") from error
  return bytes(body)


async def read_fields(request: Request, limits: Limits) -> dict[str, object]:
  """The fields of a request: what JSON gives; of a form texts, and bytes for an image.

  Raises:
    Refused: 400, 408, 413 or 415.
  """
  content_type = request.headers.get("content-type", "")
  kind = content_type.partition(";")[0].strip().lower()
  if kind not in ("application/json", "multipart/form-data", ""):
    message = "the content type must be application/json or multipart/form-data"
    raise Refused(415, "bad_content_type", message)
  body = await read_body(request, limits)
  fields = read_form(content_type, body) if kind.startswith("multi") else parse_json(body)
  if not isinstance(fields, dict):
    raise bad("the body must be a JSON object with the fields of a video")
  for name in fields:
    if name not in FIELDS:
      raise bad(f"there is no field {name[:40]!r}{suggest(name[:40], FIELDS)}", name[:40])
  return {name: value for name, value in fields.items() if value is not None}


def read_form(content_type: str, body: bytes) -> dict[str, object]:
  """The fields of a multipart form; each may be a file, and that of an image stays bytes."""
  try:
    parts = read_parts(content_type, body, len(FIELDS))
  except ValueError as error:
    raise bad(f"the form cannot be read: {str(error)[:200]}") from error
  fields: dict[str, object] = {}
  for part in parts:
    name = part.name
    if name in fields:
      raise bad(f"{name[:40]!r} is given twice", name[:40])
    is_image = part.is_file and name == "input_reference"
    fields[name] = bytes(part.data) if is_image else text_of(part)
  return fields


def text_of(part: Part) -> str:
  """The text of a part; the end of a file's last line is none of it."""
  name = part.name[:40]
  try:
    text = part.data.decode()
  except UnicodeDecodeError as error:
    raise bad(f"{name!r} is no text in UTF-8", name) from error
  return text.rstrip("\r\n") if part.is_file else text


def bad(message: str, param: str | None = None) -> Refused:
  """The refusal of a request."""
  return Refused(400, "bad_request", message, param)


def script_of(fields: dict[str, object], facts: Facts, limits: Limits) -> Script:
  """The script that is to be made, with a seed, within the limits.

  Raises:
    Refused: 400, with what is wrong.
  """
  given = [name for name in ("prompt", "script") if name in fields]
  if len(given) != 1:
    raise bad("a video needs a prompt or a script, and not both", "prompt")
  check_fixed(fields, facts)
  seed = number_of(fields, "seed", whole=True)
  seconds = number_of(fields, "seconds", whole=False)
  if given == ["script"]:
    if seconds is not None:
      raise bad("the script says how long its shots are; leave seconds out", "seconds")
    script = parse_script(fields["script"])
  else:
    length = DEFAULT_SECONDS if seconds is None else float(seconds)
    if not 0 < length <= limits.seconds:
      given_length = str(fields.get("seconds", length))[:40]
      message = f"seconds={given_length} must be more than 0 and at most {limits.seconds:.12g}"
      raise bad(message, "seconds")
    script = Script((Shot(check_text(fields["prompt"], "prompt"), seconds=length),))
  check_script(script, facts, limits)
  if seed is None:
    seed = secrets.randbits(32) if script.seed is None else script.seed
  return dataclasses.replace(script, seed=check_seed(seed))


def check_fixed(fields: dict[str, object], facts: Facts) -> None:
  """Raises Refused unless the size and model asked for are those that there are."""
  for name, only in (("size", facts.size), ("model", facts.name)):
    value = fields.get(name, only)
    if value != only:
      raise bad(f"{name}={str(value)[:40]!r} must be {only!r}, the only one here", name)


def parse_script(given: object) -> Script:
  """A script from its JSON, as text or parsed."""
  text = given if isinstance(given, str) else json.dumps(given)
  try:
    script = Script.from_json(text)
  except ValueError as error:
    raise bad(str(error), "script") from error
  if script.image is not None:
    raise bad("the image of a script is a file; send the image as input_reference", "script")
  return script


def check_script(script: Script, facts: Facts, limits: Limits) -> None:
  """Raises Refused unless its prompts and its length are within the limits."""
  for shot in script.shots:
    check_prompt(shot.prompt, limits.prompt_chars)
  blocks = sum(facts.blocks_of(shot) for shot in script.shots)
  most = facts.most_blocks(limits.seconds)
  if blocks > most:
    message = f"the script has {blocks} blocks; at most {most} are allowed, {limits.seconds:.12g} s"
    raise bad(message, "script")


def check_text(value: object, name: str) -> str:
  """Raises Refused unless it is a text that is not empty."""
  if not isinstance(value, str) or not value.strip():
    raise bad(f"{name} must be a text that is not empty", name)
  return value


def number_of(fields: dict[str, object], name: str, *, whole: bool) -> int | float | None:
  """A number, which may be written as text; None if it is not given."""
  value = fields.get(name)
  if value is None:
    return None
  kind = "a whole number" if whole else "a number"
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    raise bad(f"{name} must be {kind}", name)
  try:
    number = float(value[:64]) if isinstance(value, str) else float(value)
    exact = int(value) if whole else number
  except (ValueError, OverflowError) as error:
    raise bad(f"{name}={str(value)[:40]!r} must be {kind}", name) from error
  if not math.isfinite(number) or (whole and exact != number):
    raise bad(f"{name}={str(value)[:40]!r} must be {kind}", name)
  return exact


def reference_of(fields: dict[str, object]) -> bytes | None:
  """The image file of a request, if there is one.

  Raises:
    Refused: 400, it is no file.
  """
  given = fields.get("input_reference")
  if given is None or isinstance(given, bytes):
    return given
  try:
    return from_base64(check_text(given, "input_reference"))
  except ValueError as error:
    raise bad(str(error), "input_reference") from error
