"""Keys of the original's VAE state dict.

Source: spec/models.md section 6.3.
"""

from longlive_jax.config import Vae
from longlive_jax.convert.torch_import import Row


def _weight(key: str, path: str, form: str) -> list[Row]:
  return [Row(f"{key}.weight", f"{path}/kernel", form), Row(f"{key}.bias", f"{path}/bias")]


def _residual(key: str, path: str, shortcut: bool) -> list[Row]:
  rows = [
    Row(f"{key}.residual.0.gamma", f"{path}/norm1/scale", "flat"),
    *_weight(f"{key}.residual.2", f"{path}/conv1", "conv3d"),
    Row(f"{key}.residual.3.gamma", f"{path}/norm2/scale", "flat"),
    *_weight(f"{key}.residual.6", f"{path}/conv2", "conv3d"),
  ]
  return rows + (_weight(f"{key}.shortcut", f"{path}/shortcut", "patch") if shortcut else [])


def _middle(side: str) -> list[Row]:
  key, path = f"{side}.middle", f"{side}/middle"
  return [
    *_residual(f"{key}.0", f"{path}/before", False),
    Row(f"{key}.1.norm.gamma", f"{path}/attention/norm/scale", "flat"),
    *_weight(f"{key}.1.to_qkv", f"{path}/attention/qkv", "patch"),
    *_weight(f"{key}.1.proj", f"{path}/attention/out", "patch"),
    *_residual(f"{key}.2", f"{path}/after", False),
  ]


def _stages(side: str, name: str, sizes: list[int], blocks: int, times: list[bool]) -> list[Row]:
  """Rows of the stages of one side.

  Args:
    side: "encoder" or "decoder".
    name: the original's word for its stages.
    sizes: width before the first stage, then of every stage.
    blocks: residual blocks a stage.
    times: whether the resampling of all but the last stage has a temporal convolution.
  """
  rows = []
  for i in range(len(sizes) - 1):
    key, path = f"{side}.{name}.{i}.{name}", f"{side}/stages/{i}"
    for j in range(blocks):
      rows += _residual(f"{key}.{j}", f"{path}/blocks/{j}", j == 0 and sizes[i] != sizes[i + 1])
    if i < len(times):
      rows += _weight(f"{key}.{blocks}.resample.1", f"{path}/resample/spatial", "conv2d")
      if times[i]:
        rows += _weight(f"{key}.{blocks}.time_conv", f"{path}/resample/temporal", "conv3d")
  return rows


def _ends(side: str) -> list[Row]:
  return [
    *_weight(f"{side}.conv1", f"{side}/conv_in", "conv3d"),
    Row(f"{side}.head.0.gamma", f"{side}/head/norm/scale", "flat"),
    *_weight(f"{side}.head.2", f"{side}/head/conv", "conv3d"),
  ]


def vae_rows(cfg: Vae) -> list[Row]:
  """The table of the VAE, 196 rows at the released size; Light VAEs differ in widths only.

  The mean and deviation of the latents are no part of the state dict.
  """
  sizes, times = list(cfg.multipliers), list(cfg.temporal_downsample)
  return [
    *_ends("encoder"),
    *_stages("encoder", "downsamples", [1, *sizes], cfg.residual_blocks, times),
    *_middle("encoder"),
    *_weight("conv1", "to_moments", "patch"),
    *_weight("conv2", "from_latent", "patch"),
    *_ends("decoder"),
    *_middle("decoder"),
    *_stages(
      "decoder", "upsamples", [sizes[-1], *sizes[::-1]], cfg.residual_blocks + 1, times[::-1]
    ),
  ]
