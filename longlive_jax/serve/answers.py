"""JSON answers that can always be sent, whatever text of a client they repeat."""

import json
from collections.abc import Mapping

from starlette.responses import JSONResponse

from longlive_jax.serve.errors import Refused


class Json(JSONResponse):
  """JSON in ASCII: half a surrogate pair in what a client sent is no error of ours."""

  def render(self, content: object) -> bytes:
    """The body, a line."""
    return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"


def internal_error() -> Refused:
  """What is said of an error of ours; it tells nothing of the machine."""
  return Refused(500, "internal_error", "the server failed; its log says more")


def refusal(error: Refused, headers: Mapping[str, str] | None = None) -> Json:
  """The answer to a request that is refused."""
  return Json(error.tree(), error.status, headers)
