"""The configuration file behind `--config=FILE.json`: one that was saved beside what it made."""

from longlive_jax.config.load import read_saved
from longlive_jax.config.schema import Experiment


def get_config(path: str) -> Experiment:
  """The configuration in the JSON file at `path`; see `read_saved`."""
  return read_saved(path)
