"""The training forwards: teacher forcing, block-causal, and a separate first latent."""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.model import flow, masks
from longlive_jax.model.attention import BlockCausal, TeacherForcing, block_borders
from longlive_jax.model.module import Network
from longlive_jax.model.rope import Rope, temporal_positions, video_rope
from longlive_jax.types import Array, PyTree
from tests.parity.networks import (
  compare_gradient,
  compare_gradients,
  grid,
  latents_last,
  layer_outputs,
  load,
  pad_prompts,
)
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 3e-5, 1e-4


class Case:
  """Inputs of a file, and forwards that are compiled once a kind."""

  def __init__(self, archive: Mapping[str, np.ndarray], config: dict):
    self.archive = archive
    self.cfg, self.network, self.params = load(archive, config)
    self.phi = config.get("phi", 0.0)
    self.x, self.context = (latents_last(archive[f"in/{k}"], 1) for k in ("x", "clean_x"))
    self.t, self.aug = (np.asarray(archive[f"in/{k}"], np.float32) for k in ("t", "aug_t"))
    self.prompts = pad_prompts(archive["in/context"], self.cfg)
    self.shots = pad_prompts(archive["in/context_multishot"], self.cfg)
    self.latent_tokens = int(np.prod(grid(self.x, self.cfg)))
    self.teacher = jax.jit(
      functools.partial(teacher, self.network, self.borders()), static_argnames="pieces"
    )

  def borders(self, latents: int = 0, first: int = 0) -> tuple[int, ...]:
    """Token borders of the clip, or of its first `latents`."""
    latents = latents or self.x.shape[1]
    return block_borders(latents, self.cfg.block_latents, self.latent_tokens, first)

  def rope(self, offset: np.ndarray | float = 0.0, t_scale: float = 1.0, latents: int = 0) -> Rope:
    """Rotation `[B, S, D/2]` of one half."""
    latents = latents or self.x.shape[1]
    positions = temporal_positions(0, latents, np.asarray(offset, np.float64), t_scale)
    positions = np.broadcast_to(positions, (self.x.shape[0], latents))
    return video_rope(positions, *grid(self.x, self.cfg), self.cfg.head_dim)

  def pieces(self, prompts: Array) -> int:
    """Prompts a sample."""
    return prompts.shape[0] // self.x.shape[0]

  def forced(self, prompts: Array, aug: np.ndarray | None, rope: Rope) -> Array:
    """Teacher-forcing velocities."""
    times = np.zeros_like(self.t) if aug is None else aug
    inputs = (self.x, self.t, self.context, times, prompts, rope)
    return self.teacher(self.params, *inputs, pieces=self.pieces(prompts))

  def causal(self, prompts: Array, latents: int = 0, first: int = 0) -> Array:
    """Block-causal velocities of the clip, or of its first `latents`."""
    plan = BlockCausal(self.rope(latents=latents), self.borders(latents, first))
    latents, pieces = latents or self.x.shape[1], self.pieces(prompts)

    def run(params: PyTree, x: Array, t: Array) -> Array:
      model = self.network.bind(params)
      return model(x, t, model.text_kv(prompts), plan, pieces=pieces)[0]

    return jax.jit(run)(self.params, self.x[:, :latents], self.t[:, :latents])


def teacher(
  network: Network,
  borders: tuple[int, ...],
  params: PyTree,
  x: Array,
  t: Array,
  context: Array,
  times: Array,
  prompts: Array,
  rope: Rope,
  pieces: int,
) -> Array:
  """Velocities of the target half."""
  model, plan = network.bind(params), TeacherForcing(rope, borders)
  return model(
    x,
    t,
    model.text_kv(prompts),
    plan,
    context=context,
    context_timesteps=times,
    pieces=pieces,
  )[0]


