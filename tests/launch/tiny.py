"""The smallest networks that the programs run with, and what a program leaves behind."""

from collections.abc import Callable
from typing import NamedTuple

OVERRIDES: dict[str, object] = {
  "model.width": 24,
  "model.ffn_width": 32,
  "model.heads": 2,
  "model.layers": 2,
  "model.frequency_width": 8,
  "model.block_latents": 2,
  "model.text.width": 16,
  "model.text.attention_width": 16,
  "model.text.ffn_width": 16,
  "model.text.heads": 2,
  "model.text.layers": 1,
  "model.vae.encoder_width": 4,
  "model.vae.decoder_width": 4,
  "model.vae.multipliers": (1, 1, 1, 1),
  "model.vae.latent_channels": 4,
  "video.height": 32,
  "video.width": 32,
  "sample.steps": 2,
  "sample.window_latents": 6,
  "sample.sink_latents": 2,
  "data.clips": 4,
  "data.clip_blocks": 4,
  "data.blocks": 3,
  "data.vae_latents": 2,
  "train.batch": 2,
  "train.warmup_steps": 1,
  "io.compile_cache": "",
  "io.log_every_steps": 1,
}
SIZES = tuple(f"--config.{name}={value}" for name, value in OVERRIDES.items())
TINY = ("--config=configs/tiny.py", *SIZES)


class Outcome(NamedTuple):
  """How a program ended, and what it said."""

  code: int
  stdout: str
  stderr: str


Program = Callable[..., Outcome]
