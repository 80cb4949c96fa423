"""The teacher-forcing objective with recorded random numbers: loss, clean estimate, gradients."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Model
from longlive_jax.model import flow
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.rope import video_rope
from longlive_jax.train.teacher_forcing import Batch, objective
from longlive_jax.types import Array, PyTree
from tests.parity.networks import compare_gradients, grid, latents_last, load, pad_prompts
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 5e-5, 0.0
LOSS = 1e-5  # relative tolerance


def batch_of(
  archive: Mapping[str, np.ndarray], cfg: Model, table: flow.Table, case: str
) -> Batch | None:
  """Inputs of a case; None = a case we do not know."""
  timesteps = np.asarray(table.timesteps)
  clean, noise = (latents_last(archive[f"in/{k}"], 2) for k in ("clean", "noise"))
  prompts = pad_prompts(archive["in/context"], cfg)
  extra: dict[str, Array | np.ndarray] = {}
  if case == "aug":
    extra["context_timesteps"] = timesteps[archive["in/index_aug"]]
  elif case == "i2v_mask":
    extra["first"] = latents_last(archive["in/initial_latent"], 2)
    extra["mask"] = np.asarray(archive["in/loss_mask"], np.float32)
  elif case != "plain":
    return None
  times, pieces = timesteps[archive["in/index"]], prompts.shape[0] // clean.shape[0]
  return Batch(*jax.tree.map(jnp.asarray, (clean, noise, times, prompts)), pieces, **extra)


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks every case of a file of this layout."""
  cfg, network, params = load(archive, config)
  table = flow.training_table(cfg.shift)
  clean = latents_last(archive["in/clean"], 2)
  positions, (rows, columns) = np.arange(clean.shape[1]), grid(clean, cfg)
  rope = video_rope(positions, rows, columns, cfg.head_dim)
  borders = block_borders(clean.shape[1], cfg.block_latents, rows * columns)
  plan = TeacherForcing(rope, borders)

  def loss(params: PyTree, batch: Batch) -> tuple[Array, Array]:
    value, estimate = objective(network, params, batch, plan, table)
    return value, estimate.clean

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  for case in sorted(key.removesuffix("/loss") for key in archive if key.endswith("/loss")):
    batch = batch_of(archive, cfg, table, case)
    if batch is None:
      yield Refused(case, "not a case of the objective that is known here")
      continue
    (value, estimate), grads = run(params, batch)
    yield compare(f"{case}/loss", value, archive[f"{case}/loss"], 0.0, LOSS)
    ours = np.moveaxis(np.asarray(estimate), -1, 2)
    yield compare(f"{case}/x0_pred", ours, archive[f"{case}/x0_pred"], ATOL, RTOL)
    yield from compare_gradients(archive, f"{case}/grad/param/", grads, cfg)
