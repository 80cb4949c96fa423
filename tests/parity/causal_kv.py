"""Blocks against the cache: velocities, clean estimates, slots, keys and values.

The host schedule and the block plan are the sampler's own. The original keeps one buffer in order
of time; ours keeps slots, so recorded keys are compared slot by slot in the order of the blocks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from longlive_jax.config import Experiment, Sample, Video
from longlive_jax.config.rules import check_sample
from longlive_jax.model import flow, solvers
from longlive_jax.model.dit import TextKV
from longlive_jax.model.kv_cache import KVCache, empty_cache
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.schedule import SampleState, Schedule, States, Tables
from longlive_jax.types import Array, PyTree
from tests.parity.networks import latents_last, load, model_of
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 5e-5, 2e-4


def window(config: dict) -> int:
  """Latents of the cache."""
  return config.get("cache_frames", config["local_attn_size"])


def pins(variant: dict) -> bool:
  """Whether a cut pins its block."""
  return bool(variant.get("multi_shot_sink")) and variant.get("sink", 0) > 0


def experiment_of(config: dict, variant: dict) -> Experiment:
  """The experiment of one variant."""
  return Experiment(
    model=model_of(config),
    video=Video(height=16 * config["H"], width=16 * config["W"]),
    sample=Sample(
      window_latents=window(config),
      sink_latents=variant.get("sink", 0),
      pin_shots=pins(variant),
      shot_offset_latents=float(config["phi"]) if variant.get("rope_offset") else 0.0,
      recache_cuts=bool(variant.get("recache")),
      relative_rope=bool(variant.get("relative_rope")),
      t_scale=float(variant.get("t_scale") or 1.0),
    ),
  )


def refusal(config: dict, variant: dict) -> str:
  """Why a variant cannot be asked of us; "" = it can."""
  if (variant.get("max_attention_frames") or window(config)) < window(config):
    return "the attended window is smaller than the cache; sample.window_latents is both"
  if variant.get("start_frame"):
    return "start_frame: a video starts at latent 0"
  sink, block = variant.get("sink", 0), config["num_frame_per_block"]
  cuts_matter = pins(variant) or bool(variant.get("recache"))
  if variant.get("global_sink", 0) not in ((sink,) if cuts_matter else (0, sink)):
    return "a global sink of another size than the sink"
  if variant.get("recache") and any(cut < sink // block for cut in variant.get("cuts", ())):
    return "a cut inside the sink is cached again behind its own stale keys"
  experiment = experiment_of(config, variant)
  try:
    check_sample(experiment.sample, block)
  except ValueError as error:
    return str(error)
  return ""


class Runner:
  """Passes over one block for all variants; one executable a fill level."""

  def __init__(self, archive: Mapping[str, np.ndarray], config: dict):
    self.cfg, self.network, self.params = load(archive, config)
    denoiser = Denoiser(self.network, self.cfg, solvers.plan("euler", 1, self.cfg.shift))

    def step(
      params: PyTree, x: Array, t: Array, text: TextKV, cache: KVCache, tables: Tables
    ) -> tuple[Array, KVCache]:
      plan = denoiser.plan(tables, x)
      return self.network.bind(params)(x, t, text, plan, cache=cache)

    self.step = jax.jit(step, donate_argnums=(4,))
    self.text_kv = jax.jit(lambda params, x: self.network.bind(params).text_kv(x))

  def call(
    self, x: np.ndarray, timestep: float, text: TextKV, cache: KVCache, tables: Tables
  ) -> tuple[np.ndarray, KVCache]:
    """Velocities in `[B, F, C, H, W]` and the cache."""
    times = np.full(x.shape[:2], timestep, np.float32)
    velocity, cache = self.step(self.params, x, times, text, cache, tables)
    return np.moveaxis(np.asarray(velocity), -1, 2), cache


def buffer(cache: KVCache, states: States) -> tuple[np.ndarray, np.ndarray]:
  """Filled slots in the order of their blocks: keys and values `[layers, B, level * S_b, N, D]`."""

  def ordered(store: Array) -> np.ndarray:
    rows = []
    for sample, state in enumerate(states):
      rows.append(np.asarray(store)[:, sample, np.argsort(state.slots.blocks)])
    whole = np.stack(rows, 1)
    return whole.reshape(*whole.shape[:2], -1, *whole.shape[4:])

  return ordered(cache.k), ordered(cache.v)


def meta(schedule: Schedule, state: SampleState, block: int, sink: int) -> list[float]:
  """(tokens ever written, tokens kept, start and length of the pin, shot offset) after a block."""
  slots, tokens = state.slots, schedule.block_latents * schedule.latent_tokens
  pin = [-1, 0]
  if slots.pin >= 0:
    kept = min(sink * schedule.latent_tokens, tokens)
    pin = [sorted(slots.blocks).index(slots.pin) * tokens, kept]
  return [(block + 1) * tokens, slots.level * tokens, *pin, state.cuts * schedule.offset]


def run(
  runner: Runner, archive: Mapping[str, np.ndarray], config: dict, variant: dict
) -> dict[str, Any]:
  """Drives one variant; results by their recorded names, `final_*` and keys in order of time."""
  experiment, cfg = experiment_of(config, variant), runner.cfg
  schedule = Schedule.of(experiment)
  noisy, clean = (latents_last(archive[f"in/{k}"], n) for k, n in (("noisy", 4), ("clean", 3)))
  batch, tokens = clean.shape[1], cfg.block_latents * experiment.latent_tokens
  sizes = (batch, schedule.window.slots, tokens, cfg.heads, cfg.head_dim)
  cache = empty_cache(cfg.layers, *sizes, cfg.dtype)
  states: States = (SampleState(),) * batch
  out: dict[str, Any] = {"flow_pred": [], "clean_flow_pred": [], "meta_after_chunk": []}
  out["layer0_k_after_chunk"] = []
  for block in range(len(clean)):
    cut = [block in variant.get("cuts", ())] * batch
    prompts = np.asarray(archive["in/context"][block], np.float32)
    text = runner.text_kv(runner.params, prompts)
    states, tables = schedule.enter(states, block, cut)
    velocities = []
    for x, timestep in zip(noisy[block], config["timesteps"], strict=True):
      velocity, cache = runner.call(x, timestep, text, cache, tables)
      velocities.append(velocity)
    states, tables = schedule.settle(states, block, cut)
    velocity, cache = runner.call(clean[block], 0.0, text, cache, tables)
    out["flow_pred"].append(np.stack(velocities))
    out["clean_flow_pred"].append(velocity)
    out["meta_after_chunk"].append(meta(schedule, states[0], block, variant.get("sink", 0)))
    out["layer0_k_after_chunk"].append(buffer(cache, states)[0][0])
  out["final_k"], out["final_v"] = buffer(cache, states)
  return out


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks every variant of a file of this layout."""
  runner = Runner(archive, config)
  for name, variant in config["variants"].items():
    reason = refusal(config, variant)
    if reason:
      yield Refused(name, reason)
    else:
      yield from check_variant(runner, archive, config, name)


