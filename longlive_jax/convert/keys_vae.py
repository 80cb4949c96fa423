"""Keys of the VAE's state dict: the original's, and Diffusers', which Light VAEs may have too.

Source: spec/models.md sections 5.11 and 6.3; for Diffusers, the state dict of `AutoencoderKLWan`.
"""

from longlive_jax.config import Vae
from longlive_jax.convert.dialects import Names, column
from longlive_jax.convert.torch_import import Row

# our path, foreign names, and the form of the weight: a convolution's; "flat" is a norm
Part = tuple[str, Names, str]

AROUND_LATENTS: tuple[Part, ...] = (
  ("to_moments", ("conv1", "quant_conv"), "patch"),
  ("from_latent", ("conv2", "post_quant_conv"), "patch"),
)
ENDS: tuple[Part, ...] = (
  ("conv_in", ("conv1", "conv_in"), "conv3d"),
  ("head/norm", ("head.0", "norm_out"), "flat"),
  ("head/conv", ("head.2", "conv_out"), "conv3d"),
)
RESIDUAL: tuple[Part, ...] = (
  ("norm1", ("residual.0", "norm1"), "flat"),
  ("conv1", ("residual.2", "conv1"), "conv3d"),
  ("norm2", ("residual.3", "norm2"), "flat"),
  ("conv2", ("residual.6", "conv2"), "conv3d"),
)
SHORTCUT: Part = ("shortcut", ("shortcut", "conv_shortcut"), "patch")
ATTENTION: tuple[Part, ...] = (
  ("norm", ("norm", "norm"), "flat"),
  ("qkv", ("to_qkv", "to_qkv"), "patch"),
  ("out", ("proj", "proj"), "patch"),
)
BEFORE: Names = ("middle.0", "mid_block.resnets.0")
BETWEEN: Names = ("middle.1", "mid_block.attentions.0")
AFTER: Names = ("middle.2", "mid_block.resnets.1")
# side -> foreign names of residual block {j} of stage {i}, and of what resamples after {blocks}
BLOCKS: dict[str, Names] = {
  "encoder": ("downsamples.{i}.downsamples.{j}", "down_blocks.{i}.resnets.{j}"),
  "decoder": ("upsamples.{i}.upsamples.{j}", "up_blocks.{i}.resnets.{j}"),
}
RESAMPLING: dict[str, Names] = {
  "encoder": ("downsamples.{i}.downsamples.{blocks}", "down_blocks.{i}.downsampler"),
  "decoder": ("upsamples.{i}.upsamples.{blocks}", "up_blocks.{i}.upsampler"),
}
SPATIAL: Part = ("spatial", ("resample.1", "resample.1"), "conv2d")
TEMPORAL: Part = ("temporal", ("time_conv", "time_conv"), "conv3d")


def _parts(parts: tuple[Part, ...], key: str, path: str, at: int) -> list[Row]:
  """Rows of the parts of something; `key` and `path` are what stands before their names."""
  rows = []
  ones = (1,) * (2 if parts is ATTENTION else 3)  # its axes are height and width
  for ours, names, form in parts:
    theirs, place = f"{key}{names[at]}", f"{path}{ours}"
    if form == "flat":
      rows.append(Row(f"{theirs}.gamma", f"{place}/scale", form, tail=ones))
    else:
      rows += [
        Row(
          f"{theirs}.weight", f"{place}/kernel", form, tail=(-1, *ones) if form == "patch" else ()
        ),
        Row(f"{theirs}.bias", f"{place}/bias"),
      ]
  return rows


def _middle(side: str, at: int) -> list[Row]:
  return [
    *_parts(RESIDUAL, f"{side}.{BEFORE[at]}.", f"{side}/middle/before/", at),
    *_parts(ATTENTION, f"{side}.{BETWEEN[at]}.", f"{side}/middle/attention/", at),
    *_parts(RESIDUAL, f"{side}.{AFTER[at]}.", f"{side}/middle/after/", at),
  ]


def _stages(side: str, sizes: list[int], blocks: int, times: list[bool], at: int) -> list[Row]:
  """Rows of the stages of one side.

  Args:
    side: "encoder" or "decoder".
    sizes: width before the first stage, then of every stage.
    blocks: residual blocks a stage.
    times: whether the resampling of all but the last stage has a temporal convolution.
    at: column of the dialect.
  """
  rows = []
  for i in range(len(sizes) - 1):
    path = f"{side}/stages/{i}"
    for j in range(blocks):
      parts = (*RESIDUAL, SHORTCUT) if j == 0 and sizes[i] != sizes[i + 1] else RESIDUAL
      key = f"{side}.{BLOCKS[side][at].format(i=i, j=j)}."
      rows += _parts(parts, key, f"{path}/blocks/{j}/", at)
    if i < len(times):
      parts = (SPATIAL, TEMPORAL) if times[i] else (SPATIAL,)
      key = f"{side}.{RESAMPLING[side][at].format(i=i, blocks=blocks)}."
      rows += _parts(parts, key, f"{path}/resample/", at)
  return rows


def vae_rows(cfg: Vae, dialect: str = "original") -> list[Row]:
  """The table of the VAE, 196 rows at the released size; Light VAEs differ in widths only.

  The mean and deviation of the latents are no part of the state dict.

  Args:
    cfg: sizes.
    dialect: whose keys, one of `DIALECTS`.
  """
  at, blocks = column(dialect), cfg.residual_blocks
  sizes, times = list(cfg.multipliers), list(cfg.temporal_downsample)
  return [
    *_parts(ENDS, "encoder.", "encoder/", at),
    *_stages("encoder", [1, *sizes], blocks, times, at),
    *_middle("encoder", at),
    *_parts(AROUND_LATENTS, "", "", at),
    *_parts(ENDS, "decoder.", "decoder/", at),
    *_middle("decoder", at),
    *_stages("decoder", [sizes[-1], *sizes[::-1]], blocks + 1, times[::-1], at),
  ]
