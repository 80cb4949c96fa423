"""The video files of a data set: which samples there are, and how long and large their clips are.

    PATH/video/<sample>/<clip>.mp4       also .avi .mov .mkv .webm
    PATH/caption/<sample>/<clip>.json    {"caption": "..."}

A folder is a sample and a file in it a shot. Only the ends of a file are looked at, and what was
found is kept in `PATH/video_index.json`, so that a later start looks at changed files alone. What
cannot be used is skipped with one logged line.
Source: training.md §10.1.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from absl import logging

from longlive_jax.data.video_probe import probe
from longlive_jax.io.atomic import replacing

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
CACHE = "video_index.json"
VERSION = 1
THREADS = 8  # that look at files
REASONS_SHOWN = 3

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video file.

  Attributes:
    file: its path below the root of the data set.
    caption: what is shown; not empty.
    frames: how many, see `video_probe`.
    fps: frames a second, exact.
    height: pixels, of the upright picture.
    width: pixels.
    start: time stamp of the first frame; None where the file has none to be trusted, and frames
      are counted from the beginning.
  """

  file: str
  caption: str
  frames: int
  fps: Fraction
  height: int
  width: int
  start: int | None


@dataclasses.dataclass(frozen=True)
class Folder:
  """One sample: its clips in order, at least one.

  Attributes:
    root: the folder of the data set.
    name: of the sample.
    clips: sorted by number, those whose name is no number last.
  """

  root: str
  name: str
  clips: tuple[Clip, ...]


@dataclasses.dataclass(frozen=True)
class VideoIndex:
  """All samples that have a usable clip, sorted by name."""

  folders: tuple[Folder, ...]

  @property
  def fingerprint(self) -> str:
    """Changes when a clip, a caption or an order does; the same wherever the files lie."""
    every = [(f.name, [dataclasses.astuple(clip) for clip in f.clips]) for f in self.folders]
    return hashlib.sha256(repr(every).encode()).hexdigest()[:16]


def read_index(path: str | Path) -> VideoIndex:
  """Finds all clips and captions of a data set.

  Args:
    path: `data.path`, the folder of `video` and `caption`.

  Returns:
    The usable samples.

  Raises:
    FileNotFoundError: the folder, or `video` in it, does not exist.
    ValueError: no sample can be used; gives the first reasons.

  Source: training.md §10.1.
  """
  root = Path(path)
  samples = list_files(root)
  stamps = {name: stamp for files in samples.values() for name, stamp in files.items()}
  old = load_cache(root)
  fresh = [name for name, stamp in stamps.items() if old.get(name, {}).get("stamp") != stamp]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    found = dict(zip(fresh, pool.map(lambda name: describe(root, name), fresh), strict=True))
  entries = {
    name: {"stamp": stamp, **found[name]} if name in found else old[name]
    for name, stamp in stamps.items()
  }
  if entries != old:
    save_cache(root, entries)
  index = gather(root, samples, entries)
  clips = [clip for folder in index.folders for clip in folder.clips]
  hours = float(sum(clip.frames / clip.fps for clip in clips)) / 3600
  logging.info(
    "data.path=%s: %d samples, %d clips, %.2f hours; %d files were new or changed",
    *(root, len(index.folders), len(clips), hours, len(fresh)),
  )
  return index


def list_files(root: Path) -> dict[str, dict[str, list[int]]]:
  """The video files of every sample, in order: path below the root -> what tells of a change."""
  if not root.is_dir():
    raise FileNotFoundError(f"data.path='{root}' is not a folder")
  if not (root / "video").is_dir():
    raise FileNotFoundError(
      f"data.path='{root}' has no folder 'video'; it must hold video/<sample>/<clip>.mp4 and"
      " caption/<sample>/<clip>.json"
    )
  samples: dict[str, dict[str, list[int]]] = {}
  for sample in sorted(visible(root / "video"), key=lambda entry: entry.name):
    if not sample.is_dir():
      continue
    files = [e for e in visible(sample.path) if Path(e.name).suffix.lower() in SUFFIXES]
    samples[sample.name] = {
      f"video/{sample.name}/{entry.name}": stamp_of(entry, root, sample.name)
      for entry in sorted(files, key=lambda entry: clip_order(entry.name))
      if not entry.is_dir()
    }
  return samples


def visible(folder: str | Path) -> Iterator[os.DirEntry[str]]:
  """Yields what a folder holds, hidden things left out."""
  with os.scandir(folder) as entries:
    yield from (entry for entry in entries if not entry.name.startswith("."))


