"""Whole rollouts against the recorded ones: latents, velocities, timesteps, final slots."""

from collections.abc import Iterator, Mapping

import numpy as np

from longlive_jax.config import Experiment, Model, Sample, Text, Vae, Video
from longlive_jax.convert.keys_dit import dit_rows
from longlive_jax.convert.torch_import import import_params
from longlive_jax.model import solvers
from longlive_jax.model.dit import declare_dit
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.rollout import Engine, RolloutState
from tests.parity.records import Compared, Refused, compare


def experiment_of(config: dict, variant: dict) -> Experiment:
  """The experiment that reproduces one variant."""
  pinned = bool(variant.get("ms")) and variant["sink"] > 0
  return Experiment(
    model=Model(
      width=config["dim"],
      ffn_width=config["ffn_dim"],
      heads=config["num_heads"],
      layers=config["num_layers"],
      frequency_width=config["freq_dim"],
      eps=config["eps"],
      dtype="float32",
      block_latents=config["num_frame_per_block"],
      shift=config["shift"],
      text=Text(width=config["text_dim"], length=config["text_len"]),
      vae=Vae(latent_channels=config["in_dim"]),
    ),
    video=Video(height=16 * config["H"], width=16 * config["W"]),
    sample=Sample(
      window_latents=config["local_attn_size"],
      sink_latents=variant["sink"],
      pin_shots=pinned,
      shot_offset_latents=variant.get("phi", 0.0),
      recache_cuts=bool(variant.get("recache")) and pinned,
      relative_rope=bool(variant.get("relrope")),
      t_scale=variant.get("t_scale") or 1.0,
    ),
  )


def run(
  archive: Mapping[str, np.ndarray], config: dict, variant: dict
) -> tuple[np.ndarray, RolloutState, Engine]:
  """Latents `[B, F, H, W, C]` of a variant, the last state, and the engine."""
  experiment = experiment_of(config, variant)
  cfg, batch = experiment.model, config["B"]
  network = declare_dit(cfg)
  tensors = {k.removeprefix("param/"): archive[k] for k in archive if k.startswith("param/")}
  params = import_params(dit_rows(cfg), tensors, network.abstract)
  plan = solvers.plan("unipc", variant.get("steps", 4), cfg.shift)
  guidance = variant.get("cfg") or 1.0
  engine = Engine(Denoiser(network, cfg, plan, guidance), experiment, params, batch)
  names, embeddings = config["prompt_names"], archive["in/prompt_embeds"].astype(np.float32)

  def text(index: int) -> object:
    return engine.text_kv(params, np.repeat(embeddings[index][None], batch, 0))

  noise = np.moveaxis(archive["in/noise"], 2, -1).astype(np.float32)
  state, outs, f = engine.start(), [], cfg.block_latents
  for block in range(variant.get("nchunks", config["nchunks"])):
    prompt = variant["prompts"][block]
    texts = (text(prompt),) + ((text(names.index("neg")),) if engine.branches > 1 else ())
    known = np.zeros(engine.block_shape, np.float32)
    mask = np.zeros(engine.block_shape[:2], bool)
    if variant.get("i2v") and block == 0:
      known[:, :1] = np.moveaxis(archive["in/initial_latent"], 2, -1)
      mask[:, 0] = True
    cut = block > 0 and names[prompt].startswith(config["scene_cut_prefix"])
    part = noise[:, block * f : (block + 1) * f]
    latents, state = engine.next_block(params, state, part, texts, [cut] * batch, known, mask)
    outs.append(np.asarray(latents))
  return np.concatenate(outs, 1), state, engine


def final_meta(engine: Engine, state: RolloutState) -> list[int]:
  """(tokens ever written, tokens kept, start and length of the pin in order of time)."""
  schedule, slots = engine.schedule, state.states[0].slots
  tokens = schedule.block_latents * schedule.latent_tokens
  pin = [-1, 0]
  if slots.pin >= 0:
    pin = [sorted(slots.blocks).index(slots.pin) * tokens, tokens]
  return [state.block * tokens, slots.level * tokens, *pin]


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Runs every variant of a file of this layout."""
  for name, variant in config["variants"].items():
    if variant["sink"] % config["num_frame_per_block"]:
      yield Refused(f"{name}/latents", "the sink is not a whole number of blocks")
      continue
    latents, state, engine = run(archive, config, variant)
    golden = archive[f"{name}/latents"]
    tolerance = max(5e-4, 20 * float(archive[f"{name}/fp32_vs_fp64_maxabs"]))
    yield compare(f"{name}/latents", np.moveaxis(latents, -1, 2), golden, tolerance, 0.0)
    meta = np.asarray(final_meta(engine, state))
    yield compare(f"{name}/final_meta", meta, archive[f"{name}/final_meta"], 0.0, 0.0)
