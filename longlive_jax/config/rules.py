"""Checks of a configuration: of each setting alone, and of settings against each other.

Every line names the settings, the values found and values that work, so that a run which
cannot work is refused before any array exists.
"""

import re
import types
import typing

from longlive_jax.checks import check_at_least, check_choice, check_divides
from longlive_jax.config.rules_train import check_data, check_parallel, check_training
from longlive_jax.config.schema import Experiment, Model, Quant, Sample, Text, Vae
from longlive_jax.config.walk import settings

DTYPES = ("float32", "bfloat16")
CONVOLUTIONS = ("auto", "conv3d", "conv2d")
ATTENTIONS = ("auto", "cudnn", "jnp", "fp8")
SOLVERS = ("unipc", "dpmpp", "euler")
PRECISIONS = ("none", "nvfp4", "fp8")
CACHES = ("none", "nvfp4", "fp8")
SCALE_RULES = ("static_6", "static_4", "mse", "mae", "abs_max")
SMOOTHINGS = ("none", "tokens", "original")
KERNELS = ("auto", "on", "off")
UNROLLS = ("auto", "on", "off")
WEIGHT_BLOCKS = ("1x16", "16x16")
ROUNDINGS = ("stochastic", "nearest")
VAE_SPACE, VAE_TIME = 16, 4  # pixels a latent, frames a latent

LIMIT = 1e30  # of any number: its products with others stay in float32
# A whole number must be at least 1 and any other number at least 0, unless listed here.
MAY_BE_ZERO = (
  "data.max_shot_blocks",
  "distill.trained_blocks",
  "io.evaluate_every_steps",
  "parallel.halo_latents",
  "sample.decode_latents",
  "sample.sink_latents",
  "train.ema_start_step",
  "train.recycling.start_step",
  "train.warmup_steps",
)
MORE_THAN_ZERO = (
  "distill.alpha",
  "distill.critic_lr",
  "model.shift",
  "model.eps",
  "model.rope_theta",
  "sample.t_scale",
  "train.clip_norm",
  "train.lr",
)
BELOW_ONE = ("train.beta1", "train.beta2", "train.ema")
SHARES = ("_share", "_fraction")  # endings of names of numbers in [0, 1]


def check(experiment: Experiment) -> None:
  """Checks all settings.

  Raises:
    ValueError: one line naming the setting, the value found, and what would work.
  """
  for name, kind, value in settings(experiment):
    check_type(name, kind, value)
    check_range(name, value)
  check_model(experiment.model)
  check_text(experiment.model.text)
  check_vae(experiment.model.vae)
  unit = VAE_SPACE * experiment.model.patch
  check_divides("video.height", experiment.video.height, "16 * model.patch", unit)
  check_divides("video.width", experiment.video.width, "16 * model.patch", unit)
  check_quant(experiment.quant)
  check_quantised_cache(experiment)
  check_sample(experiment.sample, experiment.model.block_latents)
  check_tiles(experiment.sample.decode_tiles, experiment.video.height)
  check_training(experiment)
  check_data(experiment)
  check_parallel(experiment)


def check_type(name: str, kind: type, value: object) -> None:
  """Raises ValueError unless `value` is of the declared type; a whole number is a float too."""
  if not of_type(kind, value):
    wanted = (
      getattr(kind, "__name__", str(kind)) if not isinstance(kind, types.GenericAlias) else kind
    )
    raise ValueError(f"{name}={value!r} must be of type {wanted}, not {type(value).__name__}")


def of_type(kind: type, value: object) -> bool:
  """Whether `value` may stand in a field declared as `kind`."""
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if typing.get_origin(kind) is tuple:
    element = typing.get_args(kind)[0]
    return isinstance(value, tuple) and all(of_type(element, item) for item in value)
  return isinstance(value, kind)


