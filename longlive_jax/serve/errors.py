"""Requests that cannot be met, and what to say of a model that failed."""

import time

from absl import logging

from longlive_jax.config.flags import describe

TOLD = (ArithmeticError, ValueError)  # their text is meant for the user
CLOSE_BASE = 4000  # a WebSocket is closed with this plus the HTTP status
AGAIN_SECONDS = 3600.0  # until an error that lasts is told again


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


class Damaged(Exception):
  """A saved session cannot be used. The text is meant for the user, the cause for the log."""


def not_removed(kind: str) -> Refused:
  """A "session" or "video" stays, because its files do."""
  message = f"the files of the {kind} cannot be removed; the log of the server says more"
  return Refused(507, "not_removed", message)


def model_error(error: BaseException) -> str:
  """One line for the user of a session or video that failed; tells nothing of the machine."""
  if isinstance(error, Damaged):
    return f"{error}; the log of the server says more"
  if isinstance(error, TOLD):
    return describe(error)
  return f"the model failed ({type(error).__name__}); the log of the server says more"


def log_line(error: BaseException) -> str:
  """One line for the log."""
  if isinstance(error, Damaged) and error.__cause__:
    error = error.__cause__
  said = describe(error)
  return said if isinstance(error, (*TOLD, OSError)) else f"{type(error).__name__}: {said}"


def log_failure(what: str, error: BaseException) -> None:
  """Logs an error: one line if files are to blame, with a traceback if the program may be."""
  if isinstance(error, (Damaged, OSError)):
    logging.error("%s: %s", what, log_line(error))
  else:
    logging.error("%s", what, exc_info=error)


class Seldom:
  """Logs errors that come again and again: those of one thing once in `AGAIN_SECONDS`."""

  def __init__(self) -> None:
    self._told: dict[str, float] = {}  # and when

  def tell(self, what: str, error: BaseException) -> None:
    """Logs one line, unless it has been told."""
    now = time.monotonic()
    self._told = {k: at for k, at in self._told.items() if now - at < AGAIN_SECONDS}
    if what not in self._told:
      self._told[what] = now
      logging.error("%s: %s", what, log_line(error))
