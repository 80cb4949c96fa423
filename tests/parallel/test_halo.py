"""Windows of the devices of a clip, and latents that do not know how it was split."""

import jax
import numpy as np
import pytest

from longlive_jax.config import Vae
from longlive_jax.model.vae import declare_vae
from longlive_jax.parallel.halo import encode, split_windows, whole_clip
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.types import PyTree

LATENTS = 64
CFG = Vae(encoder_width=4, decoder_width=4, multipliers=(1, 1, 1, 1), latent_channels=4)
NETWORK = declare_vae(CFG, dtype="float64", form="conv2d")


@pytest.mark.parametrize(
  ("latents", "ranks", "frames", "starts", "drops"),
  [
    # spec/training.md section 5.3; the first two devices' windows are as long as the others'
    (96, 4, 209, (0, 0, 76, 172), (0, 24, 29, 29)),
    (96, 2, 305, (0, 76), (0, 29)),
    (384, 4, 497, (0, 268, 652, 1036), (0, 29, 29, 29)),
    (96, 1, 381, (0,), (0,)),
    (32, 4, 125, (0, 0, 0, 0), (0, 8, 16, 24)),
  ],
)
def test_windows(latents, ranks, frames, starts, drops):
  found = split_windows(latents, ranks, 28)
  assert (found.frames, found.starts, found.drops) == (frames, starts, drops)
  for rank, (start, stop) in enumerate(found.spans):
    assert start >= 0 and stop <= 4 * (latents - 1) + 1
    encoded = 1 + (stop - start - 1) // 4
    assert found.drops[rank] + latents // ranks <= encoded
  assert max(drops) + latents // ranks == found.encoded or ranks == 1


def noisy_params() -> PyTree:
  """As freshly drawn ones, with noise on all."""
  rng = np.random.default_rng(1)

  def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    noise = 0.1 * rng.normal(size=leaf.shape)
    if len(leaf.shape) == 1:
      return noise if "bias" in str(path) else 1.0 + noise
    bound = np.prod(leaf.shape[:-1]) ** -0.5
    return noise + rng.uniform(-bound, bound, leaf.shape)

  return jax.tree_util.tree_map_with_path(draw, NETWORK.abstract)


@pytest.fixture(scope="module")
def parts() -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """For each halo: latents of eight windows, and of the whole clip, in float64."""
  with jax.enable_x64(True):
    params = noisy_params()
    frames = 4 * LATENTS - 3
    video = np.random.default_rng(0).integers(0, 256, (1, frames, 16, 16, 3), np.uint8)
    mesh = make_mesh(1, 1, 8)

    def run(windows, video):
      step = jax.jit(lambda p, v: encode(NETWORK, p, v, windows, mesh, 4))
      return np.asarray(step(params, video))

    whole = run(whole_clip(LATENTS, 8), video[:, None])
    found = {}
    for halo in (28, 27, 26, 8):
      windows = split_windows(LATENTS, 8, halo)
      cut = np.stack([video[:, start:stop] for start, stop in windows.spans], 1)
      found[halo] = run(windows, cut), whole
  return found


@pytest.mark.parametrize("halo", [28, 27])
def test_a_halo_of_the_receptive_field_is_exact(parts, halo):
  ours, whole = parts[halo]
  assert whole.dtype == np.float64 and np.ptp(whole) > 0.1
  np.testing.assert_allclose(ours, whole, atol=1e-15 * np.abs(whole).max(), rtol=0)


def test_a_smaller_halo_is_not_exact_and_worse_the_smaller(parts):
  away = {
    halo: np.abs(ours - whole).max() / np.abs(whole).max() for halo, (ours, whole) in parts.items()
  }
  assert 1e-14 < away[26] < 1e-8 < 1e-6 < away[8]
