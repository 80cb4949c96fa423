"""Distillation with recorded random numbers: rollouts, score losses, and their gradients."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment, Model, Sample, Video
from longlive_jax.model import flow, solvers
from longlive_jax.model.attention import BlockCausal, TeacherForcing, block_borders
from longlive_jax.model.grown import BlockKV
from longlive_jax.model.module import Network
from longlive_jax.model.rope import video_rope
from longlive_jax.sample.block import Denoiser
from longlive_jax.sample.schedule import Schedule
from longlive_jax.train import dmd
from longlive_jax.train.passes import Pass, plan_passes
from longlive_jax.train.self_forcing import SelfForcing, with_gradient
from longlive_jax.types import Array, PyTree
from tests.parity.networks import (
  compare_gradient,
  compare_gradients,
  grid,
  latents_last,
  load,
  pad_prompts,
)
from tests.parity.records import Compared, compare

ATOL, LOSS = 1e-4, 1e-4  # of outputs; relative, of losses
CASES = {"all": None, "last4": 4}  # latents at the end that carry a gradient


@dataclasses.dataclass(frozen=True)
class BySlot(SelfForcing):
  """The original's attached cache where blocks are evicted.

  It moves keys and values down in a pass without gradient, which leaves the gradient where it was:
  what moved has that of the block that was last computed with a gradient in its new place.

  Attributes:
    visible: the earlier blocks that each block sees, in order of time.
  """

  visible: tuple[tuple[int, ...], ...] = ()

  def history(
    self, number: int, kept: Sequence[BlockKV], left: Sequence[BlockKV]
  ) -> tuple[BlockKV, ...]:
    if not self.attached:
      return super().history(number, kept, left)
    place = {block: place for place, block in enumerate(self.visible[number])}
    return tuple(with_gradient(k, left[place.get(j, j)]) for j, k in enumerate(kept))


def visible_of(passes: Sequence[tuple[Pass, Pass]]) -> tuple[tuple[int, ...], ...]:
  """See `BySlot`; of a batch of one."""
  orders = [entering.order for entering, _ in passes]
  return tuple(
    tuple(j for j in (range(i) if order is None else sorted(order[0].tolist())) if j < i)
    for i, order in enumerate(orders)
  )


def schedule_of(config: dict, cfg: Model) -> Schedule:
  """The sampler's policy in the recorded rollouts."""
  return Schedule.of(
    Experiment(
      model=cfg,
      video=Video(height=16 * config["H"], width=16 * config["W"]),
      sample=Sample(
        window_latents=config["local_attn_size"],
        sink_latents=config["sink"],
        pin_shots=config["multi_shot_sink"],
        shot_offset_latents=config["phi"],
      ),
    )
  )


def check_rollouts(
  archive: Mapping[str, np.ndarray], config: dict, cfg: Model, network: Network, params: PyTree
) -> Iterator[Compared]:
  """The student's clip and what a loss on it gives."""
  solver = solvers.plan("unipc", config["sampling_steps"], config["shift"])
  denoiser = Denoiser(network, cfg, solver)
  cuts = [[bool(cut)] for cut in config["scene_cut_mask"]]
  passes = plan_passes(schedule_of(config, cfg), cuts)
  prompts = pad_prompts(archive["in/context"], cfg)
  exits = jnp.asarray(config["exit_flags"], jnp.int32)
  noise, weights = (latents_last(archive[k], 2) for k in ("in/noise", "sf/grad_w"))
  context_noise = latents_last(archive["in/context_noise"], 2).reshape(noise.shape)

  def loss(params: PyTree, noise: Array, trained: int, attached: bool) -> tuple[Array, Array]:
    texts = [network.bind(params).text_kv(prompt[None]) for prompt in prompts]
    student = BySlot(denoiser, attached=attached, original=True, visible=visible_of(passes))
    out = student.rollout(
      params, noise, texts, passes, exits, trained=trained, context_noise=context_noise
    )
    return jnp.mean(out * weights), out

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=(2, 3))
  for case, latents in CASES.items():
    for form, attached in (("detached", False), ("asis", True)):
      trained = len(passes) if latents is None else latents // cfg.block_latents
      (value, out), (grads, of_noise) = run(params, jnp.asarray(noise), trained, attached)
      name = f"sf/{case}_{form}"
      ours = np.moveaxis(np.asarray(out), -1, 2)
      yield compare(f"{name}/out", ours, archive[f"{name}/out"], ATOL, 0.0)
      yield compare(f"{name}/loss", value, archive[f"{name}/loss"], 0.0, LOSS)
      of_noise = np.moveaxis(np.asarray(of_noise), -1, 2)
      yield compare_gradient(f"{name}/grad_noise", of_noise, archive[f"{name}/grad_noise"])
      yield from compare_gradients(archive, f"{name}/grad/param/", grads, cfg)


