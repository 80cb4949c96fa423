"""The networks that can be converted: their tables, their sizes, and how a file becomes leaves."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from longlive_jax.config import Experiment
from longlive_jax.config.load import from_json, to_json
from longlive_jax.convert.dialects import DIALECTS
from longlive_jax.convert.diffusers_config import (
  DIT_FIXED,
  TEXT_FIXED,
  VAE_FIXED,
  model_from_json,
  text_from_json,
  vae_from_json,
)
from longlive_jax.convert.keys_dit import dit_rows
from longlive_jax.convert.keys_lora import HALVES, lora_rows, lora_shapes, rank_of
from longlive_jax.convert.keys_text import TWINS, text_rows
from longlive_jax.convert.keys_vae import vae_rows
from longlive_jax.convert.leaves import PARTS, Leaves
from longlive_jax.convert.packed import blocks_of, is_packed, rule_of, take_packed
from longlive_jax.convert.sources import Source
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import Row, imported, our_shape
from longlive_jax.io.checkpoint import read_json
from longlive_jax.io.leaves import flat
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.text import declare_text
from longlive_jax.model.vae import declare_vae
from longlive_jax.types import PyTree

NETWORKS = ("dit", "vae", "text", "lora")
CONSTANTS = ("latent_mean", "latent_std")  # of the VAE: in no state dict
DECODER = ("decoder/", "from_latent/")
FOLDERS = {"dit": "transformer", "vae": "vae", "text": "text_encoder"}  # of a Diffusers pipeline
KINDS = {
  "dit": DIT_FIXED["_class_name"],
  "vae": VAE_FIXED["_class_name"],
  "text": TEXT_FIXED["model_type"],
}


@dataclasses.dataclass(frozen=True)
class Form:
  """One way in which a network may be stored elsewhere.

  Attributes:
    network: one of `NETWORKS`.
    dialect: whose names.
    rows: the table.
    abstract: our tree of shapes.
  """

  network: str
  dialect: str
  rows: list[Row]
  abstract: PyTree

  def shape(self, row: Row) -> tuple[int, ...]:
    """Our shape of a row's tensor, one layer of it."""
    return our_shape(row, self.abstract)


def layer_of(name: str) -> str:
  """Name of a tensor without its last part, if that is a weight in any form."""
  return name.partition(".quantized_weight_")[0].removesuffix(".weight")


def rows_of(experiment: Experiment, network: str, dialect: str) -> list[Row]:
  """The table of a network."""
  model = experiment.model
  if network == "dit":
    return dit_rows(model, dialect)
  if network == "vae":
    return vae_rows(model.vae, dialect)
  if network == "text":
    return text_rows(model.text, dialect)
  return lora_rows(model, dialect, experiment.distill.layers)


def form_of(experiment: Experiment, network: str, dialect: str = "original", rank: int = 0) -> Form:
  """The form of a network by its configuration; adapters have a rank."""
  model = experiment.model
  if network == "dit":
    shapes = declare_dit(model).abstract
  elif network == "vae":
    shapes = declare_vae(model.vae).abstract
  else:
    is_text = network == "text"
    layers = experiment.distill.layers
    shapes = declare_text(model.text).abstract if is_text else lora_shapes(model, rank, layers)
  return Form(network, dialect, rows_of(experiment, network, dialect), shapes)


def hits(rows: Iterable[Row], tensors: Iterable[str]) -> int:
  """How many of the names a table knows."""
  known = {layer_of(row.key) for row in rows}
  return sum(layer_of(name) in known for name in tensors)


def best_form(
  experiment: Experiment, networks: Iterable[str], tensors: Mapping[str, Stored]
) -> Form | None:
  """Of these networks in any dialect, the form that knows the most names; None if none does."""
  tables = {(n, d): rows_of(experiment, n, d) for n in networks for d in DIALECTS}
  found = {choice: hits(rows, tensors) for choice, rows in tables.items()}
  network, dialect = max(found, key=lambda choice: found[choice])
  if not found[network, dialect]:
    return None
  return form_of(experiment, network, dialect, rank_of(tensors) if network == "lora" else 0)


