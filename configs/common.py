"""What several presets share."""

from longlive_jax.config.schema import Experiment


def nvfp4_training(config: Experiment) -> None:
  """The recipes of the original: blocks of 16x16, so that both passes see the same weight.

  Stage "ar": all linear layers, weights by static_6, the rest by mse. Stage "dmd": student and
  teacher by mse, the critic not.
  """
  config.quant.linears, config.quant.weight_blocks = "nvfp4", "16x16"
  if config.train.stage == "dmd":
    config.distill.quantised = ("student", "teacher")
  else:
    config.quant.weights = "static_6"
