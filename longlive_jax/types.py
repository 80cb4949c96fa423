"""Shared names: array aliases, mesh axes and the letters that shapes are written in.

Shape letters used in every docstring:
  B batch, F latents, T frames, H W C height width channels, S sequence tokens, N heads,
  D head dim, E width, L text tokens, P rotary pairs, K slots of the cache.
A latent array is `[B, F, H, W, C]` and a video `[B, T, H, W, 3]`: channels last everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
PyTree = Any
Initializer = Callable[..., Array]

# Axes of a mesh: samples are split over the first two, the halves of a training clip (context and
# target) over the third, its tokens over the fourth; parameters over the last three.
DATA, FSDP, HALF, SEQ = "data", "fsdp", "half", "seq"
SAMPLES = (DATA, FSDP)
ROWS = (DATA, FSDP, HALF)  # of (context, target) pairs
CLIP = (HALF, SEQ)  # devices that share a clip
SHARDS = (FSDP, HALF, SEQ)