def check_variant(
  runner: Runner, archive: Mapping[str, np.ndarray], config: dict, name: str
) -> Iterator[Compared]:
  """Compares one variant."""
  out = run(runner, archive, config, config["variants"][name])
  flows = np.stack(out["flow_pred"])
  yield compare(f"{name}/flow_pred", flows, archive[f"{name}/flow_pred"], ATOL, RTOL)
  sigma = flow.sigma_at(flow.training_table(runner.cfg.shift), config["timesteps"][-1])
  last = flow.to_clean(archive["in/noisy"][:, -1], flows[:, -1], sigma)
  yield compare(f"{name}/x0_pred_last", last, archive[f"{name}/x0_pred_last"], ATOL, RTOL)
  key = f"{name}/clean_flow_pred"
  yield compare(key, np.stack(out["clean_flow_pred"]), archive[key], ATOL, RTOL)
  key = f"{name}/meta_after_chunk"
  yield compare(key, np.asarray(out["meta_after_chunk"]), archive[key], 0.0, 0.0)
  key = f"{name}/layer0_k_after_chunk"
  if key in archive:
    for block, keys in enumerate(out["layer0_k_after_chunk"]):
      golden = archive[key][block][:, : keys.shape[1]]
      yield compare(f"{key}[{block}]", keys, golden, ATOL, RTOL)
  for key in ("final_k", "final_v"):
    golden = archive[f"{name}/{key}"][:, :, : out[key].shape[2]]
    yield compare(f"{name}/{key}", out[key], golden, ATOL, RTOL)
