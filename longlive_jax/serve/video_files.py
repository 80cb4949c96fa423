"""Videos on disk.

    STATE_DIR/videos/ID/video.json   the record; appears first, is replaced in one step
                        image.png    the first frame, if one was given
                        video.mp4    appears when it is complete

A video is a function of its record: one that was not finished when the server ended is made again.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from longlive_jax.data.prompts import Script
from longlive_jax.io.atomic import discard, remove, replacing
from longlive_jax.serve.security import VIDEO_ID

RECORD = "video.json"
STATES = ("queued", "in_progress", "completed", "failed")


@dataclasses.dataclass
class Video:
  """A video of the REST interface.

  Attributes:
    id: "video_" and 32 hexadecimal digits.
    owner: of `security.Access`.
    script: JSON of what is made, its seed included.
    prompt: what is shown of the script: the first prompt.
    created_at: Unix time, whole seconds.
    blocks: length.
    seconds: length.
    size: "WIDTHxHEIGHT" in pixels.
    completed_at: the same; 0 until it is completed.
    status: one of `STATES`.
    done: blocks made.
    error: what went wrong.
  """

  id: str
  owner: str
  script: str
  prompt: str
  created_at: int
  blocks: int = 1
  seconds: float = 0.0
  size: str = ""
  completed_at: int = 0
  status: str = "queued"
  done: int = 0
  error: str = ""

  @property
  def finished(self) -> bool:
    """Whether nothing will change any more."""
    return self.status in ("completed", "failed")

  @property
  def progress(self) -> int:
    """Per cent; 100 only when the file is there."""
    if self.status == "completed":
      return 100
    return min(99, 100 * self.done // self.blocks)

  def seed(self) -> int:
    """Of the noise."""
    return Script.from_json(self.script).seed or 0

  @classmethod
  def from_json(cls, text: str) -> "Video":
    """Reads a record.

    Raises:
      ValueError: it is none.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict) or set(tree) != {f.name for f in dataclasses.fields(cls)}:
      raise ValueError("a record must be a JSON object with the fields of a video")
    video = cls(**tree)
    for field in dataclasses.fields(cls):
      if type(tree[field.name]) is not field.type:
        raise ValueError(f"{field.name}={tree[field.name]!r} has another type")
    if video.status not in STATES or video.blocks < 1:
      raise ValueError(f"status={video.status!r}, blocks={video.blocks} cannot be")
    Script.from_json(video.script)
    return video


class VideoFiles:
  """Records and files of videos.

  Args:
    folder: is made if it is missing.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    folder.mkdir(parents=True, exist_ok=True)

  def load(self) -> list[Video]:
    """All videos, oldest first; those that were not finished are queued again."""
    videos = []
    for path in sorted(self.folder.iterdir()):
      if VIDEO_ID.fullmatch(path.name) and (video := self._read(path)):
        videos.append(video)
    return sorted(videos, key=lambda video: video.created_at)

  def _read(self, path: Path) -> Video | None:
    try:
      video = Video.from_json((path / RECORD).read_text())
      if video.id != path.name:
        raise ValueError("it has another id")
      others = list(path.glob(".*"))
    except FileNotFoundError:
      discard(path)  # it had not been accepted yet, or is half removed
      return None
    except (OSError, ValueError, RecursionError) as error:
      logging.warning("the video '%s' is left out: %s", path, error)
      return None
    for other in others:
      discard(other)
    if video.status == "completed" and not self.content(video.id).is_file():
      video.status, video.error = "failed", "its file is gone"
    if not video.finished:
      video.status, video.done = "queued", 0
    return video

  def create(self, video: Video, image: np.ndarray | None) -> None:
    """Writes the record of a new video, and its first frame uint8 `[H, W, 3]`.

    Raises:
      OSError: that cannot be written; nothing of it stays.
    """
    folder = self.folder / video.id
    folder.mkdir()
    with contextlib.ExitStack() as undo:
      undo.callback(discard, folder)
      if image is not None:
        Image.fromarray(image).save(folder / "image.png")
      self.write(video)
      undo.pop_all()

  def write(self, video: Video) -> None:
    """Replaces the record."""
    with replacing(self.folder / video.id / RECORD) as part:
      part.write_text(json.dumps(dataclasses.asdict(video)))

  def content(self, video: str) -> Path:
    """Where the file of a video is, or will be."""
    return self.folder / video / "video.mp4"

  def image(self, video: str) -> np.ndarray | None:
    """The first frame, uint8 `[H, W, 3]`, if one was given."""
    path = self.folder / video / "image.png"
    if not path.is_file():
      return None
    with Image.open(path) as image:
      return np.asarray(image.convert("RGB"))

  def remove(self, video: str) -> None:
    """Removes all of a video.

    Raises:
      OSError: it cannot be removed.
    """
    folder = self.folder / video
    (folder / RECORD).unlink(missing_ok=True)  # first: from here on it does not exist
    remove(folder)
