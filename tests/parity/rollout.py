"""Whole rollouts against the recorded ones: latents, every velocity, timesteps, final slots."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from longlive_jax.config import Experiment, Sample, Video
from longlive_jax.config.rules import check_sample
from longlive_jax.model import solvers
from longlive_jax.model.module import Network
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.rollout import Engine, RolloutState
from longlive_jax.sample.schedule import Schedule
from longlive_jax.types import Array, PyTree
from tests.parity.networks import latents_last, load, model_of
from tests.parity.records import Compared, Refused, compare


@dataclasses.dataclass(frozen=True)
class Recording:
  """A network that hands out what every forward was told and said, in order.

  Attributes:
    network: the declared network.
    calls: (timesteps `[B, F]`, velocities `[B, F, H, W, C]`) of each forward.
  """

  network: Network
  calls: list[tuple[np.ndarray, np.ndarray]]

  @property
  def abstract(self) -> PyTree:
    return self.network.abstract

  def bind(self, params: PyTree) -> "Bound":
    return Bound(self.network.bind(params), self.calls)


@dataclasses.dataclass(frozen=True)
class Bound:
  """The recording network with its parameters; the clean pass has its head, too."""

  model: Any
  calls: list[tuple[np.ndarray, np.ndarray]]

  @property
  def text_kv(self) -> Any:
    return self.model.text_kv

  def __call__(self, x: Array, times: Array, *args: Any, head: bool = True, **rest: Any) -> Any:
    velocity, cache = self.model(x, times, *args, **rest)
    jax.debug.callback(self.record, times, velocity, ordered=True)
    return velocity, cache

  def record(self, times: Array, velocity: Array) -> None:
    self.calls.append((np.array(times), np.array(velocity)))


def experiment_of(config: dict, variant: dict) -> Experiment:
  """The experiment that reproduces one variant."""
  pinned = bool(variant.get("ms")) and variant.get("sink", 0) > 0
  window = config["local_attn_size"]
  return Experiment(
    model=model_of(config),
    video=Video(height=16 * config["H"], width=16 * config["W"]),
    sample=Sample(
      steps=variant.get("steps") or 4,
      guidance=variant.get("cfg") or 1.0,
      window_latents=window if window > 0 else 3 * config["num_frame_per_block"],
      sink_latents=variant.get("sink", 0),
      pin_shots=pinned,
      shot_offset_latents=variant.get("phi") or 0.0,
      recache_cuts=bool(variant.get("recache")) and pinned,
      relative_rope=bool(variant.get("relrope")),
      t_scale=variant.get("t_scale") or 1.0,
    ),
  )


def is_cut(config: dict, variant: dict, block: int) -> bool:
  """Whether a block begins a new shot."""
  prompt = config["prompt_names"][variant["prompts"][block]]
  return block > 0 and prompt.startswith(config["scene_cut_prefix"])


def count_blocks(config: dict, variant: dict) -> int:
  return variant.get("nchunks") or config["nchunks"]


def refusal(config: dict, variant: dict) -> str:
  """Why a variant cannot be asked of us; "" = it can."""
  experiment = experiment_of(config, variant)
  sample, size = experiment.sample, experiment.model.block_latents
  try:
    check_sample(sample, size)
  except ValueError as error:
    return str(error)
  inside = range(min(sample.sink_latents // size, count_blocks(config, variant)))
  if sample.recache_cuts and any(is_cut(config, variant, block) for block in inside):
    return "a cut inside the sink is cached again behind its own stale keys"
  return ""


class Runner:
  """Plays the variants of a file; those that differ in the host's policy share executables."""

  def __init__(self, archive: Mapping[str, np.ndarray], config: dict):
    self.archive, self.config = archive, config
    self.cfg, self.network, self.params = load(archive, config)
    self.engines: dict[tuple, Engine] = {}

  def engine(self, experiment: Experiment) -> Engine:
    """An engine with the policy of an experiment."""
    sample, cfg = experiment.sample, self.cfg
    key = (sample.steps, sample.guidance, sample.relative_rope)
    if key not in self.engines:
      plan = solvers.plan("unipc", sample.steps, cfg.shift)
      recording: Any = Recording(self.network, [])
      denoiser = Denoiser(recording, cfg, plan, sample.guidance)
      self.engines[key] = Engine(denoiser, experiment, self.params, self.config["B"])
    engine = copy.copy(self.engines[key])
    engine.experiment, engine.schedule = experiment, Schedule.of(experiment)
    engine.denoiser.network.calls.clear()
    return engine

  def run(self, variant: dict) -> tuple[np.ndarray, RolloutState, Engine]:
    """Latents `[B, F, H, W, C]` of a variant, the last state, and the engine."""
    config, names = self.config, self.config["prompt_names"]
    engine = self.engine(experiment_of(config, variant))
    noise = latents_last(self.archive["in/noise"], 2)
    state, outs, f = engine.start(), [], self.cfg.block_latents
    for block in range(count_blocks(config, variant)):
      prompts = [variant["prompts"][block], *[names.index("neg")] * (engine.branches - 1)]
      known = np.zeros(engine.block_shape, np.float32)
      mask = np.zeros(engine.block_shape[:2], bool)
      if variant.get("i2v") and block == 0:
        known[:, :1] = latents_last(self.archive["in/initial_latent"], 2)
        mask[:, 0] = True
      cut = [is_cut(config, variant, block)] * engine.batch
      part, texts = noise[:, block * f : (block + 1) * f], self.texts(engine, prompts)
      latents, state = engine.next_block(self.params, state, part, texts, cut, known, mask)
      outs.append(np.asarray(latents))
    jax.effects_barrier()
    return np.concatenate(outs, 1), state, engine

  def texts(self, engine: Engine, prompts: list[int]) -> tuple:
    """Text keys and values, one a branch; every sample has the same prompt."""
    embeddings = self.archive["in/prompt_embeds"].astype(np.float32)
    wide = [np.repeat(embeddings[prompt][None], engine.batch, 0) for prompt in prompts]
    return tuple(engine.text_kv(self.params, prompt) for prompt in wide)


