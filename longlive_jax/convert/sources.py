"""What a foreign file holds: opened, taken out of its containers, its keys without wrappers.

    model_bf16.pt        {"generator": {"model.blocks.0...": tensor}, "checkpoint_format": ...}
    Wan2.2_VAE.pth       {"encoder.conv1.weight": tensor}
    lora.pt              {"generator_lora": {"base_model.model.blocks.0...lora_A.weight": tensor}}

Source: spec/models.md sections 5.11, 6.4 to 6.6, spec/nvfp4.md section 8.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlive_jax.convert.safetensors_file import INDEX, files_of_index, find_file, read_safetensors
from longlive_jax.convert.stored import Stored
from longlive_jax.convert.torch_zip import read_torch

ENTRIES = (
  "generator",
  "model",
  "state_dict",
  "gen_model",
  "generator_lora",
  "critic",
  "fake_score",
)
EMA = "generator_ema"
INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("base_model.model.", "model.")
DROPPED = ("dynamic_feature_projection_heads.",)  # of Light VAE files: not part of the network
ADAPTER = (".lora_A.default.", ".lora_B.default.")
REFUSED_FORMATS = {
  "longlive_generator_te_nvfp4": "the state of Transformer Engine modules is not read; take the"
  " bfloat16 file that it was made of"
}


@dataclasses.dataclass(frozen=True)
class Source:
  """The tensors of one network in a foreign file.

  Attributes:
    path: what was named.
    files: all files that belong to it.
    entry: the container that was chosen, "" where there is none.
    tensors: name -> tensor, names without prefixes and wrappers.
    notes: plain values that stand beside the containers, such as `checkpoint_format`.
    entries: all containers of the file.
    dropped: names of tensors that are no part of any network.
  """

  path: Path
  files: tuple[Path, ...]
  entry: str
  tensors: Mapping[str, Stored]
  notes: Mapping[str, Any]
  entries: tuple[str, ...] = ()
  dropped: tuple[str, ...] = ()


def open_source(path: str | Path, entry: str = "") -> Source:
  """Opens a safetensors file, index or folder, or a file of `torch.save`; reads no tensor yet.

  Args:
    path: of the file or folder.
    entry: the container to take, such as "generator_ema"; "" takes the first that is there of
      `ENTRIES`, or the tensors themselves where they are in none.

  Returns:
    What it holds.

  Raises:
    FileNotFoundError: there is nothing at this path.
    ValueError: it is damaged or unsafe, or holds no such entry.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"'{path}' does not exist")
  if not (path.is_dir() or path.is_file()):
    raise ValueError(f"'{path}' is neither a regular file nor a folder")
  if path.is_dir() or path.suffix == ".safetensors" or path.name.endswith(INDEX):
    tensors: Any = read_safetensors(path)
    files = safetensors_files(path)
  else:
    tensors, files = read_torch(path), (path,)
  return unwrapped(path, files, tensors, entry)


def safetensors_files(path: Path) -> tuple[Path, ...]:
  """The index and its shards, or the one file."""
  path = find_file(path)
  if not path.name.endswith(INDEX):
    return (path,)
  return (path, *(path.parent / name for name in files_of_index(path)))


def unwrapped(path: Path, files: tuple[Path, ...], top: Any, entry: str) -> Source:
  """Chooses the container and cleans the names."""
  if not isinstance(top, Mapping):
    raise ValueError(f"'{path}' holds a {type(top).__name__}; it must be a dictionary of tensors")
  entries = tuple(name for name, value in top.items() if isinstance(value, Mapping))
  notes = {str(k): v for k, v in top.items() if is_plain(v)}
  refuse_formats(path, notes)
  if entry and entry not in entries:
    there = ", ".join(entries) or "none"
    raise ValueError(f"'{path}' has no entry '{entry}'; there are: {there}")
  chosen = entry or next((n for n in ENTRIES if n in entries and holds_tensors(top[n])), "")
  inside = top[chosen] if chosen else top
  for name in (chosen, *ENTRIES):  # a container in a container
    if chosen and isinstance(inside.get(name), Mapping) and holds_tensors(inside[name]):
      inside = inside[name]
      break
  tensors = {str(k): v for k, v in inside.items() if isinstance(v, Stored)}
  if not tensors:
    advice = f"; choose one of its entries: {', '.join(entries)}" if entries else ""
    raise ValueError(f"'{path}' holds no tensors{' in ' + repr(chosen) if chosen else ''}{advice}")
  cleaned, dropped = clean(path, tensors)
  return Source(path, files, chosen, cleaned, notes, entries, dropped)


def is_plain(value: Any) -> bool:
  """Whether a value has no tensors in it."""
  if isinstance(value, Mapping):
    return all(map(is_plain, value.values()))
  if isinstance(value, list | tuple):
    return all(map(is_plain, value))
  return not isinstance(value, Stored)


def holds_tensors(value: Any) -> bool:
  """Whether a container has tensors in it, at any depth of two."""
  if not isinstance(value, Mapping):
    return isinstance(value, Stored)
  below = value.values()
  return any(isinstance(v, Stored) for v in below) or any(
    isinstance(v, Mapping) and any(isinstance(w, Stored) for w in v.values()) for v in below
  )


def refuse_formats(path: Path, notes: Mapping[str, Any]) -> None:
  """Refuses formats that are known by their tag and cannot be read."""
  tag = notes.get("checkpoint_format")
  if isinstance(tag, str) and tag in REFUSED_FORMATS:
    raise ValueError(f"'{path}' has checkpoint_format '{tag}': {REFUSED_FORMATS[tag]}")


def clean(path: Path, tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], tuple[str, ...]]:
  """Names without what wrappers of modules put into them, and the names that were dropped."""
  cleaned: dict[str, Stored] = {}
  dropped = []
  for name, stored in tensors.items():
    bare = name
    for part in INSIDE:
      bare = bare.replace(part, "")
    for adapter in ADAPTER:
      bare = bare.replace(adapter, adapter.replace(".default", ""))
    for prefix in PREFIXES:
      bare = bare.removeprefix(prefix)
    if bare.startswith(DROPPED):
      dropped.append(name)
      continue
    if bare in cleaned:
      raise ValueError(f"'{path}' has two tensors that mean '{bare}'; one of them is '{name}'")
    cleaned[bare] = stored
  return cleaned, tuple(dropped)
