"""Wan2.2-TI2V-5B turned into LongLive 2.0, for sampling: 704x1280, four steps a block.

Variants, joined by commas, each changing what those before it say:
  ""            distilled, 4 steps, bfloat16
  "base"        before distillation: 50 steps with guidance
  "2steps"      two steps
  "fp8"         linear layers, cache and self-attention in FP8, the fastest on Hopper
  "nvfp4"       linear layers and cache in NVFP4
  "low_memory"  NVFP4, the text encoder in host memory, and frames decoded bit by bit
"""

from configs.common import apply_variants
from longlive_jax.config.schema import Experiment


def get_config(variant: str = "") -> Experiment:
  """The 5B model for sampling with its variants applied."""
  config = Experiment(name="wan5b")
  config.model.vae.dtype = "bfloat16"
  config.model.text.dtype = "bfloat16"  # as the original
  return apply_variants(config, "configs/wan5b_sample.py", variant, VARIANTS)


def base(config: Experiment) -> None:
  """The transformer before distillation."""
  config.sample.steps, config.sample.guidance = 50, 3.0


def two_steps(config: Experiment) -> None:
  """Two steps, for weights distilled to two."""
  config.sample.steps = 2


def fp8(config: Experiment) -> None:
  """FP8 wherever there is a fast unit for it; two latents at a time are decoded fastest."""
  config.quant.linears = config.quant.cache = config.model.attention = "fp8"
  config.sample.decode_latents = 2


def nvfp4(config: Experiment) -> None:
  """Weights and cache of 4.5 bits an element."""
  config.quant.linears = config.quant.cache = "nvfp4"
  config.sample.decode_latents = 2


def low_memory(config: Experiment) -> None:
  """Least memory on one device."""
  nvfp4(config)
  config.model.text.parked = True
  config.sample.decode_latents, config.sample.decode_tiles = 1, 11


VARIANTS = {
  "2steps": two_steps,
  "base": base,
  "fp8": fp8,
  "low_memory": low_memory,
  "nvfp4": nvfp4,
}