def final_meta(engine: Engine, state: RolloutState) -> list[int]:
  """(tokens ever written, tokens kept, start and length of the pin in order of time)."""
  schedule, slots = engine.schedule, state.states[0].slots
  tokens = schedule.block_latents * schedule.latent_tokens
  pin = [-1, 0]
  if slots.pin >= 0:
    pin = [sorted(slots.blocks).index(slots.pin) * tokens, tokens]
  return [state.block * tokens, slots.level * tokens, *pin]


def calls_of(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
  """(timestep of the last latent and first token of every forward, velocities), as recorded."""
  calls, schedule = engine.denoiser.network.calls, engine.schedule
  tokens = schedule.block_latents * schedule.latent_tokens
  a_block = engine.branches * (engine.denoiser.solver.steps + 1)
  heads = [(times[0, -1], i // a_block * tokens) for i, (times, _) in enumerate(calls)]
  return np.asarray(heads), np.stack([np.moveaxis(v, -1, 2) for _, v in calls])


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Runs every variant of a file of this layout."""
  runner = Runner(archive, config)
  for name, variant in config["variants"].items():
    reason = refusal(config, variant)
    if reason:
      yield Refused(name, reason)
      continue
    latents, state, engine = runner.run(variant)
    tolerance = max(5e-4, 20 * float(archive[f"{name}/fp32_vs_fp64_maxabs"]))
    golden = archive[f"{name}/latents"]
    yield compare(f"{name}/latents", np.moveaxis(latents, -1, 2), golden, tolerance, 0.0)
    meta = np.asarray(final_meta(engine, state))
    yield compare(f"{name}/final_meta", meta, archive[f"{name}/final_meta"], 0.0, 0.0)
    starts, velocities = calls_of(engine)
    for key, ours, atol in (
      ("call_timestep_start", starts, 0.0),
      ("call_flow_pred", velocities, tolerance),
    ):
      if f"{name}/{key}" in archive:
        yield compare(f"{name}/{key}", ours, archive[f"{name}/{key}"], atol, 0.0)
