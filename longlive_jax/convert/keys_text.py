"""Keys of the UMT5 encoder in the original's checkpoints. Source: spec/models.md section 6.2."""

from longlive_jax.config import Text
from longlive_jax.convert.torch_import import Row

# original name -> our path inside a layer, and how the axes are permuted
LAYER = {
  "norm1": ("norm1/scale", "same"),
  "attn.q": ("q/kernel", "linear"),
  "attn.k": ("k/kernel", "linear"),
  "attn.v": ("v/kernel", "linear"),
  "attn.o": ("o/kernel", "linear"),
  "pos_embedding.embedding": ("positions", "same"),
  "norm2": ("norm2/scale", "same"),
  "ffn.gate.0": ("gate/kernel", "linear"),
  "ffn.fc1": ("up/kernel", "linear"),
  "ffn.fc2": ("down/kernel", "linear"),
}


def text_rows(cfg: Text) -> list[Row]:
  """The table of the encoder: 2 + 10 rows a layer."""
  rows = [
    Row("token_embedding.weight", "embedding"),
    Row("norm.weight", "norm/scale"),
  ]
  for i in range(cfg.layers):
    for key, (path, form) in LAYER.items():
      rows.append(Row(f"blocks.{i}.{key}.weight", f"layers/{path}", form, i))
  return rows
