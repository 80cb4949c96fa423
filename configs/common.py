"""What several presets share."""

from collections.abc import Callable, Mapping

from longlive_jax.checks import check_choice
from longlive_jax.config.schema import Experiment


def apply_variants(
  config: Experiment,
  preset: str,
  variant: str,
  variants: Mapping[str, Callable[[Experiment], None]],
) -> Experiment:
  """The configuration, changed by each of the variants that are named.

  Args:
    config: is changed.
    preset: file, for errors.
    variant: names, joined by commas; each changes what those before it say.
    variants: all there are.

  Raises:
    ValueError: there is no such variant.
  """
  for name in filter(None, variant.split(",")):
    check_choice(f"variant of {preset}", name, tuple(variants))
    variants[name](config)
  return config


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
