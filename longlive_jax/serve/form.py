"""A multipart form in parts, each with its bytes as they came."""

import dataclasses

from python_multipart.multipart import MultipartParser, parse_options_header


@dataclasses.dataclass
class Part:
  """A part of a form.

  Attributes:
    headers: by name, in lower case.
    data: what it holds.
  """

  headers: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
  data: bytearray = dataclasses.field(default_factory=bytearray)

  def options(self) -> dict[bytes, bytes]:
    """What its Content-Disposition says: `name`, and `filename` if it is a file."""
    return parse_options_header(self.headers.get(b"content-disposition"))[1]

  @property
  def name(self) -> str:
    """Of the field."""
    return self.options().get(b"name", b"").decode(errors="replace")

  @property
  def is_file(self) -> bool:
    """Whether it has the name of a file."""
    return b"filename" in self.options()


class Reading:
  """What the parser has found so far; its methods are called by the parser.

  Args:
    most: parts.
  """

  def __init__(self, most: int):
    self.parts: list[Part] = []
    self.whole, self._most, self._header = False, most, b""

  def on_part_begin(self) -> None:
    """Another part."""
    if len(self.parts) == self._most:
      raise ValueError(f"it has more than {self._most} parts")
    self.parts.append(Part())

  def on_header_field(self, data: bytes, start: int, end: int) -> None:
    """The name of a header."""
    self._header = data[start:end].lower()

  def on_header_value(self, data: bytes, start: int, end: int) -> None:
    """Its value."""
    self.parts[-1].headers[self._header] = data[start:end]

  def on_part_data(self, data: bytes, start: int, end: int) -> None:
    """Some of the part's data."""
    self.parts[-1].data += memoryview(data)[start:end]

  def on_end(self) -> None:
    """The last boundary."""
    self.whole = True


def read_parts(content_type: str, body: bytes, most: int) -> list[Part]:
  """The parts of a form.

  Args:
    content_type: header of the request, with the boundary.
    body: all of it.
    most: parts.

  Raises:
    ValueError: it is no form, it is cut off, or it has too many parts.
  """
  boundary = parse_options_header(content_type)[1].get(b"boundary")
  if not boundary:
    raise ValueError("the content type names no boundary")
  reading = Reading(most)
  MultipartParser(
    boundary,
    {
      "on_part_begin": reading.on_part_begin,
      "on_header_field": reading.on_header_field,
      "on_header_value": reading.on_header_value,
      "on_part_data": reading.on_part_data,
      "on_end": reading.on_end,
    },
  ).write(body)
  if not reading.whole:
    raise ValueError("it is cut off: the last boundary is missing")
  return reading.parts