def without_twins(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
  """Tensors without second names of the same tensor."""
  kept = dict(tensors)
  for twin, name in TWINS.items():
    if twin in kept:
      kept.setdefault(name, kept.pop(twin))
      kept.pop(twin, None)
  return kept


def network_leaves(
  experiment: Experiment,
  network: str,
  source: Source,
  *,
  rule: str = "",
  side: str = "",
) -> tuple[Leaves, str]:
  """Leaves of a network from a foreign file; no tensor is read.

  Args:
    experiment: gives the sizes.
    network: one of `NETWORKS`.
    source: of the file.
    rule: scale rule of packed weights, where the file does not say it.
    side: "encoder" or "decoder" takes this half of a VAE alone: Light VAE files may hold no more.

  Returns:
    (leaves, the scale rule if they are packed, else "").

  Raises:
    ValueError: tensors are missing, left over, misshapen, or packed by an unknown rule.
  """
  tensors = without_twins(source.tensors)
  try:
    form = best_form(experiment, [network], tensors) or form_of(experiment, network)
    rows = form.rows
    if side:
      rows = [row for row in rows if row.place.startswith(DECODER) == (side == "decoder")]
      others = {row.key for row in form.rows} - {row.key for row in rows}
      tensors = {key: stored for key, stored in tensors.items() if key not in others}
    packed, chosen = {}, ""
    if is_packed(tensors):
      chosen = rule_of(source.notes, rule)
      packed, rows, tensors = take_packed(
        rows, tensors, form.shape, chosen, blocks_of(source.notes)
      )
    leaves = imported(rows, tensors, form.abstract)
  except ValueError as error:
    likely = likely_form(experiment, tensors) if network != "lora" else None
    if likely and likely.network != network:
      other = likely.network
      raise ValueError(f"'{source.path}' is no {network}; it looks like a {other}") from error
    raise ValueError(f"'{source.path}' as {network}: {error}") from error
  return in_order(packed | leaves, form.abstract), chosen


def likely_form(experiment: Experiment, tensors: Mapping[str, Stored]) -> Form | None:
  """The form of the network whose names these are most; None where none has any of them."""
  is_lora = any(f".{half}." in name for name in tensors for half in HALVES.values())
  names = [name for name in NETWORKS if (name == "lora") == is_lora]
  return best_form(experiment, names, tensors)


def in_order(leaves: Mapping[str, Stored], abstract: PyTree) -> Leaves:
  """Leaves so that all layers of a stack follow each other: a reader can place it and go on."""
  order = {name: number for number, name in enumerate(flat(abstract))}

  def position(name: str) -> tuple[int, int]:
    layer = re.match(r"layers/(\d+)/", name)
    path = re.sub(r"^layers/\d+/", "layers/", name)
    return order[re.sub(f"/({'|'.join(PARTS)})$", "", path)], int(layer[1]) if layer else 0

  return {name: leaves[name] for name in sorted(leaves, key=position)}


def pipeline_sources(folder: Path) -> dict[str, Path]:
  """The folders of the networks in a Diffusers pipeline folder.

  Raises:
    FileNotFoundError: there is none of them.
  """
  found = {name: folder / inside for name, inside in FOLDERS.items() if (folder / inside).is_dir()}
  if not found:
    raise FileNotFoundError(f"'{folder}' has no {', '.join(FOLDERS.values())} folder")
  return found


def file_beside(network: str, source: Source) -> Path | None:
  """The configuration of Diffusers or transformers beside a network, if there is one.

  It is config.json in their folder, or a file of the name of the weights with the suffix .json.
  """
  own = source.path.with_suffix(".json")
  file = own if own.is_file() else folder_of(source.path) / "config.json"
  if not file.is_file():
    return None
  found = read_json(file.parent, file.name)
  return file if KINDS[network] in (found.get("_class_name"), found.get("model_type")) else None


def config_beside(network: str, source: Source) -> dict[str, Any]:
  """What `file_beside` says; {} where there is none."""
  file = file_beside(network, source)
  return read_json(file.parent, file.name) if file else {}


def folder_of(path: Path) -> Path:
  """A folder, or the one that a file is in."""
  return path if path.is_dir() else path.parent


def sized(experiment: Experiment, sources: Mapping[str, Source]) -> Experiment:
  """An experiment with the sizes that files beside the weights give.

  Raises:
    ValueError: our networks cannot be like that.
  """
  made = from_json(to_json(experiment))
  for name in KINDS.keys() & sources.keys():
    if file := file_beside(name, sources[name]):
      logging.info("sizes of %s: '%s'", name, file)
  if "dit" in sources and (data := config_beside("dit", sources["dit"])):
    made.model = model_from_json(data, made.model)
  if "vae" in sources and (data := config_beside("vae", sources["vae"])):
    made.model.vae = vae_from_json(data, made.model.vae)
  if "text" in sources and (data := config_beside("text", sources["text"])):
    made.model.text = text_from_json(data, made.model.text)
  return made
