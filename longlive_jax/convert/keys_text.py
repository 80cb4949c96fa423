"""Keys of the UMT5 encoder in foreign checkpoints: the original's, and those of transformers.

Source: spec/models.md section 6.2; for transformers, the state dict of `UMT5EncoderModel`.
"""

from longlive_jax.config import Text
from longlive_jax.convert.dialects import Names, column
from longlive_jax.convert.torch_import import Row

EMBEDDING: Names = ("token_embedding", "shared")
NORM: Names = ("norm", "encoder.final_layer_norm")
PREFIX: Names = ("blocks", "encoder.block")
# foreign names, our path inside a layer, and how the axes are permuted
LAYER: tuple[tuple[Names, str, str], ...] = (
  (("norm1", "layer.0.layer_norm"), "norm1/scale", "same"),
  (("attn.q", "layer.0.SelfAttention.q"), "q/kernel", "linear"),
  (("attn.k", "layer.0.SelfAttention.k"), "k/kernel", "linear"),
  (("attn.v", "layer.0.SelfAttention.v"), "v/kernel", "linear"),
  (("attn.o", "layer.0.SelfAttention.o"), "o/kernel", "linear"),
  (
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    "positions",
    "same",
  ),
  (("norm2", "layer.1.layer_norm"), "norm2/scale", "same"),
  (("ffn.gate.0", "layer.1.DenseReluDense.wi_0"), "gate/kernel", "linear"),
  (("ffn.fc1", "layer.1.DenseReluDense.wi_1"), "up/kernel", "linear"),
  (("ffn.fc2", "layer.1.DenseReluDense.wo"), "down/kernel", "linear"),
)

# keys of transformers that may be there as well -> the key of the same tensor in the table
TWINS = {"encoder.embed_tokens.weight": "shared.weight"}


def text_rows(cfg: Text, dialect: str = "original") -> list[Row]:
  """The table of the encoder: 2 + 10 rows a layer.

  Args:
    cfg: sizes.
    dialect: whose keys, one of `DIALECTS`; a file of "diffusers" may also hold `TWINS`.
  """
  at = column(dialect)
  rows = [
    Row(f"{EMBEDDING[at]}.weight", "embedding"),
    Row(f"{NORM[at]}.weight", "norm/scale"),
  ]
  for i in range(cfg.layers):
    for names, path, form in LAYER:
      rows.append(Row(f"{PREFIX[at]}.{i}.{names[at]}.weight", f"layers/{path}", form, i))
  return rows
