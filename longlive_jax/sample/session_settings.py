"""Which settings must be the same for a saved session to go on."""

from pathlib import Path

from absl import logging

from longlive_jax.config import Experiment
from longlive_jax.config.walk import differences

# Settings of these sections decide what a session holds or how its video goes on ...
SECTIONS = ("model", "video", "quant", "sample")
# ... but for these, which are of training, of speed, of a place, or of what begins a session.
FREE = (
  "model.attention",
  "model.text.parked",
  "model.text.tokenizer",
  "model.vae.convolution",
  "video.fps",
  "quant.gradients",
  "quant.gradient_rounding",
  "quant.kernels",
  "sample.unroll_layers",
  "sample.decode_latents",
  "sample.decode_tiles",
  "sample.seed",
)
NAMED = 3  # differing settings that an error names


def check_settings(folder: str | Path, there: Experiment, here: Experiment) -> None:
  """Compares settings; other weights are logged, as a folder of weights may have moved.

  Args:
    folder: of the saved session.
    there: what it was made with.
    here: what it is to go on with.

  Raises:
    ValueError: settings differ that matter; names them.
  """
  found = [
    f"{name}={theirs!r} there, {ours!r} here"
    for name, theirs, ours in differences(there, here)
    if name.partition(".")[0] in SECTIONS and name not in FREE
  ]
  if found:
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise ValueError(
      f"saved session '{folder}' is of another experiment: {'; '.join(found[:NAMED])}{more}"
    )
  if there.io.checkpoint != here.io.checkpoint:
    logging.warning(
      "session '%s' was made with io.checkpoint=%r and goes on with %r",
      *(folder, there.io.checkpoint, here.io.checkpoint),
    )