def clip_order(name: str) -> tuple[bool, int, str]:
  """Sorts by number; names that are no number come last."""
  stem = Path(name).stem
  number = stem.isascii() and stem.isdigit()
  return not number, int(stem) if number else 0, name


def caption_file(name: str) -> str:
  """The caption of a video file, both below the root."""
  return Path("caption", *Path(name).parts[1:]).with_suffix(".json").as_posix()


def stamp_of(entry: os.DirEntry[str], root: Path, sample: str) -> list[int]:
  """Size and time of change of a video file and of its caption, -1 where there is none."""
  try:
    video = entry.stat()
  except OSError:  # a link to nowhere
    return [-1, -1, -1, -1]
  try:
    caption = (root / caption_file(f"video/{sample}/{entry.name}")).stat()
  except OSError:
    return [video.st_size, video.st_mtime_ns, -1, -1]
  return [video.st_size, video.st_mtime_ns, caption.st_size, caption.st_mtime_ns]


def load_cache(root: Path) -> dict[str, Entry]:
  """What an earlier start has found; empty if there was none, or another version of it."""
  try:
    tree = json.loads((root / CACHE).read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    logging.warning("%s cannot be read and is made again: %s", root / CACHE, error)
    return {}
  same = isinstance(tree, dict) and tree.get("version") == VERSION
  return tree.get("clips", {}) if same else {}


def save_cache(root: Path, entries: dict[str, Entry]) -> None:
  """Keeps what was found, if the folder can be written."""
  try:
    with replacing(root / CACHE) as partial:
      text = json.dumps({"version": VERSION, "clips": entries}, ensure_ascii=False, indent=0)
      partial.write_text(text + "\n", encoding="utf-8")
  except OSError as error:
    logging.warning("every start looks at all files again: %s cannot be written", error.filename)


def describe(root: Path, name: str) -> Entry:
  """What is known of a clip, or why it cannot be used."""
  try:
    return {"caption": read_caption(root / caption_file(name)), **probe(root / name)}
  except ValueError as error:
    return {"error": str(error)}


def read_caption(path: Path) -> str:
  """The caption in a JSON file.

  Raises:
    ValueError: there is none.
  """
  where = f"caption/{path.parent.name}/{path.name}"
  try:
    tree = json.loads(path.read_text(encoding="utf-8-sig"))
  except FileNotFoundError as error:
    raise ValueError(f"its caption {where} does not exist") from error
  except OSError as error:
    raise ValueError(f"its caption {where} cannot be read: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"its caption {where} is not JSON: {error}".split("\n")[0]) from error
  caption = tree.get("caption") if isinstance(tree, dict) else None
  if not isinstance(caption, str):
    raise ValueError(f'its caption {where} is not of the form {{"caption": "..."}}')
  if not caption.strip():
    raise ValueError(f"its caption {where} is empty")
  try:
    caption.encode()
  except UnicodeEncodeError as error:
    wrong = caption[error.start].encode("unicode_escape").decode()
    raise ValueError(f"its caption {where} holds {wrong}, which is no character") from error
  return caption.strip()


def gather(root: Path, samples: dict[str, dict[str, list[int]]], entries: dict) -> VideoIndex:
  """Puts the clips of every sample together and logs what is left out."""
  folders, reasons = [], []
  for sample, files in samples.items():
    lines = [f"{n}: {entries[n]['error']}" for n in files if "error" in entries[n]]
    clips = tuple(to_clip(name, entries[name]) for name in files if "error" not in entries[name])
    if clips:
      folders.append(Folder(str(root), sample, clips))
    else:
      lines.append(f"video/{sample}: the sample has no usable clip")
    for line in lines:
      logging.warning("skipped %s", line)
    reasons += lines
  if not folders:
    shown = "; ".join(reasons[:REASONS_SHOWN]) or "the folder 'video' holds no folders"
    more = f"; and {len(reasons) - REASONS_SHOWN} more" if len(reasons) > REASONS_SHOWN else ""
    raise ValueError(f"data.path='{root}' has no usable sample: {shown}{more}")
  return VideoIndex(tuple(folders))


def to_clip(name: str, entry: Entry) -> Clip:
  """An entry of the cache as a clip."""
  values = {key: value for key, value in entry.items() if key != "stamp"}
  return Clip(file=name, **(values | {"fps": Fraction(*values["fps"])}))
