"""Parameters as sampling uses them: matrices in the dtype in which their network multiplies."""

from typing import Any

import jax

from longlive_jax.config import Model
from longlive_jax.io.leaves import path_name
from longlive_jax.model.dit import cast_params
from longlive_jax.types import PyTree

SUMMED = "resample/spatial/kernel"  # of the VAE: convolutions after upsampling are folded


def narrowed(params: dict[str, PyTree], cfg: Model) -> dict[str, PyTree]:
  """Parameters of the networks "dit", "vae", "text", or of some of them, with narrow matrices.

  Results stay what they are: matrices are converted to these dtypes wherever they are used. What is
  used in float32, such as norms and biases, stays.
  """
  dtypes = {"vae": cfg.vae.dtype, "text": cfg.text.dtype}
  made = {
    name: cast_matrices(params[name], dtype) for name, dtype in dtypes.items() if name in params
  }
  return params | made | {n: cast_params(params[n], cfg.dtype) for n in ("dit",) if n in params}


def cast_matrices(params: PyTree, dtype: str) -> PyTree:
  """Kernels and embeddings in `dtype`, but for kernels that are summed before they are used."""

  def cast(path: tuple[Any, ...], leaf: Any) -> Any:
    name = path_name(path)
    narrow = name.endswith(("kernel", "embedding")) and not name.endswith(SUMMED)
    return leaf.astype(dtype) if narrow else leaf

  return jax.tree_util.tree_map_with_path(cast, params)
