"""A checkpoint of ours becomes files that other programs load.

    safetensors   the original's keys: diffusion_pytorch_model in shards with an index, Wan2.2_VAE
    torch         the same as files of `torch.save`: model_bf16.pt with {"generator": ...}, ...
    4o6           the transformer packed in NVFP4: model_4o6.pt
    diffusers     a pipeline folder: transformer/, vae/, text_encoder/ with their config.json

Source: spec/models.md sections 6.4 to 6.6, spec/nvfp4.md section 8.1.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.checks import check_choice
from longlive_jax.config import Experiment
from longlive_jax.convert import diffusers_config
from longlive_jax.convert.checkpoints import Checkpoint
from longlive_jax.convert.leaves import PARTS, Leaves, cast
from longlive_jax.convert.networks import CONSTANTS, FOLDERS, Form, form_of, layer_of
from longlive_jax.convert.packed import FORMAT, packed_tensors
from longlive_jax.convert.safetensors_file import STEM, write_safetensors
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_import import exported
from longlive_jax.convert.torch_write import write_torch
from longlive_jax.convert.write import Progress, plan_of, stamp, unfinished
from longlive_jax.model.vae import WAN_MEAN, WAN_STD

FORMATS = ("safetensors", "torch", "4o6", "diffusers")
STEMS = {
  "dit": STEM,
  "vae": "Wan2.2_VAE",
  "text": "models_t5_umt5-xxl-enc-bf16",
  "lora": "lora",
}
Writer = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Export:
  """What is to be written: name of a file, or stem of shards -> what writes it into a folder.

  Attributes:
    writers: one for each.
    tensors: the same -> what it holds.
    source: the checkpoint.
  """

  writers: Mapping[str, Writer]
  tensors: Mapping[str, Mapping[str, Stored]]
  source: Checkpoint

  @property
  def nbytes(self) -> int:
    """Bytes of all tensors."""
    return sum(s.nbytes for tensors in self.tensors.values() for s in tensors.values())

  @property
  def contents(self) -> str:
    """The files in a few words."""
    return ", ".join(self.writers)

  def write(
    self, folder: str | Path, progress: Progress = lambda size: None, *, overwrite: bool = False
  ) -> None:
    """Writes the files; finished ones are kept over an interruption.

    Args:
      folder: where to; it must not exist or be empty.
      progress: called with the bytes of every file that is there.
      overwrite: not possible: a folder of files is never replaced.

    Raises:
      ValueError: the folder is not empty, or another process writes it.
      OSError: the place cannot be written.
    """
    folder = Path(folder)
    if overwrite or (folder.is_dir() and any(folder.iterdir())):
      raise ValueError(f"'{folder}' must not exist: exports replace nothing; choose another folder")
    digests = plan_of({n: dict(t) for n, t in self.tensors.items()})
    plan = {"export": digests, "files": [stamp(file) for file in self.source.files]}
    with unfinished(folder, plan) as partial:
      for name, writer in self.writers.items():
        done = partial / f".{name.replace('/', '.')}.done"
        if not done.exists():
          (partial / name).parent.mkdir(parents=True, exist_ok=True)
          writer(partial)
          done.touch()
        progress(sum(s.nbytes for s in self.tensors.get(name, {}).values()))
      for done in partial.glob(".*.done"):
        done.unlink()


def make_export(source: Checkpoint, form: str, dtype: str = "") -> Export:
  """Prepares an export; reads no weights.

  Args:
    source: a checkpoint of ours.
    form: one of `FORMATS`.
    dtype: convert to it, "" = as stored.

  Raises:
    ValueError: the form cannot hold these weights.
  """
  check_choice("--format", form, FORMATS)
  networks, metadata, packed = dict(source.networks), source.metadata, source.is_packed
  experiment = source.experiment
  if packed and form != "4o6":
    raise ValueError(f"'{source.folder}' holds NVFP4 weights, which only --format=4o6 can hold")
  if form == "4o6" and (not packed or "dit" not in networks):
    raise ValueError(f"'{source.folder}' holds no NVFP4 transformer; make one with `quantize`")
  if dtype:
    networks = {name: cast(leaves, dtype, vectors=True) for name, leaves in networks.items()}
  elif packed:  # the original's form of it
    networks["dit"] = cast(networks["dit"], "bfloat16", vectors=True)
  dialect = "diffusers" if form == "diffusers" else "original"
  tensors = {
    name: foreign_tensors(experiment, name, leaves, dialect) for name, leaves in networks.items()
  }
  if form == "diffusers":
    return diffusers_export(source, experiment, networks, tensors)
  beside = constants_beside(experiment, networks)
  if form == "safetensors":
    files = {STEMS[name]: found for name, found in tensors.items()}
    writers = {stem: shards("", stem, found) for stem, found in files.items()}
    return Export(writers | beside, files, source)
  named = {torch_name(name, metadata): found for name, found in tensors.items()}
  writers = {
    torch_name(name, metadata): pickled(
      torch_name(name, metadata), torch_tree(name, found, metadata, experiment)
    )
    for name, found in tensors.items()
  }
  return Export(writers | beside, named, source)


def constants_beside(experiment: Experiment, networks: Mapping[str, Leaves]) -> dict[str, Writer]:
  """The mean and deviation of latents beside a state dict that lacks them, unless all know them."""
  if "vae" not in networks:
    return {}
  mean, std = (networks["vae"][name].read() for name in CONSTANTS)
  if np.array_equal([mean, std], np.asarray([WAN_MEAN, WAN_STD], np.float32)):
    return {}
  config = diffusers_config.vae_json(experiment.model.vae, mean.tolist(), std.tolist())
  file = f"{STEMS['vae']}.json"
  return {file: text_file(file, config)}


def foreign_tensors(
  experiment: Experiment, network: str, leaves: Leaves, dialect: str
) -> dict[str, Stored]:
  """The tensors of a network by their foreign names."""
  rank = next((s.shape[-1] for n, s in leaves.items() if n.endswith("/a")), 0)
  form = form_of(experiment, network, dialect, rank if network == "lora" else 0)
  quant = experiment.quant
  packed = packed_tensors(leaves, form.rows, form.shape, quant.weights, quant.weight_blocks)
  rest = {n: s for n, s in leaves.items() if n not in CONSTANTS and not is_part(n, leaves)}
  rows = [row for row in form.rows if f"{row.place}/{PARTS[0]}" not in leaves]
  return in_rows(form, exported(rows, rest) | packed)


def is_part(name: str, leaves: Leaves) -> bool:
  """Whether a leaf is one of the three of a quantised kernel."""
  above, _, last = name.rpartition("/")
  return last in PARTS and f"{above}/{PARTS[0]}" in leaves


def in_rows(form: Form, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
  """Tensors in the order of the table."""
  order = {layer_of(row.key): number for number, row in enumerate(form.rows)}
  return {name: tensors[name] for name in sorted(tensors, key=lambda name: order[layer_of(name)])}


def shards(folder: str, stem: str, tensors: Mapping[str, Stored]) -> Writer:
  """Writes shards of safetensors."""
  return lambda partial: write_safetensors(partial / folder, stem, tensors)


def pickled(file: str, tree: Any) -> Writer:
  """Writes a file of `torch.save`."""
  return lambda partial: write_torch(partial / file, tree)


def text_file(file: str, values: Mapping[str, Any]) -> Writer:
  """Writes a JSON file."""
  return lambda partial: (partial / file).write_text(json.dumps(dict(values), indent=2) + "\n")


def torch_name(network: str, metadata: Mapping[str, Any]) -> str:
  """Name of the file of `torch.save`."""
  if network == "dit":
    return {"nvfp4": "model_4o6.pt", "bfloat16": "model_bf16.pt"}.get(
      str(metadata.get("dtype")), "model.pt"
    )
  return f"{STEMS[network]}.{'pt' if network == 'lora' else 'pth'}"


def torch_tree(
  network: str, tensors: Mapping[str, Stored], metadata: Mapping[str, Any], experiment: Experiment
) -> dict[str, Any]:
  """What the file of a network holds."""
  if network == "lora":
    inside = {f"base_model.model.{name}": stored for name, stored in tensors.items()}
    about: Any = metadata.get("lora", {})
    return {"generator_lora": inside, "rank": about.get("rank"), "alpha": about.get("alpha")}
  if network != "dit":
    return dict(tensors)
  generator = {f"model.{name}": stored for name, stored in tensors.items()}
  adapters: Any = metadata.get("adapters")
  tree: dict[str, Any] = {"generator": generator, "merged_lora": bool(adapters)}
  if isinstance(metadata.get("steps"), int):
    tree["step"] = metadata["steps"]
  if metadata.get("dtype") == "nvfp4":
    tree |= {
      "checkpoint_format": FORMAT,
      "checkpoint_version": 1,
      "source_generator_ckpt": None,
      "source_lora_ckpt": adapters[0].get("name") if adapters else None,
      "model_name": "Wan2.2-TI2V-5B",
      "quantization": quantisation_notes(tensors, experiment),
    }
  return tree


def quantisation_notes(tensors: Mapping[str, Stored], experiment: Experiment) -> dict[str, Any]:
  """How the weights were quantised, in the original's words."""
  layers = [layer_of(n) for n in tensors if n.endswith("quantized_weight_values")]
  quant = experiment.quant
  return {
    "format": "nvfp4",
    "backend": "fouroversix",
    "materialized": True,
    "dtype": "bfloat16",
    "scale_rule": quant.weights,
    "activation_scale_rule": quant.activations,
    "weight_scale_rule": quant.weights,
    "weight_blocks": quant.weight_blocks,  # only we read it: square blocks are rows, too
    "gradient_scale_rule": quant.gradients,
    "te_inference_only": False,
    "te_low_precision_weights": False,
    "te_fallback_to_fouroversix": False,
    "matched_filtered_modules": [],
    "materialized_modules": layers,
  }


def diffusers_export(
  source: Checkpoint,
  experiment: Experiment,
  networks: Mapping[str, Leaves],
  tensors: Mapping[str, Mapping[str, Stored]],
) -> Export:
  """The pipeline folder."""
  model = experiment.model
  writers: dict[str, Writer] = {}
  named: dict[str, Mapping[str, Stored]] = {}
  if "lora" in networks:
    raise ValueError("adapters alone have no Diffusers folder; use --format=torch or safetensors")
  for name, found in tensors.items():
    folder, stem = FOLDERS[name], "model" if name == "text" else STEMS["dit"]
    if name == "dit":
      config = diffusers_config.dit_json(model)
    elif name == "text":
      config = diffusers_config.text_json(model.text)
    else:
      mean, std = (networks["vae"][n].read().tolist() for n in CONSTANTS)
      config = diffusers_config.vae_json(model.vae, mean, std)
    writers[f"{folder}/config.json"] = text_file(f"{folder}/config.json", config)
    writers[f"{folder}/{stem}"] = shards(folder, stem, found)
    named[f"{folder}/{stem}"] = found
  if len(tensors) == len(FOLDERS):
    writers["model_index.json"] = text_file("model_index.json", diffusers_config.pipeline_json())
  return Export(writers, named, source)
