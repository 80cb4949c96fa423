"""From a configuration file, flags or JSON to a checked, sealed experiment.

    --config=configs/tiny.py:i2v --config.train.lr=1e-4

A file defines `get_config(variant="") -> Experiment`. What a run used is written beside what it
made with `to_json`; that file is a configuration like any other: `--config=outputs/x/config.json`.
"""

import copy
import dataclasses
import importlib.util
import json
import typing
from collections.abc import Mapping
from pathlib import Path

from longlive_jax.checks import suggest
from longlive_jax.config.flags import (
  check_no_variant,
  config_file,
  define_config_flag,
  run_main,
)
from longlive_jax.config.rules import check, check_type
from longlive_jax.config.schema import Experiment, Section
from longlive_jax.config.walk import check_setting_name, field_types, is_section

__all__ = [
  "check",
  "define_config_flag",
  "from_flags",
  "from_json",
  "load_config",
  "read_saved",
  "run_main",
  "to_json",
  "without_files",
]

BESIDE_WEIGHTS = "metadata.json"  # only a folder of weights has it


def from_flags(config: Experiment) -> Experiment:
  """The checked, sealed copy of what flags or a file gave.

  Args:
    config: an experiment that may still be changed; it is left as it is.

  Returns:
    An equal experiment that is read-only and hashable.

  Raises:
    ValueError: a setting is wrong; see `rules.check`.
  """
  check_experiment(config)
  sealed = copy.deepcopy(config)
  check(sealed)
  sealed.seal()
  return sealed


def load_config(source: str | Path, overrides: Mapping[str, object] | None = None) -> Experiment:
  """Reads a configuration outside of a command line.

  Args:
    source: `path.py`, `path.py:variant`, or the `.json` written beside an artefact.
    overrides: dotted name -> value, such as `{"train.lr": 1e-4}`.

  Returns:
    A checked, sealed experiment.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: unknown variant or setting, or a value that does not work.
  """
  path, _, variant = str(source).partition(":")
  file = config_file(path)
  if file.suffix == ".json":
    check_no_variant(path, variant)
    config = read_saved(file)
  else:
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
      raise ValueError(f"configuration '{path}' cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    check_experiment(config)
    config = from_json(to_json(config))  # a copy that may be changed, whatever the file kept
  for dotted, value in (overrides or {}).items():
    override(config, dotted, value)
  return from_flags(config)


def read_saved(path: str | Path) -> Experiment:
  """Reads a configuration that was saved beside an artefact.

  That of a checkpoint means this checkpoint: `io.checkpoint` is its folder.

  Returns:
    An experiment, not yet checked or sealed.

  Raises:
    ValueError: as for `from_json`; names the file.
  """
  path = Path(path)
  try:
    config = from_json(path.read_text())
  except ValueError as error:
    raise ValueError(f"configuration '{path}': {error}") from error
  if (path.parent / BESIDE_WEIGHTS).is_file():
    config.io.checkpoint = str(path.parent)
  return config


def without_files(experiment: Experiment) -> Experiment:
  """The experiment, with prompts read as bytes where there are no weights to go by."""
  if experiment.io.checkpoint or experiment.model.text.tokenizer:
    return experiment
  text = dataclasses.replace(experiment.model.text, tokenizer="bytes")
  model = dataclasses.replace(experiment.model, text=text)
  changed = dataclasses.replace(experiment, model=model)
  check(changed)
  return changed


def check_experiment(config: object) -> None:
  """Raises ValueError unless a configuration file returned an experiment."""
  if not isinstance(config, Experiment):
    raise ValueError(f"get_config must return an Experiment, not {type(config).__name__}")


def override(config: Experiment, dotted: str, value: object) -> None:
  """Sets one setting by its dotted name."""
  check_setting_name(dotted)
  *above, last = dotted.split(".")
  section: Section = config
  for part in above:
    section = getattr(section, part)
  check_type(dotted, field_types(type(section))[last], value)
  setattr(section, last, value)


def to_json(experiment: Experiment) -> str:
  """All settings, indented; sections become objects and tuples lists."""
  return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str) -> Experiment:
  """Reads what `to_json` wrote.

  Settings that the text leaves out take their defaults.

  Returns:
    An experiment equal to the written one, not yet checked or sealed.

  Raises:
    ValueError: not JSON, an unknown setting, or a value of the wrong type.
  """
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"the configuration is not JSON: {error.msg} (line {error.lineno})") from error
  except RecursionError as error:
    raise ValueError("the configuration is nested too deep") from error
  experiment = fill(Experiment, tree, "")
  return typing.cast(Experiment, experiment)


def fill(kind: type[Section], tree: object, prefix: str) -> Section:
  """Builds a section from nested dicts."""
  if not isinstance(tree, dict):
    raise ValueError(f"configuration section '{prefix.rstrip('.')}' must be a JSON object")
  declared = field_types(kind)
  values: dict[str, object] = {}
  for name, value in tree.items():
    if name not in declared:
      raise ValueError(f"unknown setting '{prefix}{name}'{suggest(name, declared)}")
    wanted = declared[name]
    if is_section(wanted):
      values[name] = fill(wanted, value, f"{prefix}{name}.")
    else:
      values[name] = tuple(value) if isinstance(value, list) else value
      check_type(prefix + name, wanted, values[name])
  return kind(**values)
