"""Few-step students of Wan2.2-TI2V-5B made autoregressive, as adapters (DMD), stage 2.

`io.checkpoint` is what is distilled: the autoregressive model (direct mode), or Wan itself; the
adapters are then merged into the autoregressive model afterwards (standalone mode), with
`launch.convert merge`. Variants, joined by commas: "" (text to video, 4 steps), "2steps", "i2v"
(the first latent is given), "nvfp4_training".
"""

from configs.common import apply_variants, nvfp4_training
from longlive_jax.config.schema import Distill, Experiment, Train


def get_config(variant: str = "") -> Experiment:
  """The 5B model for distillation."""
  config = Experiment(name="wan5b")
  config.model.vae.dtype = config.model.text.dtype = "bfloat16"
  config.data.source, config.data.path = "scripts", "data/scripts"
  config.sample.steps, config.sample.guidance = 4, 1.0
  config.train = Train(
    stage="dmd",
    steps=5000,
    batch=8,
    lr=1e-5,
    warmup_steps=0,
    remat="attention",
    ema=0.99,
    ema_start_step=200,
  )
  config.distill = Distill(rank=128, alpha=128.0, critic_lr=2e-6, guidance=3.0)
  config.io.checkpoint_every_steps = 250
  return apply_variants(config, "configs/wan5b_distill.py", variant, VARIANTS)


def two_steps(config: Experiment) -> None:
  """Two denoising steps."""
  config.sample.steps = 2


def first_latent(config: Experiment) -> None:
  """Image to video: captions and first frames of video files."""
  config.data.source, config.data.path = "videos", "data/videos"
  config.train.first_latent_share = 1.0


VARIANTS = {"2steps": two_steps, "i2v": first_latent, "nvfp4_training": nvfp4_training}
