"""Requests that cannot be met, and what to say of a model that failed."""

from longlive_jax.config.flags import describe

TOLD = (ArithmeticError, ValueError)  # their text is meant for the user
CLOSE_BASE = 4000  # a WebSocket is closed with this plus the HTTP status


class Refused(Exception):
  """A request that is refused; becomes an HTTP error, or an event and perhaps a close code.

  Args:
    status: HTTP status.
    code: a word for programs.
    message: one line for people: what was found, what is required.
    param: name of the field that is wrong.
  """

  def __init__(self, status: int, code: str, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.code, self.message, self.param = status, code, message, param

  @property
  def close_code(self) -> int:
    """Of a WebSocket that is closed for this."""
    return CLOSE_BASE + self.status

  def tree(self) -> dict[str, object]:
    """The JSON body of the HTTP error."""
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    error = {"code": self.code, "message": self.message, "param": self.param, "type": kind}
    return {"error": error}


def model_error(error: BaseException) -> str:
  """One line for the user of a session or video that failed; tells nothing of the machine."""
  if isinstance(error, TOLD):
    return describe(error)
  return f"the model failed ({type(error).__name__}); the log of the server says more"
