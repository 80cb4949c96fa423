"""The jobs of the suite "elementwise": what is read and written rather than multiplied.

The floor is a large array that is read and written once. The others are passes of a layer over the
tokens of a block, as the model has them, in bfloat16 with float32 arithmetic. Each call has arrays
of its own, so that none is found in a cache, and several are in one executable.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Case, chain
from longlive_jax.model.layers import RmsNorm, gelu
from longlive_jax.model.ops import modulated_norm
from longlive_jax.model.rope import rotate, video_rope
from longlive_jax.quant.fp8 import quantise_rows
from longlive_jax.types import Array

NORMAL = "normal(0, 1), seed 0"
COMPARED = 64  # rows
CALLS = 8


def cases(experiment: Experiment, largest: int) -> Iterator[Case]:
  """All jobs of the suite.

  Args:
    experiment: gives the sizes.
    largest: elements of the array that is copied.
  """
  model = experiment.model
  frames, each = model.block_latents, experiment.latent_tokens
  tokens, width = frames * each, model.width
  yield copying(largest)
  m = jax.random.normal(jax.random.key(1), (2, 1, frames, 1, width))
  yield passing(
    "norm and modulation",
    {"tokens": tokens, "width": width},
    (1, frames, each, width),
    lambda x: modulated_norm(x, m[0], m[1], model.eps),
    4.0,
  )
  grid = experiment.latent_height // model.patch, experiment.latent_width // model.patch
  rope = video_rope(np.arange(frames), *grid, model.head_dim, model.rope_theta)
  norm = RmsNorm(width, model.eps)
  yield passing(
    "norm and rotation of q and k",
    {"tokens": tokens, "heads": model.heads, "head_dim": model.head_dim},
    (2, tokens, width),
    lambda x: rotate(norm(x).reshape(*x.shape[:2], model.heads, -1), rope),
    4.0,
  )
  wide = tokens, model.ffn_width
  sizes = {"tokens": tokens, "columns": model.ffn_width}
  yield passing("GELU", sizes, wide, gelu, 4.0)

  def narrow(x: Array) -> tuple[Array, Array]:
    rows = quantise_rows(x)
    return rows.values, rows.scales

  def value(out: tuple[Array, Array]) -> Array:
    return out[0].astype(jnp.float32) * out[1]

  yield passing("quantise rows to fp8", sizes, wide, narrow, 3.0, value)


def copying(elements: int) -> Case:
  """One large array, read and written once: negated, so that the result cannot be the input."""
  x = jax.random.normal(jax.random.key(0), (elements,), jnp.bfloat16)
  return Case(
    "copy",
    {"elements": elements},
    NORMAL,
    {"jnp": lambda x: -x},
    (x,),
    lambda y: y[:COMPARED].astype(jnp.float32),
    "float32 jnp",
    in_flight=4,
    bytes_moved={"jnp": 4.0 * elements},
    truth=lambda: -x[:COMPARED].astype(jnp.float32),
  )


def passing(
  name: str,
  sizes: dict[str, int],
  shape: tuple[int, ...],
  job: Callable[[Array], object],
  each: float,
  value: Callable = lambda y: y,
) -> Case:
  """A pass over an array.

  Args:
    name: of the case.
    sizes: for the record.
    shape: of the array.
    job: of a bfloat16 array, and of a float32 one for the reference.
    each: bytes an element, read and written.
    value: output -> array of as many rows, before the last axis, as `shape`.
  """
  keys = jax.random.split(jax.random.key(0), CALLS)
  arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
  size = arrays[0].size

  def rows(out: object) -> Array:
    found = value(out)
    return found.reshape(-1, found.shape[-1])[:COMPARED].astype(jnp.float32)

  return Case(
    name,
    sizes,
    NORMAL,
    {"jnp": chain(lambda _, x: job(x), CALLS, CALLS)},
    (jnp.zeros(()), (arrays,)),
    lambda results: jnp.stack([rows(out) for out in results]),
    "float32 jnp, first rows",
    calls=CALLS,
    in_flight=4,
    bytes_moved={"jnp": each * size},
    truth=lambda: jnp.stack([rows(job(x.astype(jnp.float32))) for x in arrays]),
  )