def check_range(name: str, value: object) -> None:
  """Raises ValueError unless a number, or each number of a tuple, is in the range of its name."""
  for number in value if isinstance(value, tuple) else (value,):
    if isinstance(number, bool) or not isinstance(number, int | float):
      continue
    if not abs(number) < LIMIT:
      raise ValueError(f"{name}={number} must be a finite number, below {LIMIT:g}")
    if name.endswith("seed"):
      check_seed(name, number)
    elif name in BELOW_ONE or name.endswith(SHARES):
      closed = name not in BELOW_ONE
      if not (0 <= number < 1 or (closed and number == 1)):
        raise ValueError(
          f"{name}={number} must be at least 0 and {'at most' if closed else 'below'} 1"
        )
    elif name in MORE_THAN_ZERO:
      if not number > 0:
        raise ValueError(f"{name}={number} must be more than 0")
    else:
      whole = isinstance(number, int) and name not in MAY_BE_ZERO and name not in FLOATS
      check_at_least(name, number, 1 if whole else 0)


FLOATS = frozenset(name for name, kind, _ in settings(Experiment()) if kind is float)


def check_seed(name: str, seed: float) -> None:
  """A seed is an unsigned 32-bit number; -1 turns a frozen encoder off."""
  least = -1 if name.endswith("frozen_seed") else 0
  if not least <= seed < 2**32:
    raise ValueError(f"{name}={seed} must be at least {least} and below 2**32")


MOST_LAYERS, MOST_WIDTH = 1000, 10**6  # larger ones are typing errors, and slow to refuse later


