"""What is compiled for one batch size, and the step that every video is made of.

Scripts (`Sampler`) and live sessions (`Session`) both make their blocks with `Compiled.sample` and
`Compiled.absorb`, so that the same prompts give the same video.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from longlive_jax.data.prompts import BlockPrompt
from longlive_jax.sample.block import Texts
from longlive_jax.sample.decoder import Decoder
from longlive_jax.sample.moment import Keeper
from longlive_jax.sample.rollout import Engine, RolloutState
from longlive_jax.types import Array, ArrayLike, PyTree

Keys = tuple[np.ndarray, np.ndarray]  # seed and index of each sample, uint32 [B]


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Executables for one batch size.

  Attributes:
    engine: the rollout.
    decoder: latents to frames.
    noise: `block_noise` of a block.
    finite: whether all numbers of a block's latents are finite.
  """

  engine: Engine
  decoder: Decoder
  noise: Callable[..., Array]
  finite: Callable[[Array], Array]

  @functools.cached_property
  def keeper(self) -> Keeper:
    """What a session needs besides; compiled at the first use."""
    return Keeper(self.engine, self.decoder)

  def known(self, first: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Given latents of a block and which they are, as `sample` takes them.

    Args:
      first: `[B, 1, H, W, C]` float32, the first latent of each video; None = nothing is given.
    """
    shape = self.engine.block_shape
    known, mask = np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
    if first is not None:
      known[:, :1], mask[:, 0] = first, True
    return known, mask

  def sample(
    self,
    params: PyTree,
    state: RolloutState,
    texts: Texts,
    entries: Sequence[BlockPrompt],
    keys: Keys,
    known: ArrayLike,
    known_mask: ArrayLike,
  ) -> tuple[Array, RolloutState]:
    """Samples the next block.

    Args:
      params: of the transformer.
      state: before the block; its caches are donated.
      texts: text keys and values of the entries' prompts, one a guidance branch.
      entries: what each sample is told about the block.
      keys: of the noise.
      known, known_mask: given latents, see `Denoiser.denoise`.

    Returns:
      (latents `[B, F, H, W, C]` float32, next state).
    """
    state, cut = self._enter(params, state, texts, entries)
    noise = self.noise(*keys, np.int32(state.block))
    return self.engine.next_block(params, state, noise, texts, cut, known, known_mask)

  def absorb(
    self,
    params: PyTree,
    state: RolloutState,
    texts: Texts,
    entries: Sequence[BlockPrompt],
    latents: ArrayLike,
  ) -> tuple[Array, RolloutState]:
    """Takes given latents `[B, F, H, W, C]` as the next block; the rest is as for `sample`."""
    state, cut = self._enter(params, state, texts, entries)
    state = self.engine.absorb(params, state, latents, texts, cut)
    return jax.device_put(latents, self.engine.latents.sharding), state

  def _enter(
    self, params: PyTree, state: RolloutState, texts: Texts, entries: Sequence[BlockPrompt]
  ) -> tuple[RolloutState, list[bool]]:
    """The state that the block meets, and in which samples it is a cut."""
    rows = [entry.transition == "recache" for entry in entries]
    if any(rows):
      state = self.engine.recache(params, state, texts, rows)
    return state, [entry.transition == "cut" for entry in entries]
