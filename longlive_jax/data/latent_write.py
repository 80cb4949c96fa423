"""Writes latents computed ahead: which samples, and the folder that `latent_files` reads.

    index = read_index(experiment.data.path)
    form = LatentFormat.of(experiment, vae)
    writer = LatentWriter(out, form, source_of(index, experiment, takes))
    for name, plan in planned_items(index, experiment, takes):
      if not writer.has(name):
        frames = read_frames(plan, 0, len(plan.frames), height, width, experiment.data.fit)
        writer.add(name, encode(frames), plan.prompts, plan.shots, plan.valid_latents)
    writer.finish()

Items are complete files or none, and `index.json` comes last: a writer that was stopped leaves a
folder that another one of the same settings goes on with, and that no reader takes for a whole one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from longlive_jax.checks import check_at_least, check_shape
from longlive_jax.config.schema import Experiment
from longlive_jax.data.latent_files import (
  INDEX,
  SUFFIX,
  UNFINISHED,
  VERSION,
  LatentFormat,
  read_json,
)
from longlive_jax.data.video_index import VideoIndex
from longlive_jax.data.video_plan import Plan, Rules, plan_from, starts
from longlive_jax.io.atomic import replacing


def planned_items(
  index: VideoIndex, experiment: Experiment, takes: int
) -> Iterator[tuple[str, Plan]]:
  """What is to be encoded: of every sample folder up to `takes` different starts.

  Folders that are too short are left out, with a logged line. The order, the names and the starts
  depend on nothing but the arguments, so that several processes can share the work
  (`itertools.islice(items, process, None, processes)`) and a stopped one can go on.

  Args:
    index: from `video_index.read_index`.
    experiment: `data` says how samples are cut; `data.seed` decides the starts.
    takes: samples of a folder, >= 1; a folder that has fewer starts gives fewer.

  Yields:
    (name of the item, plan), to be read whole with `video_read.read_frames`.
  """
  check_at_least("takes", takes, 1)
  rules = Rules.of(experiment)
  for number, folder in enumerate(index.folders):
    try:
      choices = starts(folder, rules)
    except ValueError as error:
      logging.warning("skipped %s", error)
      continue
    order = np.random.default_rng((experiment.data.seed, number)).permutation(len(choices))
    for take, chosen in enumerate(order[:takes].tolist()):
      yield f"{number:05d}-{take:03d}", plan_from(folder, rules, choices[chosen])


def source_of(index: VideoIndex, experiment: Experiment, takes: int) -> str:
  """Tells apart what `planned_items` was asked for; a folder is only gone on with for the same."""
  settings = (Rules.of(experiment), experiment.data.seed, experiment.data.fit, takes)
  return hashlib.sha256(f"{index.fingerprint} {settings}".encode()).hexdigest()[:16]


class LatentWriter:
  """Writes a folder of latents; several processes may write items into one.

  `finish` makes it readable, called once, when all items are there.
  """

  def __init__(self, path: str | Path, form: LatentFormat, source: str = ""):
    """Begins a folder, or goes on with one.

    Args:
      path: the folder; new, empty, or left by a writer of the same arguments.
      form: what the latents are latents of.
      source: what the items are made from, see `source_of`.

    Raises:
      ValueError: the folder holds something else.
    """
    self.path, self.form, self.source = Path(path), form, source
    head = {"version": VERSION, **dataclasses.asdict(form), "source": source}
    for name in (INDEX, UNFINISHED):
      if (self.path / name).is_file():
        found = read_json(self.path / name)
        found.pop("items", None)
        if found != head:
          differ = [key for key in head if found.get(key) != head[key]]
          raise ValueError(
            f"'{path}' holds latents of other settings ({', '.join(differ)} differ):"
            " give another folder, or remove it"
          )
        return
    if self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
      raise ValueError(f"'{path}' holds other things than latents: give another folder")
    self.path.mkdir(parents=True, exist_ok=True)
    write_json(self.path / UNFINISHED, head)

  def has(self, name: str) -> bool:
    """Whether an item is already written."""
    return (self.path / f"{name}{SUFFIX}").is_file()

  def add(
    self,
    name: str,
    latents: np.ndarray,
    prompts: Sequence[str],
    shots: np.ndarray,
    valid_latents: int,
  ) -> None:
    """Writes one item; all of it or nothing.

    Args:
      name: of the item, without a suffix.
      latents: [F, h, w, C], any float dtype; stored as bfloat16.
      prompts: one a block.
      shots: [blocks] int.
      valid_latents: what is not padding.

    Raises:
      ValueError: an array does not fit the format, or holds numbers that are not finite.
    """
    form = self.form
    blocks = len(prompts)
    check_shape(f"item {name}", latents.shape, (blocks * form.block_latents, *form.shape))
    check_shape(f"shots of item {name}", np.shape(shots), (blocks,))
    stored = np.ascontiguousarray(latents).astype(ml_dtypes.bfloat16)
    if not np.isfinite(stored.astype(np.float32)).all():
      raise ValueError(f"item {name} holds latents that are not finite")
    item = {
      "blocks": blocks,
      "prompts": list(prompts),
      "shots": [int(shot) for shot in shots],
      "valid_latents": valid_latents,
    }
    with replacing(self.path / f"{name}{SUFFIX}") as partial:
      text = json.dumps(item, ensure_ascii=False)
      # not save_file, whose files are their owner's alone
      partial.write_bytes(safetensors.numpy.save({"latents": stored}, metadata={"item": text}))

  def finish(self, expected: int | None = None) -> int:
    """Lists all items in `index.json`.

    Args:
      expected: how many there must be; None accepts any number but 0.

    Returns:
      Their number.

    Raises:
      ValueError: items are missing.
    """
    files = sorted(f for f in self.path.glob(f"*{SUFFIX}") if not f.name.startswith("."))
    if not files:
      raise ValueError(f"'{self.path}' has no latents: nothing was written")
    if expected is not None and len(files) != expected:
      raise ValueError(f"'{self.path}' has {len(files)} items, not {expected}")
    items = []
    for file in files:
      with safetensors.safe_open(file, "np") as opened:
        items.append({"file": file.name, **json.loads(opened.metadata()["item"])})
    head = {"version": VERSION, **dataclasses.asdict(self.form), "source": self.source}
    write_json(self.path / INDEX, {**head, "items": items})
    (self.path / UNFINISHED).unlink(missing_ok=True)
    return len(items)


def write_json(path: Path, tree: dict[str, Any]) -> None:
  """Writes a JSON object, all of it or nothing."""
  with replacing(path) as partial:
    partial.write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
