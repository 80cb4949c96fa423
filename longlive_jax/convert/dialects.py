"""Dialects: the names that different libraries give to the tensors of the same network.

Tables of keys hold the names of a tensor side by side, in the order of `DIALECTS`.
"""

from longlive_jax.checks import check_choice

# of the original's checkpoints; of Diffusers and, for the text encoder, of transformers
DIALECTS = ("original", "diffusers")

Names = tuple[str, str]  # one a dialect


def column(dialect: str) -> int:
  """Place of a dialect's names in the tables; ValueError for an unknown one."""
  check_choice("dialect", dialect, DIALECTS)
  return DIALECTS.index(dialect)