def check_model(model: Model) -> None:
  """The transformer's own sizes."""
  for name, most in (("layers", MOST_LAYERS), ("width", MOST_WIDTH), ("ffn_width", MOST_WIDTH)):
    if getattr(model, name) > most:
      raise ValueError(f"model.{name}={getattr(model, name)} must be at most {most}")
  check_divides("model.width", model.width, "model.heads", model.heads)
  if model.head_dim < 6 or model.head_dim % 2:
    works = [n for n in range(1, model.width // 6 + 1) if model.width % (2 * n) == 0]
    raise ValueError(
      f"model.width={model.width} / model.heads={model.heads} gives heads of {model.head_dim}"
      " channels; 3-D rotary embedding needs an even number of at least 6;"
      f" use model.heads={nearest_number(model.heads, works)}"
    )
  check_divides("model.frequency_width", model.frequency_width, "2 (sine and cosine)", 2)
  check_choice("model.dtype", model.dtype, DTYPES)
  check_choice("model.attention", model.attention, ATTENTIONS)


def nearest_number(value: int, choices: list[int]) -> int:
  """The choice closest to `value`; 1 if there is none."""
  return min(choices, key=lambda choice: abs(choice - value), default=1)


def check_text(text: Text) -> None:
  """The text encoder's own sizes."""
  check_divides("model.text.attention_width", text.attention_width, "model.text.heads", text.heads)
  check_divides("model.text.buckets", text.buckets, "2 (before and after)", 2)
  if text.max_distance <= text.buckets // 4:
    raise ValueError(
      f"model.text.max_distance={text.max_distance} must be more than a quarter of"
      f" model.text.buckets={text.buckets}"
    )


def check_vae(vae: Vae) -> None:
  """Latents are 16 times smaller than frames and 4 times fewer, and shortcuts fit the widths."""
  for name in ("encoder_width", "decoder_width", "residual_blocks"):
    check_at_least(f"model.vae.{name}", getattr(vae, name), 1)
  sizes, times = vae.multipliers, vae.temporal_downsample
  if len(sizes) != 4:
    raise ValueError(
      f"model.vae.multipliers={sizes} must have 4 entries: latents are 16 times smaller than frames"
    )
  if len(times) != 3 or sum(times) != 2:
    raise ValueError(
      f"model.vae.temporal_downsample={times} must have 3 entries, two of them True: latents are"
      " 4 times fewer than frames"
    )
  check_choice("model.vae.dtype", vae.dtype, DTYPES)
  check_choice("model.vae.convolution", vae.convolution, CONVOLUTIONS)
  check_shortcuts(sizes, times)


def check_shortcuts(sizes: tuple[int, ...], times: tuple[bool, ...]) -> None:
  """A stage's shortcut averages, or repeats, whole groups of channels."""
  stages = [(1, *sizes), sizes, [4 * (1 + time) for time in times] + [1]]
  down = [
    ("encoder", before * shrink, after) for before, after, shrink in zip(*stages, strict=False)
  ]
  stages = [(sizes[3], *sizes[:1:-1]), sizes[:0:-1], [4 * (1 + time) for time in times[::-1]]]
  up = [("decoder", after * grow, before) for before, after, grow in zip(*stages, strict=False)]
  for side, elements, channels in down + up:
    if elements % channels:
      raise ValueError(
        f"model.vae.multipliers={sizes}: a shortcut of the {side} groups {elements} widths of"
        f" channels by {channels}; {channels} must divide {elements}"
      )


def check_quant(quant: Quant) -> None:
  """Precision of the linear layers."""
  check_choice("quant.linears", quant.linears, PRECISIONS)
  if quant.linears != "none" and not quant.layers:
    raise ValueError(f"quant.linears={quant.linears} with quant.layers=() quantises nothing")
  check_choice("quant.cache", quant.cache, CACHES)
  check_choice("quant.cache_smoothing", quant.cache_smoothing, SMOOTHINGS)
  check_choice("quant.kernels", quant.kernels, KERNELS)
  for name in ("weights", "activations", "gradients", "cache_rule"):
    check_choice(f"quant.{name}", getattr(quant, name), SCALE_RULES)
  check_choice("quant.weight_blocks", quant.weight_blocks, WEIGHT_BLOCKS)
  check_choice("quant.gradient_rounding", quant.gradient_rounding, ROUNDINGS)
  for pattern in quant.layers:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f"quant.layers has {pattern!r}, which is no regular expression: {error}"
      ) from error


def check_quantised_cache(experiment: Experiment) -> None:
  """What a quantised cache asks of the other settings."""
  quant, model = experiment.quant, experiment.model
  if quant.cache != "nvfp4":
    return
  if model.head_dim % 16:
    raise ValueError(
      f"quant.cache={quant.cache} needs heads of a multiple of 16 channels;"
      f" model.width={model.width} / model.heads={model.heads} gives {model.head_dim}"
    )
  if quant.cache_smoothing == "original" and experiment.sample.relative_rope:
    raise ValueError(
      "quant.cache_smoothing=original is defined for rotated keys; it needs"
      " sample.relative_rope=False"
    )


def check_sample(sample: Sample, block: int) -> None:
  """The sampler, and what the window must hold."""
  check_choice("sample.solver", sample.solver, SOLVERS)
  check_choice("sample.unroll_layers", sample.unroll_layers, UNROLLS)
  name, unit = "model.block_latents", block
  check_divides("sample.window_latents", sample.window_latents, name, unit)
  if sample.sink_latents:
    check_divides("sample.sink_latents", sample.sink_latents, name, unit)
  if sample.decode_latents and block % sample.decode_latents:
    works = [size for size in range(1, block + 1) if block % size == 0]
    raise ValueError(
      f"sample.decode_latents={sample.decode_latents} must divide model.block_latents={block};"
      f" use 0 (all) or one of {', '.join(map(str, works))}"
    )
  pin = block if sample.pin_shots else 0
  least = sample.sink_latents + pin + block
  if sample.window_latents < least:
    raise ValueError(
      f"sample.window_latents={sample.window_latents} must hold the sink"
      f" (sample.sink_latents={sample.sink_latents}), the pinned block ({pin}, by"
      f" sample.pin_shots={sample.pin_shots}) and the own block ({block}):"
      f" use at least {least}, or a smaller sink"
    )


def check_tiles(tiles: int, height: int) -> None:
  """Strips of rows of the decoder: whole rows of latents."""
  rows = height // VAE_SPACE
  if rows % tiles:
    works = [size for size in range(1, rows + 1) if rows % size == 0]
    raise ValueError(
      f"sample.decode_tiles={tiles} must divide the rows of latents, video.height / {VAE_SPACE}"
      f" = {rows}; use one of {', '.join(map(str, works))}"
    )
