"""Keys of the transformer in foreign checkpoints: the original's, and Diffusers'.

Source: spec/models.md section 6.1; for Diffusers, the state dict of `WanTransformer3DModel`.
"""

from longlive_jax.config import Model
from longlive_jax.convert.dialects import Names, column
from longlive_jax.convert.torch_import import Row

# our path -> foreign names, of tensors outside the layers; all linear
OUTER: dict[str, Names] = {
  "text_embed/up": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
  "text_embed/down": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
  "time_embed/up": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
  "time_embed/down": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
  "time_proj": ("time_projection.1", "condition_embedder.time_proj"),
  "head/proj": ("head.head", "proj_out"),
}
OUTER_MODULATION: Names = ("head.modulation", "scale_shift_table")
# the same, of linear layers and norms in a layer
INNER: dict[str, Names] = {
  "ffn/up": ("ffn.0", "ffn.net.0.proj"),
  "ffn/down": ("ffn.2", "ffn.net.2"),
}
NORMS: dict[str, Names] = {
  "cross_norm/scale": ("norm3.weight", "norm2.weight"),
  "cross_norm/bias": ("norm3.bias", "norm2.bias"),
}
for _ours, _theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
  INNER |= {f"{_ours}/{p}": (f"{_ours}.{p}", f"{_theirs}.to_{p}") for p in "qkv"}
  INNER[f"{_ours}/o"] = (f"{_ours}.o", f"{_theirs}.to_out.0")
  NORMS |= {
    f"{_ours}/norm_{p}/scale": (f"{_ours}.norm_{p}.weight", f"{_theirs}.norm_{p}.weight")
    for p in "qk"
  }
MODULATION: Names = ("modulation", "scale_shift_table")


def _linear(key: str, path: str, layer: int | None = None) -> list[Row]:
  return [
    Row(f"{key}.weight", f"{path}/kernel", "linear", layer),
    Row(f"{key}.bias", f"{path}/bias", "same", layer),
  ]


def dit_rows(cfg: Model, dialect: str = "original") -> list[Row]:
  """The table of the transformer: 15 + 27 rows a layer, with bare keys.

  Args:
    cfg: sizes.
    dialect: whose keys, one of `DIALECTS`.
  """
  at = column(dialect)
  rows = [
    Row(
      "patch_embedding.weight", "patch_embed/kernel", "patch", tail=(-1, 1, cfg.patch, cfg.patch)
    ),
    Row("patch_embedding.bias", "patch_embed/bias"),
    Row(OUTER_MODULATION[at], "head/modulation", "squeeze"),
  ]
  for path, names in OUTER.items():
    rows += _linear(names[at], path)
  for i in range(cfg.layers):
    rows.append(Row(f"blocks.{i}.{MODULATION[at]}", "layers/modulation", "squeeze", i))
    for path, names in INNER.items():
      rows += _linear(f"blocks.{i}.{names[at]}", f"layers/{path}", i)
    for path, names in NORMS.items():
      rows.append(Row(f"blocks.{i}.{names[at]}", f"layers/{path}", "same", i))
  return rows
