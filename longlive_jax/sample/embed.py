"""Embeddings of prompts; the last few are remembered."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Text
from longlive_jax.model.module import Network
from longlive_jax.model.tokenizer import Tokenizer
from longlive_jax.parallel.parked import at_hand
from longlive_jax.parallel.rules import home_of
from longlive_jax.types import Array, PyTree

PROMPTS_KEPT = 64  # embeddings of the last prompts stay in memory


class Embedder:
  """The text encoder of a sampler, one prompt at a time.

  Args:
    cfg: of the encoder.
    network: declared encoder.
    params: its parameters, on the devices or parked; in pieces (`parallel.parked.in_pieces`) it
      takes the memory of two of them.
    tokenizer: of the encoder.
  """

  def __init__(self, cfg: Text, network: Network, params: PyTree, tokenizer: Tokenizer):
    self.cfg, self.network, self.params, self.tokenizer = cfg, network, params, tokenizer
    self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

  def __call__(self, prompt: str) -> np.ndarray:
    """Embedding `[L, E_text]` float32 of a prompt.

    Raises:
      ValueError: the prompt has more tokens than `model.text.length`.
    """
    if prompt not in self._kept:
      ids, mask = self.tokenizer([prompt])
      run = self._by_pieces if self._in_pieces else self._at_once
      self._kept[prompt] = np.asarray(run(ids, mask))[0]
      while len(self._kept) > PROMPTS_KEPT:
        self._kept.popitem(last=False)
    self._kept.move_to_end(prompt)
    return self._kept[prompt]

  def compile(self) -> None:
    """Compiles what a prompt needs; a second call is free."""
    _ = self._pieces if self._in_pieces else self._whole

  @property
  def _in_pieces(self) -> bool:
    return isinstance(self.params["layers"], list)

  def _at_once(self, ids: np.ndarray, mask: np.ndarray) -> Array:
    return self._whole(at_hand(self.params), ids, mask)

  def _by_pieces(self, ids: np.ndarray, mask: np.ndarray) -> Array:
    through, end = self._pieces
    x = before = self.params["embedding"][ids].astype(self.cfg.dtype)
    for piece in self.params["layers"]:
      jax.block_until_ready(before)  # so that two pieces at most are there: one comes, one is used
      before, x = x, through(at_hand(piece), x, mask)
    return end(self.params["norm"], x, mask)

  @functools.cached_property
  def _whole(self) -> Any:
    """The compiled encoder."""
    ids = jax.ShapeDtypeStruct((1, self.cfg.length), jnp.int32)

    def encode(params: PyTree, ids: Array, mask: Array) -> Array:
      return self.network.bind(params)(ids, mask, dtype=self.cfg.dtype).astype(jnp.float32)

    params = at_hand(self.params)
    return jax.jit(encode, out_shardings=home_of(params)).lower(params, ids, ids).compile()

  @functools.cached_property
  def _pieces(self) -> tuple[Any, Any]:
    """Executables of a piece of the layers, and of what comes after the last."""
    cfg, part = self.cfg, self.network.bind_part
    mask = jax.ShapeDtypeStruct((1, cfg.length), jnp.int32)
    x = jax.ShapeDtypeStruct((1, cfg.length, cfg.width), jnp.dtype(cfg.dtype))

    def through(piece: PyTree, x: Array, mask: Array) -> Array:
      return part({"layers": piece}).run(x, mask)[0]

    def end(norm: PyTree, x: Array, mask: Array) -> Array:
      return part({"norm": norm}).end(x, mask).astype(jnp.float32)

    first, home = at_hand(self.params["layers"][0]), home_of(self.params["norm"])
    made = jax.jit(through, out_shardings=home).lower(first, x, mask).compile()
    return made, jax.jit(end, out_shardings=home).lower(self.params["norm"], x, mask).compile()
