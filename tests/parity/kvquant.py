"""The quantised cache below one attention layer: outputs, slots, and what the slots hold."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment, Model, Sample, Video
from longlive_jax.model import solvers
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.ops import dense_attention
from longlive_jax.quant.kv import QuantisedKVCache, empty_quantised_cache
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.schedule import SampleState, Schedule, States, Tables
from longlive_jax.types import Array
from tests.parity.records import Compared, Refused, compare, compare_share

RELATIVE, FLIPS = 1e-3, 1e-3  # error of outputs in the L2 norm, share of codes


def experiment_of(config: dict, variant: dict) -> Experiment:
  """The experiment of one variant."""
  block = config["num_frame_per_block"]
  return Experiment(
    model=Model(
      width=config["num_heads"] * config["head_dim"],
      heads=config["num_heads"],
      layers=1,
      block_latents=block,
      eps=config["eps"],
      dtype="float32",
    ),
    video=Video(height=32 * config["h"], width=32 * config["w"]),
    sample=Sample(
      window_latents=config["cache_blocks"] * block,
      sink_latents=variant["sink"] * block,
      pin_shots=bool(variant.get("gs")),
      shot_offset_latents=float(variant.get("phi", 0.0)),
      relative_rope=bool(variant.get("rel")),
    ),
  )


def normalise(x: Array, weight: Array, eps: float) -> Array:
  """RMS norm over all heads together."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def attention(archive: Mapping[str, np.ndarray], config: dict, experiment: Experiment) -> object:
  """The recorded layer: q is x turned by 2 channels, v by 5, k is x."""
  norms = [np.asarray(archive[f"in/norm_{name}_weight"], np.float32) for name in "qk"]
  cfg = experiment.model
  denoiser = Denoiser(declare_dit(cfg), cfg, solvers.plan("euler", 1, cfg.shift))
  block = jnp.zeros((1, cfg.block_latents, 2 * config["h"], 2 * config["w"], 1))

  def run(x: Array, cache: QuantisedKVCache, tables: Tables) -> tuple[Array, QuantisedKVCache]:
    q, k = (
      normalise(y, norm, cfg.eps) for y, norm in zip((jnp.roll(x, 2, -1), x), norms, strict=True)
    )
    heads = (x.shape[0], -1, cfg.heads, cfg.head_dim)
    q, k, v = (a.reshape(heads) for a in (q, k, jnp.roll(x, 5, -1)))
    out, cache = denoiser.plan(tables, block).attend(dense_attention, q, k, v, cache, 0)
    return out.reshape(x.shape), cache

  return jax.jit(run)


def meta(experiment: Experiment, states: States, block: int) -> list[int]:
  """(tokens ever written, tokens kept, start and length of the pin in order of time)."""
  slots = states[0].slots
  tokens = experiment.model.block_latents * experiment.latent_tokens
  pin = [-1, 0] if slots.pin < 0 else [sorted(slots.blocks).index(slots.pin) * tokens, tokens]
  return [(block + 1) * tokens, slots.level * tokens, *pin]


def relative(name: str, ours: np.ndarray, golden: np.ndarray) -> Compared:
  """Compares in the L2 norm, which single flipped codes move little."""
  error = np.linalg.norm(ours - golden) / np.linalg.norm(golden)
  return compare(name, error, 0.0, RELATIVE, 0.0)


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks every variant of a file of this layout."""
  for name, variant in config["variants"].items():
    if variant.get("rel"):
      yield Refused(name, "the original's smoothing is defined for rotated keys")
    else:
      yield from check_variant(archive, config, name)


def check_variant(archive: Mapping[str, np.ndarray], config: dict, name: str) -> Iterator[Compared]:
  """Drives one variant and compares it."""
  variant = config["variants"][name]
  experiment = experiment_of(config, variant)
  run, schedule = attention(archive, config, experiment), Schedule.of(experiment)
  tokens = experiment.model.block_latents * experiment.latent_tokens
  shape = (1, 1, config["cache_blocks"], tokens, config["num_heads"], config["head_dim"])
  cache = empty_quantised_cache(shape, "float32", config["scale_rule"], "original")
  states: States = (SampleState(),)
  outs, noisy, metas = [], None, []
  for block in range(config["nchunks"]):
    cut = [block in variant.get("cuts", ())]
    states, tables = schedule.enter(states, block, cut)
    metas.append(meta(experiment, states, block))  # recorded before a cut sets its pin
    noisy, cache = run(archive["in/x_noisy"][block], cache, tables)
    states, tables = schedule.settle(states, block, cut)
    out, cache = run(archive["in/x_clean"][block], cache, tables)
    outs.append(np.asarray(out))
  yield relative(f"{name}/out_clean", np.stack(outs), archive[f"{name}/out_clean"])
  yield relative(f"{name}/out_noisy_last", np.asarray(noisy), archive[f"{name}/out_noisy_last"])
  yield compare(f"{name}/meta", np.asarray(metas), archive[f"{name}/meta"], 0.0, 0.0)
  order = np.argsort(states[0].slots.blocks)
  codes, scales, amax = (
    np.asarray(a)[0, 0][order] for a in (cache.k.codes, cache.k.scales, cache.k.amax)
  )
  yield compare_share(f"{name}/final_k_codes", codes, archive[f"{name}/final_k_codes"], FLIPS)
  scales = scales.view(np.uint8)
  yield compare_share(
    f"{name}/final_k_scales_u8", scales, archive[f"{name}/final_k_scales_u8"], FLIPS
  )
  yield compare(f"{name}/final_k_amax", amax, archive[f"{name}/final_k_amax"], 0.0, 1e-6)
