"""Sessions on disk.

    STATE_DIR/sessions/ID/session.json   the card, and the names of the two files below
                          state-N        what the session wrote, a file or a folder
                          frames-N       encoded frames that the viewer had not played

A session is what `session.json` names, and that is replaced in one step after the files are
complete: a crash leaves the old session or the new one, and what no `session.json` names is removed
at the next start.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from longlive_jax.config.flags import describe
from longlive_jax.io.atomic import discard, remove, replacing
from longlive_jax.serve.card import Card
from longlive_jax.serve.errors import Damaged
from longlive_jax.serve.frames import join, split
from longlive_jax.serve.security import SESSION_ID

MANIFEST = "session.json"
VERSION = re.compile(r"(?:state|frames)-(\d+)")
DAMAGED = "the saved session is damaged"


class Shelf:
  """The saved sessions of a server. Any thread may call it.

  Args:
    folder: is made if it is missing; what is half written there is removed.
    most: sessions that are kept; the oldest give way.
  """

  def __init__(self, folder: Path, most: int):
    self.folder, self.most = folder, most
    self._lock = threading.Lock()
    folder.mkdir(parents=True, exist_ok=True)
    found = [self._read(path) for path in sorted(folder.iterdir())]
    self._cards: dict[str, Card] = {card.id: card for card in found if card}
    self._hidden: set[str] = set()

  @property
  def cards(self) -> dict[str, Card]:
    """The sessions by their ids, without those that are being removed."""
    with self._lock:
      return {name: card for name, card in self._cards.items() if name not in self._hidden}

  def hide(self, session: str) -> None:
    """Makes a session unknown, because it is to be removed."""
    with self._lock:
      self._hidden.add(session)

  def show(self, session: str) -> None:
    """Makes it known again, if it is still there."""
    with self._lock:
      self._hidden.discard(session)

  def _read(self, path: Path) -> Card | None:
    """The card of a folder; what cannot be a saved session is removed or left alone."""
    if not SESSION_ID.fullmatch(path.name) or not path.is_dir():
      return None
    try:
      tree = json.loads((path / MANIFEST).read_text())
      card = Card.from_tree(tree["card"])
      names = {MANIFEST, tree["state"], tree["frames"]}
      if card.id != path.name or not all((path / name).exists() for name in names):
        raise ValueError("it is not complete")
      others = [other for other in path.iterdir() if other.name not in names]
    except FileNotFoundError:
      discard(path)  # a first save that did not end
      return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
      logging.warning("the saved session '%s' is left out: %s", path, error)
      return None
    for other in others:
      discard(other)
    return card

  def write(self, card: Card, frames: Sequence[bytes], save: Callable[[Path], None]) -> None:
    """Saves a session.

    Args:
      card: its data; `saved_at` is set.
      frames: binary messages that have not been played.
      save: writes the model's state to a path.

    Raises:
      OSError: it cannot be written; what was saved before stays, and nothing else.
    """
    folder = self.folder / card.id
    folder.mkdir(exist_ok=True)
    taken = [VERSION.fullmatch(path.name) for path in folder.iterdir()]
    number = 1 + max((int(match[1]) for match in taken if match), default=0)
    state, kept = f"state-{number}", f"frames-{number}"
    with contextlib.ExitStack() as undo:
      undo.callback(self._take_back, folder, state, kept)
      with replacing(folder / state) as part:
        save(part)
      with replacing(folder / kept) as part:
        part.write_bytes(join(frames))
      card.saved_at = int(time.time())
      tree = {"card": json.loads(card.to_json()), "state": state, "frames": kept}
      with replacing(folder / MANIFEST) as part:
        part.write_text(json.dumps(tree))
      undo.pop_all()
    with self._lock:
      self._cards[card.id] = Card.from_tree(tree["card"])
    for other in list(folder.iterdir()):
      if other.name not in (state, kept, MANIFEST):
        discard(other)

  def _take_back(self, folder: Path, *names: str) -> None:
    """Removes what a save has written that did not end well."""
    first = not (folder / MANIFEST).exists()
    for path in [folder] if first else [folder / name for name in names]:
      discard(path)

  def _file(self, session: str, kind: str) -> Path:
    try:
      tree = json.loads((self.folder / session / MANIFEST).read_text())
      return self.folder / session / tree[kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise Damaged(DAMAGED) from error

  def state(self, session: str) -> Path:
    """Where the model's state is.

    Raises:
      Damaged: nobody can tell.
    """
    return self._file(session, "state")

  def frames(self, session: str) -> list[bytes]:
    """Binary messages that had not been played.

    Raises:
      Damaged: the file is.
    """
    path = self._file(session, "frames")
    try:
      return split(path.read_bytes())
    except (OSError, ValueError) as error:
      cause = ValueError(f"'{path}' is damaged: {describe(error)}")
      raise Damaged(DAMAGED) from cause

  def remove(self, session: str) -> None:
    """Removes a session if it is there.

    Raises:
      OSError: its files cannot be removed; it is still among the `cards`.
    """
    folder = self.folder / session
    (folder / MANIFEST).unlink(missing_ok=True)  # first: to the next server it does not exist
    remove(folder)
    with self._lock:
      self._cards.pop(session, None)

  def surplus(self, used: Sequence[str]) -> list[str]:
    """Sessions beyond `most`, the oldest first; none of those in use."""
    cards = sorted(self.cards.values(), key=lambda card: card.saved_at)
    over = len(cards) - self.most
    return [card.id for card in cards if card.id not in used][: max(0, over)]
