"""Rotary tables and rotations, and the sinusoid of the timesteps."""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax.model.layers import sinusoid
from longlive_jax.model.rope import (
  angles,
  axis_pairs,
  rotate,
  temporal_positions,
  temporal_table,
  video_rope,
)
from tests.parity.records import Compared, Refused, compare

THETA = 10000.0
ATOL, RTOL = 1e-6, 1e-6


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout."""
  for head_dim in config["head_dims"]:
    name = f"f64/table/hd{head_dim}"
    if f"{name}/angle_cos" in archive:
      rows = archive[f"table/hd{head_dim}/rows"]
      turn = np.concatenate([angles(rows, pairs, THETA) for pairs in axis_pairs(head_dim)], -1)
      for part, function in (("cos", np.cos), ("sin", np.sin)):
        key = f"{name}/angle_{part}"
        yield compare(key, function(turn), archive[key], 1e-12, 0.0)
  for case in config["cases"]:
    yield from check_case(archive, case)
  for key in sorted(k for k in archive if k.startswith("f64/time/sin")):
    width = int(key.removeprefix("f64/time/sin"))
    ours = sinusoid(jnp.asarray(archive["time/t"], jnp.float32), width)
    yield compare(key, ours, archive[key], ATOL, 0.0)


def check_case(archive: Mapping[str, np.ndarray], case: dict) -> Iterator[Compared]:
  """One rotation; tokens past the grid are passed through, as a caller of ours would."""
  name, head_dim = case["case"], case["head_dim"]
  latents, rows, columns = (case[axis] for axis in "fhw")
  x = archive[f"x/hd{head_dim}_{latents}x{rows}x{columns}"]
  positions = temporal_positions(case["start_frame"], latents, case["offset"], case["t_scale"])
  for part, table in zip(("cos", "sin"), temporal_table(positions, head_dim), strict=True):
    key = f"{name}/temporal_{part}"
    if key in archive:
      golden = archive[key]
      ours = table if golden.ndim == table.ndim else table[0]
      yield compare(key, ours, golden, ATOL, 0.0)
  tokens = latents * rows * columns
  turned = rotate(jnp.asarray(x[:, :tokens]), video_rope(positions, rows, columns, head_dim))
  ours = np.concatenate([turned, x[:, tokens:]], 1)
  yield compare(f"{name}/out", ours, archive[f"{name}/out"], ATOL, RTOL)
