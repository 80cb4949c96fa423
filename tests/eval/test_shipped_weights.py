"""The weights in `assets/tiny`, as `make demo` uses them."""

from pathlib import Path

import numpy as np
import pytest

from longlive_jax import Pipeline, Script, Shot, load_config
from longlive_jax.data import shapes
from longlive_jax.eval.shapes_score import SHARES, score_clip
from longlive_jax.weights import ASSETS

MOST_BYTES = 15_000_000


def size_of(name: str) -> int:
  return sum(path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file())


def test_they_are_small():
  assert 5_000_000 < size_of("tiny") <= MOST_BYTES
  assert max(size_of("tiny_4steps"), size_of("tiny_2steps")) < 2_500_000


def test_their_configuration_is_the_preset(root: Path):
  there = load_config(ASSETS / "tiny" / "config.json")
  here = load_config(root / "configs" / "tiny.py")
  assert (there.model, there.video, there.sample) == (here.model, here.video, here.sample)


@pytest.mark.parametrize("variant", ["", ":2steps", ":teacher"])
def test_each_shot_shows_what_its_prompt_says(variant: str):
  """Three shots of two blocks, read back from the pixels."""
  pipeline = Pipeline.from_config(load_config(f"configs/tiny.py{variant}"))
  video, blocks, seed = pipeline.experiment.video, 2, 1_000_001
  frames = shapes.shot_frames([blocks] * 3, pipeline.experiment.model.block_latents)
  clip = shapes.sample_clip(np.random.default_rng(seed), frames, video)
  script = Script(tuple(Shot(s.caption(), blocks) for s in clip.shots), seed=seed)
  result = score_clip(pipeline.generate(script), clip)
  assert np.mean([result[name] for name in SHARES]) > 0.95, result
  assert result["cut"] == [1.0, 1.0]