def forward_cases(case: Case) -> Iterator[tuple[str, Array]]:
  """(case, velocities `[B, F, H, W, C]`) of all forwards that the file may hold."""
  archive, plain = case.archive, case.rope()
  one, shots = case.prompts, case.shots
  yield "TF", case.forced(one, None, plain)
  yield "TF_aug", case.forced(one, case.aug, plain)
  yield "TF_multishot", case.forced(shots, case.aug, plain)
  for name in ("TF_ropeoff", "TF_ropeoffB"):
    if f"{name}/out" in archive:
      yield name, case.forced(shots, case.aug, case.rope(archive[f"{name}/offset"]))
  yield "TF_ropeconst", case.forced(one, None, case.rope(case.phi))
  if "TF_tscale/out" in archive:
    t_scale = float(archive["TF_tscale/t_scale"])
    yield "TF_tscale", case.forced(one, None, case.rope(0.0, t_scale))
  yield "BC", case.causal(one)
  yield "BC_multishot", case.causal(shots)
  if "I2V/out" in archive:
    yield "I2V", case.causal(one, int(archive["I2V/num_frames"]), first=1)


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout."""
  case = Case(archive, config)
  for name, ours in forward_cases(case):
    if f"{name}/out" in archive:
      out = np.moveaxis(np.asarray(ours), -1, 1)
      yield compare(f"{name}/out", out, archive[f"{name}/out"], ATOL, RTOL)
    if name == "TF_multishot":
      yield from check_wrapper(case, ours)
  yield from check_masks(case)
  yield from check_layers(case)
  yield from check_gradients(case)


def check_wrapper(case: Case, velocity: Array) -> Iterator[Compared]:
  """The wrapper's velocity and clean estimate."""
  sigma = flow.sigma_at(flow.training_table(case.cfg.shift), case.t)
  for name, ours in (("flow_pred", velocity), ("x0_pred", flow.to_clean(case.x, velocity, sigma))):
    if f"W/{name}" in case.archive:
      out = np.moveaxis(np.asarray(ours), -1, 2)
      yield compare(f"W/{name}", out, case.archive[f"W/{name}"], ATOL, RTOL)


def check_masks(case: Case) -> Iterator[Compared]:
  """Dense masks, exactly."""
  ours = {
    "mask/tf": masks.teacher_forcing_mask(case.borders()),
    "mask/bc": masks.block_causal_mask(case.borders()),
  }
  if "mask/i2v" in case.archive:
    latents = int(case.archive["I2V/num_frames"])
    ours["mask/i2v"] = masks.block_causal_mask(case.borders(latents, first=1))
  if "mask/tf_natural" in case.archive:
    ranks = int(case.archive["mask/tf_natural_sp"])
    ours["mask/tf_natural"] = masks.interleaved_mask(case.borders(), ranks)
  for name, mask in ours.items():
    if name in case.archive:
      yield compare(name, mask, case.archive[name], 0.0, 0.0)


def check_layers(case: Case) -> Iterator[Compared]:
  """Outputs of every layer of case TF, tokens [context | target]."""
  plan = TeacherForcing(case.rope(), case.borders())

  def run(params: PyTree, x: Array, t: Array, context: Array) -> list[Array]:
    model = case.network.bind(params)
    return layer_outputs(model, x, t, model.text_kv(case.prompts), plan, context)[1]

  for i, ours in enumerate(jax.jit(run)(case.params, case.x, case.t, case.context)):
    if f"TF/block{i}" in case.archive:
      yield compare(f"TF/block{i}", ours, case.archive[f"TF/block{i}"], ATOL, RTOL)


def check_gradients(case: Case) -> Iterator[Compared]:
  """Gradients of mean(velocities * w) of case TF_multishot."""
  archive, cfg = case.archive, case.cfg
  weights, pieces = latents_last(archive["grad/w"], 1), case.pieces(case.shots)
  embeddings = np.asarray(archive["in/context_multishot"], np.float32)

  def loss(params: PyTree, x: Array, context: Array, embeddings: Array) -> Array:
    prompts = pad_prompts(embeddings, cfg)
    inputs = (params, x, case.t, context, case.aug, prompts, case.rope(), pieces)
    return jnp.mean(teacher(case.network, case.borders(), *inputs) * weights)

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
  value, grads = run(case.params, case.x, case.context, embeddings)
  yield compare("grad/loss", value, archive["grad/loss"], ATOL, RTOL)
  for name, ours in (("grad/x", grads[1]), ("grad/clean_x", grads[2])):
    yield compare_gradient(name, np.moveaxis(np.asarray(ours), -1, 1), archive[name])
  name = "grad/context_multishot"
  yield compare_gradient(name, grads[3], archive[name])
  yield from compare_gradients(archive, "grad/param/", grads[0], cfg)
