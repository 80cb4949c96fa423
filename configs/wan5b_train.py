"""Wan2.2-TI2V-5B made autoregressive: teacher forcing on 96 latents (12 blocks), stage 1.

Variants, joined by commas: "" (text to video), "i2v" (the first latent is given), "nvfp4_training"
(linear layers in NVFP4).
"""

from configs.common import apply_variants, nvfp4_training
from longlive_jax.config.schema import Experiment


def get_config(variant: str = "") -> Experiment:
  """The 5B model for training."""
  config = Experiment(name="wan5b")
  config.model.vae.dtype = "bfloat16"
  config.model.text.dtype = "bfloat16"
  config.data.source, config.data.path = "videos", "data/videos"
  config.data.blocks = config.data.clip_blocks = 12
  config.sample.steps = 50
  config.sample.guidance = 3.0
  config.sample.sink_latents = 0
  train = config.train
  train.stage = "ar"
  train.steps = 600
  train.batch = 8
  train.lr = 1e-5
  train.warmup_steps = 0
  train.beta1, train.beta2 = 0.0, 0.999
  train.weight_decay = 0.0
  train.remat = "attention"
  train.ema, train.ema_start_step = 0.99, 100
  config.io.checkpoint_every_steps = 15
  config.io.keep_checkpoints = 20
  return apply_variants(config, "configs/wan5b_train.py", variant, VARIANTS)


def first_latent(config: Experiment) -> None:
  """Image to video alone."""
  config.train.first_latent_share = 1.0


VARIANTS = {"i2v": first_latent, "nvfp4_training": nvfp4_training}
