"""Flow matching tables, conversions, and the trajectories of the solvers on a toy field."""

import re
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax.model import flow, solvers
from tests.parity.records import Compared, Refused, compare

RELATIVE = 1e-6  # of sigmas and timesteps
ATOL, RTOL = 1e-4, 1e-4  # of trajectories
OVERFLOW = 1e30


def names(archive: Mapping[str, np.ndarray], pattern: str) -> list[re.Match[str]]:
  """Matches of a pattern at the start of the recorded names, without repeats."""
  found = (re.match(pattern, name) for name in archive)
  return list({match[0]: match for match in found if match}.values())


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout; what it holds is read off the names."""
  del config
  for match in names(archive, r"fm/shift([\d.]+)/n(\d+)/(extra|noextra)/"):
    yield from check_table(archive, match)
  for match in names(archive, r"denoising_step_list/shift([\d.]+)/n(\d+)$"):
    table = flow.flow_match_table(int(match[2]), float(match[1]))
    yield check_step_list(match[0], table, archive[match[0]])
  for match in names(archive, r"ops/shift([\d.]+)/"):
    yield from check_conversions(archive, match)
  for match in names(archive, r"(euler|unipc|dpmpp)/shift([\d.]+)/n(\d+)/"):
    yield from check_solver(archive, match)


def check_table(
  archive: Mapping[str, np.ndarray], match: re.Match[str]
) -> Iterator[Compared | Refused]:
  """Sigmas, timesteps and weights of one table."""
  prefix = match[0]
  table = flow.flow_match_table(int(match[2]), float(match[1]), match[3] == "extra")
  for name in ("sigmas", "timesteps"):
    key = prefix + name
    yield compare(key, getattr(table, name), archive[key], RELATIVE, RELATIVE)
  key = f"{prefix}training_weights"
  golden = archive[key]
  if np.max(np.abs(golden)) > OVERFLOW:
    yield Refused(key, "the original's normalisation overflows float32")
  else:
    yield compare(key, table.weights, golden, 1e-5, 1e-5)


def check_step_list(name: str, table: flow.Table, golden: np.ndarray) -> Compared:
  """Truncated timesteps and a final 0; float32 may fall on either side of a whole number."""
  timesteps = np.append(table.timesteps.astype(np.float64), 0.0)
  low, high = np.trunc(np.maximum(timesteps - 1e-3, 0)), np.trunc(timesteps + 1e-3)
  ours = np.clip(golden, low, high) if golden.shape == low.shape else low
  return compare(name, ours, golden, 0.0, 0.0)


def check_conversions(
  archive: Mapping[str, np.ndarray], match: re.Match[str]
) -> Iterator[Compared]:
  """Lookup, noise, target, and both conversions on the training table."""
  prefix, table = match[0], flow.training_table(float(match[1]))
  timesteps = archive[f"{prefix}t"].astype(np.float32)
  clean, noise, velocity = (
    jnp.asarray(archive[prefix + n], jnp.float32) for n in ("x0", "noise", "flow")
  )
  index = flow.nearest_index(table, timesteps)
  yield compare(f"{prefix}timestep_id", index, archive[f"{prefix}timestep_id"], 0.0, 0.0)
  sigma = flow.sigma_at(table, timesteps)
  noisy = flow.add_noise(clean, noise, sigma)
  estimate = flow.to_clean(noisy, velocity, sigma)
  results = {
    "training_weight": (flow.weight_at(table, timesteps), 1e-5),
    "add_noise": (noisy, 1e-6),
    "training_target": (flow.velocity_target(clean, noise), 1e-6),
    "flow_to_x0": (estimate, 1e-6),
    "x0_to_flow": (flow.to_velocity(noisy, estimate, sigma), 1e-4),  # divides by sigma
  }
  for name, (ours, tolerance) in results.items():
    yield compare(prefix + name, ours, archive[prefix + name], tolerance, tolerance)


def check_solver(archive: Mapping[str, np.ndarray], match: re.Match[str]) -> Iterator[Compared]:
  """A trajectory on `v = (M x) (0.5 + t / 1000) + b`, over the channels."""
  prefix, plan = match[0], solvers.plan(match[1], int(match[3]), float(match[2]))
  for name, tolerance in (("sigmas", RELATIVE), ("timesteps", 0.0)):
    if prefix + name in archive:
      ours = getattr(plan, name)
      yield compare(prefix + name, ours, archive[prefix + name], tolerance, tolerance)
  matrix, offset, start = (
    jnp.asarray(archive[prefix + n], jnp.float32) for n in ("M", "b", "x_init")
  )
  state, states, velocities = solvers.init(start), [], []
  for i in range(plan.steps):
    mixed = jnp.einsum("dc,bchw->bdhw", matrix, state.x)
    velocity = mixed * (0.5 + plan.timesteps[i] / 1000) + offset[:, None, None]
    state = solvers.step(plan.row(i), state, velocity)
    states.append(np.asarray(state.x)[0])
    velocities.append(np.asarray(velocity)[0])
  for name, ours in (("traj", states), ("v", velocities)):
    if prefix + name in archive:
      yield compare(prefix + name, np.stack(ours), archive[prefix + name], ATOL, RTOL)
