"""Who may talk to the server: tokens, hosts, origins, ids, and headers of what it answers.

A server on the loopback interface may go without a token; then the name in `Host` must be one of
this machine's, so that no page can reach it under a name of its own (DNS rebinding). Whatever can
change something must come from a page of this server, or from no page at all.
"""

import dataclasses
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from longlive_jax.serve.errors import Refused

VIDEO_ID = re.compile(r"video_[0-9a-f]{32}", re.ASCII)
SESSION_ID = re.compile(r"session_[0-9a-f]{32}", re.ASCII)
TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}", re.ASCII)  # fits into a subprotocol and an URL
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SUBPROTOCOL, TOKEN_SUBPROTOCOL = "longlive", "token."
MOST_HEADERS, MOST_HEADER_BYTES = 64, 16 << 10
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

ALWAYS = {
  "x-content-type-options": "nosniff",
  "x-frame-options": "DENY",
  "referrer-policy": "no-referrer",
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-resource-policy": "same-origin",
  "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
  "content-security-policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " media-src 'self' blob:; connect-src 'self'; worker-src 'self'; manifest-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
}


def new_id(kind: str) -> str:
  """A random id of 128 bits: "video_..." or "session_..."."""
  return f"{kind}_{secrets.token_hex(16)}"


def check_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
  """The tokens, each once.

  Raises:
    ValueError: one is too short, too long or has other characters; it is not shown.
  """
  found = tuple(dict.fromkeys(tokens))
  if not all(TOKEN.fullmatch(token) for token in found):
    raise ValueError(
      "--token must be 16 to 256 letters, digits or any of . _ ~ -; one way to make one:"
      " python -c 'import secrets; print(secrets.token_urlsafe(24))'"
    )
  return found


def owner_name(token: str) -> str:
  """What the server keeps of a token: it names the owner and tells nothing of the token."""
  return hashlib.sha256(token.encode()).hexdigest()[:32]


def host_name(authority: str) -> str:
  """The name in "name:port", "[::1]:port" or "name", in lower case; empty if it is none."""
  try:
    return (urlsplit(f"//{authority}").hostname or "").rstrip(".")
  except ValueError:
    return ""


@dataclasses.dataclass(frozen=True)
class Access:
  """Decides who is let in.

  Attributes:
    tokens: any of them is accepted; none: everybody is, as the owner "".
    hosts: names that `Host` may have, in lower case; none: any.
  """

  tokens: tuple[str, ...] = ()
  hosts: frozenset[str] = LOOPBACK_NAMES

  def owner(self, token: str | None) -> str:
    """The owner of a token.

    Raises:
      Refused: 401, it is missing or wrong.
    """
    if not self.tokens:
      return ""
    given, found = (token or "").encode(errors="replace"), ""
    for known in self.tokens:  # all of them, so that the time tells nothing
      if hmac.compare_digest(given, known.encode()):
        found = owner_name(known)
    if not found:
      raise Refused(401, "unauthorised", "a valid token is needed: Authorization: Bearer TOKEN")
    return found

  def check_headers(self, headers: Headers) -> None:
    """Raises Refused: 431, more or larger headers than any client needs."""
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > MOST_HEADERS or size > MOST_HEADER_BYTES:
      raise Refused(431, "headers_too_large", f"at most {MOST_HEADERS} headers, 16 KiB in all")

  def check_host(self, headers: Headers) -> None:
    """Raises Refused: 400 or 403, `Host` is missing, given twice or the name of another server."""
    given = headers.getlist("host")
    if len(given) != 1:
      raise Refused(400, "bad_host", "a request needs one Host header")
    if self.hosts and host_name(given[0]) not in self.hosts:
      raise Refused(403, "bad_host", "this server does not answer to the name in the Host header")

  def check_origin(self, headers: Headers) -> None:
    """Raises Refused: 403, the request comes from the page of another server."""
    origins, site = headers.getlist("origin"), headers.get("sec-fetch-site", "none")
    host = (headers.get("host") or "").lower()
    same = all(urlsplit_netloc(origin) == host for origin in origins)
    if not same or len(origins) > 1 or site not in ("none", "same-origin"):
      raise Refused(403, "cross_origin", "requests from pages of other servers are refused")


def urlsplit_netloc(origin: str) -> str:
  """The "name:port" of an http(s) origin in lower case; empty if it is none."""
  try:
    parts = urlsplit(origin)
  except ValueError:
    return ""
  return parts.netloc.lower() if parts.scheme in ("http", "https") else ""


def bearer(headers: Headers) -> str | None:
  """The token of an Authorization header."""
  kind, _, token = headers.get("authorization", "").partition(" ")
  return token.strip() if kind.lower() == "bearer" else None


def handshake_token(subprotocols: Sequence[str], headers: Headers, query: str | None) -> str | None:
  """The token that a WebSocket client gives before its first message, by any of three ways."""
  offered = [p for p in subprotocols if p.startswith(TOKEN_SUBPROTOCOL)]
  if offered:
    return offered[0].removeprefix(TOKEN_SUBPROTOCOL)
  return bearer(headers) or query


def check_id(value: str, pattern: re.Pattern[str]) -> str:
  """An id that is safe to use as a name.

  Raises:
    Refused: 404, as for an id that nobody has.
  """
  if not pattern.fullmatch(value):
    raise unknown(pattern)
  return value


def unknown(pattern: re.Pattern[str]) -> Refused:
  """There is no such video or session, or it belongs to somebody else."""
  kind = pattern.pattern.partition("_")[0]
  return Refused(404, f"unknown_{kind}", f"there is no such {kind}")
