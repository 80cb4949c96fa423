"""The embedded default: the shapes world at 96x160, faster than 24 frames a second on two cores.

Variants: "" (text to video) and "i2v" (the first latent is given).
"""

from longlive_jax.checks import check_choice
from longlive_jax.config.schema import Data, Experiment, Model, Sample, Text, Train, Vae, Video


def get_config(variant: str = "") -> Experiment:
  """The tiny preset; `variant` is "" or "i2v"."""
  check_choice("variant of configs/tiny.py", variant, ("", "i2v"))
  text = Text(
    vocabulary=260,
    width=128,
    attention_width=128,
    ffn_width=256,
    heads=8,
    layers=2,
    length=96,
    tokenizer="bytes",
    frozen_seed=0,
  )
  return Experiment(
    name="tiny",
    model=Model(
      width=256,
      ffn_width=1024,
      heads=4,
      layers=8,
      block_latents=8,
      shift=3.0,
      dtype="float32",
      text=text,
      vae=Vae(encoder_width=16, decoder_width=12, residual_blocks=1),
    ),
    video=Video(height=96, width=160, fps=24),
    sample=Sample(steps=16, guidance=1.0),
    data=Data(),
    train=Train(
      steps=20000,
      batch=16,
      lr=3e-4,
      warmup_steps=500,
      beta1=0.9,
      beta2=0.99,
      ema=0.999,
      clip_norm=1.0,
      first_latent=variant == "i2v",
    ),
  )
