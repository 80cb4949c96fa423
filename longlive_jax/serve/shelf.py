"""Sessions on disk.

    STATE_DIR/sessions/ID/session.json   the card, and the names of the two files below
                          state-N        what the session wrote, a file or a folder
                          frames-N       encoded frames that the viewer had not played

A session is what `session.json` names, and that is replaced in one step after the files are
complete: a crash leaves the old session or the new one, and what no `session.json` names is removed
at the next start.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from longlive_jax.io.atomic import remove, replacing
from longlive_jax.serve.card import Card
from longlive_jax.serve.frames import join, split
from longlive_jax.serve.security import SESSION_ID

MANIFEST = "session.json"
VERSION = re.compile(r"(?:state|frames)-(\d+)")


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
    self.cards: dict[str, Card] = {card.id: card for card in found if card}

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
    except FileNotFoundError:
      remove(path)  # a first save that did not end
      return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
      logging.warning("the saved session '%s' is left out: %s", path, error)
      return None
    for other in list(path.iterdir()):
      if other.name not in names:
        remove(other)
    return card

  def write(self, card: Card, frames: Sequence[bytes], save: Callable[[Path], None]) -> None:
    """Saves a session.

    Args:
      card: its data; `saved_at` is set.
      frames: binary messages that have not been played.
      save: writes the model's state to a path.

    Raises:
      OSError: it cannot be written; what was saved before stays.
    """
    folder = self.folder / card.id
    folder.mkdir(exist_ok=True)
    taken = [VERSION.fullmatch(path.name) for path in folder.iterdir()]
    number = 1 + max((int(match[1]) for match in taken if match), default=0)
    state, kept = f"state-{number}", f"frames-{number}"
    with replacing(folder / state) as part:
      save(part)
    with replacing(folder / kept) as part:
      part.write_bytes(join(frames))
    card.saved_at = int(time.time())
    tree = {"card": json.loads(card.to_json()), "state": state, "frames": kept}
    with replacing(folder / MANIFEST) as part:
      part.write_text(json.dumps(tree))
    for other in list(folder.iterdir()):
      if other.name not in (state, kept, MANIFEST):
        remove(other)
    with self._lock:
      self.cards[card.id] = Card.from_tree(tree["card"])

  def _file(self, session: str, kind: str) -> Path:
    tree = json.loads((self.folder / session / MANIFEST).read_text())
    return self.folder / session / tree[kind]

  def state(self, session: str) -> Path:
    """Where the model's state is."""
    return self._file(session, "state")

  def frames(self, session: str) -> list[bytes]:
    """Binary messages that had not been played.

    Raises:
      ValueError, OSError: the file is damaged.
    """
    return split(self._file(session, "frames").read_bytes())

  def remove(self, session: str) -> None:
    """Removes a session if it is there."""
    with self._lock:
      self.cards.pop(session, None)
    folder = self.folder / session
    (folder / MANIFEST).unlink(missing_ok=True)  # first: from here on it does not exist
    remove(folder)

  def surplus(self, used: Sequence[str]) -> list[str]:
    """Sessions beyond `most`, the oldest first; none of those in use."""
    with self._lock:
      cards = sorted(self.cards.values(), key=lambda card: card.saved_at)
    over = len(cards) - self.most
    return [card.id for card in cards if card.id not in used][: max(0, over)]
