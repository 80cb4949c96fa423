"""The jobs of the suite "elementwise": what is read and written rather than multiplied.

The floor is a large array that is read and written once. The others are passes of a layer over the
tokens of a block, as the model has them, in bfloat16 with float32 arithmetic. Each call has arrays
of its own, so that none is found in a cache, and several are in one executable.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment, Model
from longlive_jax.eval.bench import Case, chain
from longlive_jax.kernels import row_jobs
from longlive_jax.kernels.matmul_choice import HOPPER, kernel_for
from longlive_jax.kernels.rows import takes
from longlive_jax.model.between import turned_rows
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
  turn = turned_rows(rope, (2, tokens, width))
  yield passing(
    "norm and rotation of q and k",
    {"tokens": tokens, "heads": model.heads, "head_dim": model.head_dim},
    (2, tokens, width),
    lambda x: rotate(norm(x).reshape(*x.shape[:2], model.heads, -1), rope),
    4.0,
    kernel=lambda x: normed_rows(x, norm, turn).reshape(*x.shape[:2], model.heads, -1),
  )
  wide = tokens, model.ffn_width
  sizes = {"tokens": tokens, "columns": model.ffn_width}
  yield passing("GELU", sizes, wide, gelu, 4.0)
  yield from quantising(model, frames, tokens, m[:, 0])


def quantising(model: Model, frames: int, tokens: int, m: Array) -> Iterator[Case]:
  """Passes that end in rows of FP8, by kernels too where the device has them.

  Args:
    model: gives the sizes.
    frames: latents of the block.
    tokens: of the block.
    m: scale and shift `[2, frames, 1, E]`.
  """
  width, eps, wide = model.width, model.eps, (tokens, model.ffn_width)
  sizes = {"tokens": tokens, "columns": model.ffn_width}
  yield passing("quantise rows to fp8", sizes, wide, narrow, 3.0, wide_rows, row_jobs.quantise_rows)
  yield passing(
    "GELU, rows to fp8",
    sizes,
    wide,
    lambda x: narrow(gelu(x), stored=True),
    3.0,
    wide_rows,
    lambda x: row_jobs.gelu_rows(row_jobs.Product(x)),
  )
  sizes = {"tokens": tokens, "columns": width}
  factor, shift = 1.0 + m[0, :, 0], m[1, :, 0]
  yield passing(
    "norm and modulation, rows to fp8",
    sizes,
    (tokens, width),
    lambda x: narrow(modulated_norm(by_frame(x, frames), m[0], m[1], eps).reshape(x.shape)),
    3.0,
    wide_rows,
    lambda x: row_jobs.norm_rows(x, factor, shift, eps, True),
  )


def normed_rows(x: Array, norm: RmsNorm, turn: tuple[Array, Array] | None) -> Array:
  """A norm over rows of `[..., E]` and its rotation, by the kernel."""
  found = row_jobs.rms_rows(row_jobs.Product(x), norm.scale[...], norm.eps, turn)
  if found is None:
    raise ValueError(f"rows of {x.shape[-1]} elements do not fit the kernel")
  return found[0]


def by_frame(x: Array, frames: int) -> Array:
  """`[T, E]` as `[F, T / F, E]`."""
  return x.reshape(frames, -1, x.shape[-1])


def narrow(x: Array, stored: bool = False) -> tuple[Array, Array]:
  """FP8 rows and their scales `[T]`."""
  rows = quantise_rows(x, stored=stored)
  return rows.values, rows.scales[:, 0]


def wide_rows(out: tuple[Array, Array]) -> Array:
  """FP8 rows as numbers."""
  return out[0].astype(jnp.float32) * out[1][:, None]


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
  kernel: Callable[[Array], object] | None = None,
) -> Case:
  """A pass over an array.

  Args:
    name: of the case.
    sizes: for the record.
    shape: of the array.
    job: of a bfloat16 array, and of a float32 one for the reference.
    each: bytes an element, read and written.
    value: output -> array of as many rows, before the last axis, as `shape`.
    kernel: the same in one pass, where the device and the size allow it.
  """
  keys = jax.random.split(jax.random.key(0), CALLS)
  arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
  size = arrays[0].size

  def rows(out: object) -> Array:
    found = value(out)
    return found.reshape(-1, found.shape[-1])[:COMPARED].astype(jnp.float32)

  jobs = {"jnp": job}
  if kernel and kernel_for(jax.devices()[0]) == HOPPER and takes(shape, arrays[0].dtype):
    jobs["one pass"] = kernel
  return Case(
    name,
    sizes,
    NORMAL,
    {n: chain(lambda _, x, run=run: run(x), CALLS, CALLS) for n, run in jobs.items()},
    (jnp.zeros(()), (arrays,)),
    lambda results: jnp.stack([rows(out) for out in results]),
    "float32 jnp, first rows",
    calls=CALLS,
    in_flight=4,
    bytes_moved=dict.fromkeys(jobs, each * size),
    truth=lambda: jnp.stack([rows(job(x.astype(jnp.float32))) for x in arrays]),
  )
