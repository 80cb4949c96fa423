"""Configuration: the schema, its checks, and reading it from files and flags."""

from longlive_jax.config.schema import (
  Data,
  Experiment,
  Io,
  Model,
  Parallel,
  Quant,
  Recycling,
  Sample,
  Section,
  Text,
  Train,
  Vae,
  Video,
)

__all__ = [
  "Data",
  "Experiment",
  "Io",
  "Model",
  "Parallel",
  "Quant",
  "Recycling",
  "Sample",
  "Section",
  "Text",
  "Train",
  "Vae",
  "Video",
]
