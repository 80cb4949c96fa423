"""What NVFP4 does to each linear layer: to its weight, and to what it is given in a real video.

relative_error   |Q(x) - x| / |x|
saturated        share of elements that lie above 6 scales, where there is one
underflow        share of elements other than 0 that become 0
four             share of blocks whose largest element is put at 4 instead of 6
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from longlive_jax.io.atomic import replacing
from longlive_jax.io.leaves import flat
from longlive_jax.model.attention import Full
from longlive_jax.model.module import Network
from longlive_jax.model.ops import Matmul, Ops, plain_matmul
from longlive_jax.model.rope import expand, spatial_table, temporal_table
from longlive_jax.quant.blocks import into_blocks
from longlive_jax.quant.nvfp4 import Spec, dequantise, prepared, quantise_blocks, unit_of
from longlive_jax.quant.nvfp4 import quantise as pack
from longlive_jax.types import Array, PyTree

MEASURES = ("relative_error", "saturated", "underflow", "four")
Row = dict[str, Any]


@functools.partial(jax.jit, static_argnums=1)
def statistics(x: Array, spec: Spec) -> dict[str, Array]:
  """The measures of one matrix `[M, N]`, each a float32 scalar."""
  blocks, source = quantise_blocks(x, spec), prepared(x, spec).astype(jnp.float32)
  packed = pack(x, spec)
  back = dequantise(packed, jnp.float32)
  elements = into_blocks(source, 16 if spec.two_d else 1)
  reach = 6.0 * blocks.scales * unit_of(packed) * (1.0 + 1e-5)
  used = jnp.max(jnp.abs(elements), (-3, -1)) > 0
  top = jnp.max(jnp.abs(blocks.values), (-3, -1))
  nonzero = elements != 0
  count = jnp.maximum(jnp.sum(nonzero), 1)
  return {
    "relative_error": jnp.linalg.norm(back - source) / jnp.maximum(jnp.linalg.norm(source), 1e-30),
    "saturated": jnp.sum(nonzero & (reach > 0) & (jnp.abs(elements) > reach)) / count,
    "underflow": jnp.sum(nonzero & (blocks.values == 0)) / count,
    "four": jnp.sum(used & (top == 4.0)) / jnp.maximum(jnp.sum(used), 1),
  }


def measured(x: Array, spec: Spec) -> dict[str, float]:
  """`statistics` as plain numbers."""
  return {name: float(value) for name, value in statistics(x, spec).items()}


def weight_rows(params: PyTree, paths: Sequence[str], spec: Spec) -> list[Row]:
  """A row for each layer of each path.

  Args:
    params: of the transformer; kernels `[layers, in, out]`.
    paths: such as "layers/ffn/up".
    spec: of the weights, `transpose` set.
  """
  kernels = flat(params)
  return [
    {"kind": "weight", "path": path, "layer": layer, **measured(kernel, spec)}
    for path in paths
    for layer, kernel in enumerate(kernels[f"{path}/kernel"])
  ]


def watching(paths: Sequence[str], spec: Spec, rows: list[Row]) -> Matmul:
  """A plain product that adds a row for the input of each of the paths, layer after layer."""

  def matmul(x: Array, w: Array, bias: Array | None, *, path: str, key: Array | None) -> Array:
    if path in paths:
      layer = sum(row["path"] == path for row in rows)
      with jax.disable_jit(False):
        values = measured(x.reshape(-1, x.shape[-1]), spec)
      rows.append({"kind": "activation", "path": path, "layer": layer, **values})
    return plain_matmul(x, w, bias, path=path, key=key)

  return matmul


def activation_rows(
  network: Network,
  params: PyTree,
  latents: Array,
  prompts: Array,
  timesteps: Sequence[float],
  paths: Sequence[str],
  spec: Spec,
) -> list[Row]:
  """A row for each layer, path and noise level of a pass over finished latents with noise.

  Args:
    network: declared transformer.
    params: its parameters.
    latents: `[1, F, H, W, C]`, of a video.
    prompts: embeddings `[1, L, E_text]`.
    timesteps: noise levels, each added to all latents.
    paths: layers to look at.
    spec: of the activations.

  Returns:
    Rows with the keys kind, path, layer, timestep and the measures. The pass is not compiled: the
    scan over layers runs as a loop, so that a layer's inputs can be looked at.
  """
  rows: list[Row] = []
  model = network.bind(params)
  cfg, (frames, height, width) = model.cfg, latents.shape[1:4]
  space = spatial_table(height // cfg.patch, width // cfg.patch, cfg.head_dim, cfg.rope_theta)
  plan = Full(expand(temporal_table(np.arange(frames), cfg.head_dim, cfg.rope_theta), space))
  noise = jax.random.normal(jax.random.key(0), latents.shape)
  with jax.disable_jit():
    for timestep in timesteps:
      found: list[Row] = []
      ops, sigma = Ops(matmul=watching(paths, spec, found)), timestep / 1000.0
      noisy = (1.0 - sigma) * latents + sigma * noise
      times = jnp.full((1, frames), timestep)
      model(noisy, times, model.text_kv(prompts, ops), plan, ops=ops)
      rows += [{**row, "timestep": timestep} for row in found]
  return rows


def table(rows: Sequence[Row], kind: str, measure: str) -> tuple[list[str], np.ndarray]:
  """Paths, and a measure's mean over noise levels `[paths, layers]`; NaN where there is none."""
  mine = [row for row in rows if row["kind"] == kind]
  paths = sorted({row["path"] for row in mine})
  layers = 1 + max((row["layer"] for row in mine), default=0)
  values: list[list[list[float]]] = [[[] for _ in range(layers)] for _ in paths]
  for row in mine:
    values[paths.index(row["path"])][row["layer"]].append(row[measure])
  means = [[np.mean(cell) if cell else np.nan for cell in line] for line in values]
  return paths, np.asarray(means).reshape(len(paths), layers)


def plot(rows: Sequence[Row], path: str | Path) -> None:
  """Draws the measures of weights and activations as PNG, paths down and layers across."""
  figure, grid = plt.subplots(2, len(MEASURES), figsize=(15, 6), layout="constrained")
  for line, kind in zip(grid, ("weight", "activation"), strict=True):
    for axes, measure in zip(line, MEASURES, strict=True):
      paths, means = table(rows, kind, measure)
      picture = axes.imshow(means, aspect="auto", cmap="viridis")
      axes.set(title=f"{kind}: {measure}", xlabel="layer")
      axes.set_yticks(range(len(paths)), [name.removeprefix("layers/") for name in paths])
      figure.colorbar(picture, ax=axes)
  with replacing(path) as part:
    figure.savefig(part, format="png", dpi=110)
  plt.close(figure)