def check_scores(
  archive: Mapping[str, np.ndarray], config: dict, cfg: Model, network: Network
) -> Iterator[Compared]:
  """The student's direction and loss, and the critic's loss with its gradients."""
  real, fake = (load(archive, config, f"{who}_param/")[2] for who in ("real", "fake"))
  table = flow.training_table(cfg.shift)
  image, noise = (jnp.asarray(latents_last(archive[f"dmd/{k}"], 2)) for k in ("image", "noise"))
  timesteps = dmd.score_timesteps(jnp.asarray(archive["dmd/timestep_raw"]), cfg.shift)
  prompts, nothing = (pad_prompts(archive[f"in/{k}"], cfg) for k in ("context", "context_neg"))
  rows, columns = grid(image, cfg)
  rope = video_rope(np.arange(image.shape[1]), rows, columns, cfg.head_dim)
  borders = block_borders(image.shape[1], cfg.block_latents, rows * columns)
  for case, plan in (("plain", BlockCausal(rope, borders)), ("tf", TeacherForcing(rope, borders))):
    score = dmd.Score(network, plan, len(prompts))

    def student(image: Array, score: dmd.Score = score) -> tuple[Array, tuple[Array, Array]]:
      clip = dmd.noised(image, noise, timesteps, table)
      g = dmd.matching_direction(
        score, score, (real, fake), clip, prompts, nothing, (3.0, 0.0), cfg.block_latents
      )
      return dmd.student_loss(image, g, clip.mask), (clip.noisy, g)

    def critic(params: PyTree, score: dmd.Score = score) -> Array:
      clip = dmd.noised(image, noise, timesteps, table)
      return dmd.critic_loss(score, params, clip, prompts)

    (value, (noisy, g)), of_image = jax.jit(jax.value_and_grad(student, has_aux=True))(image)
    name = f"dmd/{case}"
    yield compare(f"{name}/timestep", np.asarray(timesteps), archive[f"{name}/timestep"], 1e-3, 0.0)
    for key, ours in (("noisy_latent", noisy), ("kl_grad", g)):
      ours = np.moveaxis(np.asarray(ours), -1, 2)
      yield compare(f"{name}/{key}", ours, archive[f"{name}/{key}"], ATOL, 1e-4)
    yield compare(f"{name}/loss", value, archive[f"{name}/loss"], 0.0, LOSS)
    of_image = np.moveaxis(np.asarray(of_image), -1, 2)
    yield compare_gradient(f"{name}/grad_image", of_image, archive[f"{name}/grad_image"])
    value, grads = jax.jit(jax.value_and_grad(critic))(fake)
    yield compare(f"critic/{case}/loss", value, archive[f"critic/{case}/loss"], 0.0, LOSS)
    yield from compare_gradients(archive, f"critic/{case}/grad/param/", grads, cfg)


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared]:
  """Checks every case of a file of this layout."""
  cfg, network, params = load(archive, config)
  yield from check_rollouts(archive, config, cfg, network, params)
  yield from check_scores(archive, config, cfg, network)
