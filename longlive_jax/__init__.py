"""LongLive-2.0 in JAX: long multi-shot video, block by block, from a KV cache.

The public API; each name is loaded from its module at first use, so that importing a part of the
package loads that part alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from longlive_jax.build import Pipeline
  from longlive_jax.config.load import load_config
  from longlive_jax.data.prompts import Script, Shot, load_script
  from longlive_jax.io.video import read_video, write_video
  from longlive_jax.sample.session import Session

__version__ = "0.1.0"

__all__ = [
  "Pipeline",
  "Script",
  "Session",
  "Shot",
  "__version__",
  "load_config",
  "load_script",
  "read_video",
  "write_video",
]

_HOMES = {
  "Pipeline": "build",
  "Script": "data.prompts",
  "Session": "sample.session",
  "Shot": "data.prompts",
  "load_config": "config.load",
  "load_script": "data.prompts",
  "read_video": "io.video",
  "write_video": "io.video",
}


def __getattr__(name: str) -> Any:
  """Finds a public name in its module."""
  if name not in _HOMES:
    raise AttributeError(f"module 'longlive_jax' has no attribute '{name}'")
  return getattr(importlib.import_module(f"longlive_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
  """The public names."""
  return __all__
