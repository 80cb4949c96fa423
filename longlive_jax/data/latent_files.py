"""Latents computed ahead: a folder that stands in for the videos it was made from.

    PATH/index.json              what they are latents of, and the list of items
    PATH/00012-003.safetensors   "latents" [F, h, w, C] bfloat16, what is shown in the file's header

Videos are then decoded and encoded once and not in every epoch. `latent_write` makes such folders.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from absl import logging

from longlive_jax.config.schema import Experiment
from longlive_jax.io.leaves import flat
from longlive_jax.types import PyTree

INDEX, UNFINISHED = "index.json", "unfinished.json"
SUFFIX = ".safetensors"
VERSION = 1
MISSING_SHOWN = 3
SETTINGS = {  # of a format, for its errors
  "block_latents": "model.block_latents",
  "latent_height": "video.height / 16",
  "latent_width": "video.width / 16",
  "latent_channels": "model.vae.latent_channels",
  "height": "video.height",
  "width": "video.width",
  "fps": "video.fps",
  "cut_prefix": "sample.cut_prefix",
  "vae": "by io.checkpoint, the autoencoder",
}


@dataclasses.dataclass(frozen=True)
class LatentFormat:
  """What latents are latents of; all of it must fit the model that is trained on them.

  Attributes:
    block_latents: latents of a block.
    latent_height, latent_width, latent_channels: h, w, C.
    height, width, fps: of the videos.
    cut_prefix: that prompts of new shots begin with.
    vae: tells autoencoders apart; any text, see `autoencoder_name`.
  """

  block_latents: int
  latent_height: int
  latent_width: int
  latent_channels: int
  height: int
  width: int
  fps: int
  cut_prefix: str
  vae: str

  @classmethod
  def of(cls, experiment: Experiment, vae: str) -> "LatentFormat":
    """The format of an experiment's latents."""
    video, model = experiment.video, experiment.model
    return cls(
      block_latents=model.block_latents,
      latent_height=experiment.latent_height,
      latent_width=experiment.latent_width,
      latent_channels=model.vae.latent_channels,
      height=video.height,
      width=video.width,
      fps=video.fps,
      cut_prefix=experiment.sample.cut_prefix,
      vae=vae,
    )

  @property
  def shape(self) -> tuple[int, int, int]:
    """h, w, C of a latent."""
    return self.latent_height, self.latent_width, self.latent_channels

  def differences(self, other: "LatentFormat") -> list[str]:
    """One text for every value that differs: "video.fps is 24 here and 30 there"."""
    mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
    return [
      f"{name} is {theirs[key]!r} here and {mine[key]!r} there"
      for key, name in SETTINGS.items()
      if mine[key] != theirs[key]
    ]


def autoencoder_name(params: PyTree) -> str:
  """A hash of the weights of an autoencoder.

  They are rounded to bfloat16 first: an export in half precision is the same autoencoder.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(flat(params).items()):
    values = np.asarray(leaf).astype(ml_dtypes.bfloat16)
    digest.update(f"{name} {values.shape} ".encode())
    digest.update(values.tobytes())
  return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class LatentItem:
  """One sample.

  Attributes:
    latents: [F, h, w, C] bfloat16.
    prompts: one a block.
    shots: [blocks] int32, the shot of every block, counted from 0.
    valid_latents: what is not padding.
  """

  latents: np.ndarray
  prompts: tuple[str, ...]
  shots: np.ndarray
  valid_latents: int


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object in a file of this folder.

  Raises:
    ValueError: it is none.
  """
  try:
    tree = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"'{path}' is not JSON: {error}") from error
  if not isinstance(tree, dict):
    raise ValueError(f"'{path}' is not a JSON object")
  return tree


