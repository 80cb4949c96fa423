"""The jobs of the suite "attention": a block's queries against the keys that they meet.

Self-attention sees a full window of the cache, and a part of one; cross-attention sees a prompt.
All is in bfloat16, by cuDNN on a GPU and in plain `jnp` elsewhere; over a full window with FP8
products too where the device can, what makes their operands included. Errors are those of the first
queries, all heads: all of them in float32 would take 19 GB of scores at 5B sizes.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from longlive_jax.config import Experiment
from longlive_jax.eval.bench import Case
from longlive_jax.kernels.matmul_choice import PLAIN, kernel_for
from longlive_jax.model.ops import Dense, cudnn_attention, dense_attention, is_costly
from longlive_jax.quant.fp8_attention import fp8_attention
from longlive_jax.types import Array

NORMAL = "normal(0, 1), seed 0"
COMPARED = 64  # queries
PART = 20_000 / 28_160  # of the keys of a window: a length inside of it


def plain_attention() -> tuple[str, Dense]:
  """Name and function of attention in bfloat16 on this device."""
  on_gpu = jax.default_backend() == "gpu"
  return ("cudnn", cudnn_attention) if on_gpu else ("jnp", dense_attention)


def has_fp8(device: jax.Device) -> bool:
  """Whether `fp8_attention` runs here: cuDNN has it from Hopper on, a CPU computes its numbers."""
  return device.platform == "cpu" or kernel_for(device) != PLAIN


def draw(seed: int, *shape: int) -> Array:
  """Normal numbers in bfloat16."""
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def attention_flops(queries: int, keys: int, width: int) -> float:
  """Of both products, all heads."""
  return 4.0 * queries * keys * width


def cases(experiment: Experiment) -> Iterator[Case]:
  """All jobs of the suite, for this device."""
  model = experiment.model
  queries = model.block_latents * experiment.latent_tokens
  keys = experiment.sample.window_latents * experiment.latent_tokens
  heads = model.heads, model.head_dim
  yield attending("self-attention", queries, keys, heads)
  yield attending("self-attention to a part", queries, keys, heads, int(PART * keys))
  yield attending("cross-attention", queries, model.text.length, heads)


def attending(name: str, queries: int, keys: int, heads: tuple[int, int], length: int = 0) -> Case:
  """Attention of a batch of one.

  Args:
    name: of the case.
    queries, keys: how many.
    heads: how many, and their size.
    length: keys that count, the first ones; 0 = all, and no length is given.
  """
  q, k, v = (draw(seed, 1, size, *heads) for seed, size in enumerate((queries, keys, keys)))
  lengths = jnp.asarray([length], jnp.int32) if length else None
  plain, dense = plain_attention()
  functions: dict[str, Callable[..., Array]] = {plain: lambda q, k, v, n: dense(q, k, v, n)}
  if lengths is None and is_costly(queries, keys) and has_fp8(jax.devices()[0]):
    functions["fp8"] = lambda q, k, v, n: fp8_attention(q, k, v, n)
  width, seen = heads[0] * heads[1], length or keys
  sizes = {"queries": queries, "keys": keys} | ({"length": length} if length else {})

  def truth() -> Array:
    few, *others = (x.astype(jnp.float32) for x in (q[:, :COMPARED], k, v))
    return dense_attention(few, others[0], others[1], lengths)

  return Case(
    name,
    sizes | {"heads": heads[0], "head_dim": heads[1]},
    NORMAL,
    functions,
    (q, k, v, lengths),
    lambda out: out[:, :COMPARED].astype(jnp.float32),
    f"float32 jnp, the first {min(COMPARED, queries)} queries, all heads",
    in_flight=4,
    flops=attention_flops(queries, seen, width),
    bytes_moved=dict.fromkeys(functions, 4.0 * width * (queries + seen)),
    truth=truth,
  )
