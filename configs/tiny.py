"""The embedded default: the shapes world at 96x160, faster than 24 frames a second on two cores.

Variants, joined by commas, each changing what those before it say:
  ""          text to video in four steps
  "teacher"   the weights without adapters, in 16 steps
  "nvfp4"     linear layers and cache in NVFP4
  "vae"       train the autoencoder
  "ar"        train the transformer, in bfloat16
  "dmd"       distil it into four steps
  "2steps"    two steps, in sampling and in distillation
  "i2v"       the first latent is given in all training samples
  "nvfp4_training"  ... with linear layers in NVFP4
"""

from configs.common import apply_variants, nvfp4_training
from longlive_jax.config.schema import (
  Data,
  Distill,
  Experiment,
  Io,
  Model,
  Recycling,
  Sample,
  Text,
  Train,
  Vae,
  Video,
)


def get_config(variant: str = "") -> Experiment:
  """The tiny preset with its variants applied."""
  config = Experiment(
    name="tiny",
    model=Model(
      width=192,
      ffn_width=768,
      heads=4,
      layers=8,
      frequency_width=128,
      block_latents=8,
      shift=3.0,
      dtype="float32",
      text=Text(
        vocabulary=260,
        width=128,
        attention_width=128,
        ffn_width=256,
        heads=8,
        layers=2,
        length=112,
        tokenizer="bytes",
        frozen_seed=0,
      ),
      vae=Vae(
        latent_channels=16,
        encoder_width=16,
        decoder_width=12,
        residual_blocks=1,
        convolution="conv2d",
      ),
    ),
    video=Video(height=96, width=160, fps=24),
    sample=Sample(steps=4, cut_prefix="Cut. ", relative_rope=True),
    data=Data(clips=8192),
    io=Io(checkpoint="tiny", compile_cache=".jax_cache"),
  )
  return apply_variants(config, "configs/tiny.py", variant, VARIANTS)


def first_latent(config: Experiment) -> None:
  """Image to video alone: the first latent is given in all samples, and carries no loss."""
  config.train.first_latent_share = 1.0


def train_vae(config: Experiment) -> None:
  """Stage "vae", from fresh weights."""
  config.io.checkpoint = ""
  config.train = Train(
    stage="vae",
    steps=6500,
    batch=32,
    lr=2e-3,
    final_lr_fraction=0.02,
    warmup_steps=200,
    beta1=0.9,
    beta2=0.99,
    clip_norm=1.0,
    ema=0.998,
    kl_weight=3e-4,
    motion_weight=10.0,
  )


def train_ar(config: Experiment) -> None:
  """Stage "ar"; `io.checkpoint` must name the result of stage "vae".

  Most samples are text to video; a share of them is given its first latent.
  """
  teacher(config)
  config.model.dtype = "bfloat16"
  config.data.clips, config.data.clip_blocks, config.data.max_shots = 4096, 16, 8
  config.data.far_share, config.data.change_share = 0.6, 0.3
  config.train = Train(
    stage="ar",
    steps=11000,
    batch=128,
    lr=1.5e-3,
    final_lr_fraction=0.02,
    warmup_steps=300,
    beta1=0.9,
    beta2=0.99,
    weight_decay=0.01,
    clip_norm=1.0,
    ema=0.999,
    loss_weighting="uniform",
    prompt_dropout_share=0.1,
    first_latent_share=0.15,
    remat="dots",
    recycling=Recycling(enabled=True),
  )


def distil(config: Experiment) -> None:
  """Stage "dmd", from the transformer of `io.checkpoint`."""
  config.model.dtype = "bfloat16"
  config.data.clips, config.data.max_shots, config.data.change_share = 4096, 4, 0.3
  config.train = Train(
    stage="dmd",
    steps=1400,
    batch=96,
    lr=2e-4,
    final_lr_fraction=0.1,
    warmup_steps=50,
    ema=0.98,
  )
  config.distill = Distill(
    rank=32, alpha=32.0, critic_lr=2e-4, student_every=4, guidance=0.0, clean_history=True
  )


def two_steps(config: Experiment) -> None:
  """Two steps instead of four, in sampling with the adapters that ship for it."""
  config.sample.steps = 2
  if config.train.stage == "dmd":  # there is more to learn
    config.train.lr = config.distill.critic_lr = 4e-4
  else:
    config.io.adapters = "tiny_2steps"


def teacher(config: Experiment) -> None:
  """The transformer before distillation."""
  config.sample.steps, config.io.adapters = 16, ""


def nvfp4(config: Experiment) -> None:
  """Linear layers and cache in NVFP4, for sampling."""
  config.model.dtype = "bfloat16"
  config.quant.linears = config.quant.cache = "nvfp4"


VARIANTS = {
  "2steps": two_steps,
  "ar": train_ar,
  "dmd": distil,
  "i2v": first_latent,
  "nvfp4": nvfp4,
  "nvfp4_training": nvfp4_training,
  "teacher": teacher,
  "vae": train_vae,
}