class LatentFiles:
  """A folder of latents, read item by item.

  Items that are longer than `data.blocks` give their first blocks. Shorter ones are padded with
  `data.pad`, and left out with a logged line without it.
  """

  def __init__(self, experiment: Experiment, vae: str | None = None):
    """Opens `data.path`.

    Args:
      experiment: `data`, and the sizes that the latents must have.
      vae: the autoencoder they must come from; None accepts any.

    Raises:
      FileNotFoundError: there is no such folder of latents, or files of it are missing.
      ValueError: it is unfinished, belongs to another model, or has no item that is long enough.
    """
    data = experiment.data
    self.path, self.blocks = Path(data.path), data.blocks
    tree = load_index(self.path)
    try:
      fields = (field.name for field in dataclasses.fields(LatentFormat))
      self.form = LatentFormat(**{name: tree[name] for name in fields})
      items = [check_item(item) for item in tree["items"]]
    except KeyError as error:
      raise ValueError(f"'{self.path / INDEX}' has no {error}: it is not of latents") from error
    wanted = LatentFormat.of(experiment, self.form.vae if vae is None else vae)
    if differ := self.form.differences(wanted):
      raise ValueError(
        f"data.path='{data.path}' holds latents of another model: {differ[0]}"
        + "".join(f", {line}" for line in differ[1:])
      )
    least = data.min_blocks if data.pad else data.blocks
    self.items = [item for item in items if self.blocks_of(item) >= least]
    for item in items:
      if self.blocks_of(item) < least:
        logging.warning(
          "skipped %s: it has %d blocks; data.blocks=%d are needed, or data.pad=true and at least"
          " data.min_blocks=%d",
          *(item["file"], self.blocks_of(item), data.blocks, data.min_blocks),
        )
    if not self.items:
      raise ValueError(nothing_long_enough(experiment, max(map(self.blocks_of, items), default=0)))
    check_present(self.path, [item["file"] for item in self.items])
    logging.info("data.path=%s: %d items of latents", data.path, len(self.items))

  def __len__(self) -> int:
    """How many items can be read."""
    return len(self.items)

  @property
  def fingerprint(self) -> str:
    """Changes when an item does."""
    text = json.dumps([dataclasses.asdict(self.form), self.items], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def blocks_of(self, item: dict[str, Any]) -> int:
    """Blocks of an item that are not padding."""
    return item["valid_latents"] // self.form.block_latents

  def __getitem__(self, number: int) -> LatentItem:
    """Reads `data.blocks` blocks of an item.

    Raises:
      ValueError: the file cannot be read, is not what the index says, or holds numbers that are
        not finite.
    """
    item = self.items[number]
    path = self.path / item["file"]
    blocks, n = min(self.blocks, item["blocks"]), self.form.block_latents
    try:
      with safetensors.safe_open(path, "np") as opened:
        stored = opened.get_slice("latents")
        shape = tuple(stored.get_shape())
        if shape != (item["blocks"] * n, *self.form.shape):
          raise ValueError(f"latents '{path}' have shape {shape}, which is not that of the index")
        latents = stored[: blocks * n]
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(f"latents '{path}' cannot be read: {error}") from error
    if not np.isfinite(latents.astype(np.float32)).all():
      raise ValueError(
        f"latents '{path}' are not finite: remove the file, and run launch.encode again"
      )
    missing = self.blocks - blocks
    prompts, shots = item["prompts"][:blocks], item["shots"][:blocks]
    return LatentItem(
      latents=np.concatenate([latents, np.repeat(latents[-1:], missing * n, 0)]),
      prompts=(*prompts, *[prompts[-1]] * missing),
      shots=np.asarray(shots + [shots[-1]] * missing, np.int32),
      valid_latents=min(item["valid_latents"], self.blocks * n),
    )


def nothing_long_enough(experiment: Experiment, longest: int) -> str:
  """What is wrong with a folder whose longest item has so many blocks, and what to do."""
  data = experiment.data
  if not longest:
    return (
      f"data.path='{data.path}' has no items in its {INDEX}, or none that fills a block: make its"
      " latents with launch.encode, in another folder"
    )
  if data.pad:
    return (
      f"data.path='{data.path}' has no item of data.min_blocks={data.min_blocks}; the longest has"
      f" {longest}: use data.min_blocks={longest}"
    )
  return (
    f"data.path='{data.path}' has no item of data.blocks={data.blocks}; the longest has {longest}:"
    f" use data.blocks={longest}, or data.pad=true"
  )


def check_present(path: Path, files: list[str]) -> None:
  """Lists the folder once, and raises FileNotFoundError if it lacks some of these files."""
  there = set(os.listdir(path))
  missing = [file for file in files if file not in there and not (path / file).is_file()]
  if missing:
    more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
    raise FileNotFoundError(
      f"data.path='{path}' lacks {len(missing)} of the {len(files)} files that its {INDEX} lists:"
      f" {', '.join(missing[:MISSING_SHOWN])}{more}. Copy them again, or run launch.encode again"
      " with the same settings: it makes what is missing"
    )


def load_index(path: Path) -> dict[str, Any]:
  """The index of a finished folder of latents."""
  if not (path / INDEX).is_file():
    if (path / UNFINISHED).is_file():
      raise ValueError(
        f"data.path='{path}' is not finished: run launch.encode again with the same settings,"
        " it goes on where it was stopped"
      )
    raise FileNotFoundError(f"data.path='{path}' is not a folder of latents: it has no {INDEX}")
  tree = read_json(path / INDEX)
  if tree.get("version") != VERSION:
    raise ValueError(f"'{path / INDEX}' is of version {tree.get('version')}, not {VERSION}")
  return tree


def check_item(item: dict[str, Any]) -> dict[str, Any]:
  """An entry of the index with all its fields."""
  names = ("file", "blocks", "prompts", "shots", "valid_latents")
  checked = {name: item[name] for name in names}
  if not len(checked["prompts"]) == len(checked["shots"]) == checked["blocks"] > 0:
    raise ValueError(
      f"{checked['file']} has {checked['blocks']} blocks, and other prompts or shots"
    )
  return checked
