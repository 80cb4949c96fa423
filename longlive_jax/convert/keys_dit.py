"""Keys of the transformer in the original's checkpoints. Source: spec/models.md section 6.1."""

from longlive_jax.config import Model
from longlive_jax.convert.torch_import import Row

# original name -> our path, for tensors outside the layers; all linear
OUTER = {
  "text_embedding.0": "text_embed/up",
  "text_embedding.2": "text_embed/down",
  "time_embedding.0": "time_embed/up",
  "time_embedding.2": "time_embed/down",
  "time_projection.1": "time_proj",
  "head.head": "head/proj",
}
INNER = {f"self_attn.{p}": f"self_attn/{p}" for p in "qkvo"}
INNER |= {f"cross_attn.{p}": f"cross_attn/{p}" for p in "qkvo"}
INNER |= {"ffn.0": "ffn/up", "ffn.2": "ffn/down"}
NORMS = {
  f"{a}.norm_{p}.weight": f"{a}/norm_{p}/scale" for a in ("self_attn", "cross_attn") for p in "qk"
}
NORMS |= {"norm3.weight": "cross_norm/scale", "norm3.bias": "cross_norm/bias"}


def _linear(key: str, path: str, layer: int | None = None) -> list[Row]:
  return [
    Row(f"{key}.weight", f"{path}/kernel", "linear", layer),
    Row(f"{key}.bias", f"{path}/bias", "same", layer),
  ]


def dit_rows(cfg: Model) -> list[Row]:
  """The table of the transformer: 15 + 27 rows a layer, with bare keys."""
  rows = [
    Row("patch_embedding.weight", "patch_embed/kernel", "patch"),
    Row("patch_embedding.bias", "patch_embed/bias"),
    Row("head.modulation", "head/modulation", "squeeze"),
  ]
  for key, path in OUTER.items():
    rows += _linear(key, path)
  for i in range(cfg.layers):
    rows.append(Row(f"blocks.{i}.modulation", "layers/modulation", "squeeze", i))
    for key, path in INNER.items():
      rows += _linear(f"blocks.{i}.{key}", f"layers/{path}", i)
    for key, path in NORMS.items():
      rows.append(Row(f"blocks.{i}.{key}", f"layers/{path}", "same", i))
  return rows
