"""Safetensors files and folders, read tensor by tensor and written in shards.

A large model is several files and an index that says which tensor is in which. The library checks
headers and bounds, and maps the files.
"""

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longlive_jax.convert.stored import Stored
from longlive_jax.io.atomic import replacing

INDEX = ".safetensors.index.json"
STEM = "diffusion_pytorch_model"  # of the files of a transformer
SHARD_BYTES = 2 * 10**9
INDEX_BYTES = 2**26  # larger ones are not read
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}


def read_safetensors(path: str | Path) -> dict[str, Stored]:
  """The tensors of one file, of an index, or of a folder that holds either.

  Args:
    path: `x.safetensors`, `x.safetensors.index.json`, or a folder with one of them.

  Returns:
    Name -> tensor, in the order of the files.

  Raises:
    FileNotFoundError: there is no such file, or a file of the index is missing.
    ValueError: a file is damaged, has a dtype that is not read, or contradicts its index.
  """
  path = find_file(Path(path))
  if path.name.endswith(INDEX):
    return read_index(path)
  return read_one(path)


def find_file(path: Path) -> Path:
  """The index or the one file of a folder; a file is itself."""
  if not path.is_dir():
    if not path.exists():
      raise FileNotFoundError(f"'{path}' does not exist")
    if not path.is_file():
      raise ValueError(f"'{path}' is no regular file")
    return path
  for pattern in (f"*{INDEX}", "*.safetensors"):
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    usual = [file for file in found if file.name.startswith(STEM)]
    if len(found) > 1 and len(usual) != 1:
      names = ", ".join(file.name for file in found[:3])
      raise ValueError(f"'{path}' holds {len(found)} candidates, such as {names}; name one of them")
    if found:
      return (usual or found)[0]
  raise FileNotFoundError(f"the folder '{path}' holds no .safetensors file")


def read_one(path: Path) -> dict[str, Stored]:
  """The tensors of one file."""
  try:
    with safe_open(path, "numpy") as opened:
      slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
      kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
  except (SafetensorError, OSError) as error:
    raise ValueError(f"'{path}' is not a whole safetensors file: {error}") from error
  for name, (dtype, _) in kinds.items():
    if dtype not in DTYPES:
      raise ValueError(f"'{path}': '{name}' has dtype {dtype}, which is not read")

  def reader(name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
      with safe_open(path, "numpy") as opened:
        return opened.get_tensor(name)

    return read

  return {name: Stored(shape, DTYPES[d], reader(name)) for name, (d, shape) in kinds.items()}


def read_index(path: Path) -> dict[str, Stored]:
  """The tensors of all files of an index."""
  places, tensors = places_of(path), {}
  for file in files_of_index(path):
    if not (path.parent / file).is_file():
      raise FileNotFoundError(f"'{path.parent / file}' does not exist, but '{path.name}' names it")
    inside = read_one(path.parent / file)
    for name in inside:
      if places.get(name) != file:
        raise ValueError(f"'{path}' does not say that '{name}' is in {file}, where it is")
    tensors |= inside
  missing = next((name for name in places if name not in tensors), None)
  if missing is not None:
    raise ValueError(f"'{path}' says that '{missing}' is in {places[missing]}, where it is not")
  return {name: tensors[name] for name in places}


def places_of(path: Path) -> dict[str, str]:
  """Name of a tensor -> name of its file, by an index."""
  if path.stat().st_size > INDEX_BYTES:
    raise ValueError(f"'{path}' is larger than {INDEX_BYTES} bytes: not an index")
  try:
    return dict(json.loads(path.read_text())["weight_map"])
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"'{path}' is damaged: it has no weight_map of names and files") from error


def files_of_index(path: Path) -> list[str]:
  """Names of the files of an index; they are beside it."""
  files = set(map(str, places_of(path).values()))
  odd = next((file for file in files if Path(file).name != file), None)
  if odd is not None:
    raise ValueError(f"'{path}' names {odd!r}, which is no file beside it")
  return sorted(files)


def write_safetensors(
  folder: Path, stem: str, tensors: Mapping[str, Stored], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
  """Writes `STEM.safetensors`, or shards of it with an index, holding one shard in memory.

  Args:
    folder: exists.
    stem: of the file names.
    tensors: name -> tensor.
    shard_bytes: a file is closed before it becomes larger than this.

  Returns:
    The files.
  """
  groups: list[list[str]] = [[]]
  size = 0
  for name, stored in tensors.items():
    if groups[-1] and size + stored.nbytes > shard_bytes:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += stored.nbytes
  count = len(groups)
  files, places = [], {}
  for number, group in enumerate(groups, start=1):
    name = f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"
    arrays = {key: np.asarray(tensors[key].read(), order="C") for key in group}
    with replacing(folder / name) as partial:
      partial.touch()  # the library would keep the file from others than its owner
      mode = partial.stat().st_mode
      try:
        save_file(arrays, partial, metadata={"format": "pt"})
      except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(folder / name)) from error
      partial.chmod(mode)
    files.append(folder / name)
    places |= dict.fromkeys(group, name)
  if count > 1:
    total = sum(stored.nbytes for stored in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    with replacing(folder / f"{stem}{INDEX}") as partial:
      partial.write_text(json.dumps(index, indent=2) + "\n")
    files.append(folder / f"{stem}{INDEX}")
  return files
