"""Wan2.2-TI2V-5B turned into LongLive 2.0, for sampling: 704x1280, four steps a block.

Variants: "" (distilled, 4 steps) and "base" (before distillation: 50 steps with guidance).
"""

from longlive_jax.checks import check_choice
from longlive_jax.config.schema import Experiment


def get_config(variant: str = "") -> Experiment:
  """The 5B model for sampling; `variant` is "" or "base"."""
  check_choice("variant of configs/wan5b_sample.py", variant, ("", "base"))
  config = Experiment(name="wan5b")
  config.model.vae.dtype = "bfloat16"
  config.model.text.dtype = "bfloat16"  # as the original
  if variant == "base":
    config.sample.steps = 50
    config.sample.guidance = 3.0
  return config
