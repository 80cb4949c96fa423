"""launch.export: the same weights in another precision."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
from longlive_jax.types import PyTree
from tests.launch.tiny import OVERRIDES, TINY, Program


def test_exported_weights_are_those_of_the_source(
  program: Program, checkpoint: Path, root: Path, tmp_path: Path
):
  out = tmp_path / "exported"
  done = program("export", *TINY, f"--config.io.checkpoint={checkpoint}", f"--out={out}")
  assert done.code == 0, done.stderr
  assert json.loads((out / "metadata.json").read_text())["dtype"] == "bfloat16"
  assert json.loads((out / "config.json").read_text())["io"]["checkpoint"] == ""
  before, after = (
    Pipeline.from_config(
      load_config(root / "configs/tiny.py", {**OVERRIDES, "io.checkpoint": str(folder)})
    ).models.params
    for folder in (checkpoint, out)
  )

  def compare(a: jax.Array, b: jax.Array) -> None:
    assert b.dtype == jnp.float32
    expected = a.astype(jnp.bfloat16).astype(jnp.float32) if a.ndim > 1 else a
    np.testing.assert_array_equal(expected, b)

  jax.tree.map(compare, before, after)


NVFP4 = {"quant.linears": "nvfp4", "quant.weights": "mse"}
FLAGS = [f"--config.{name}={value}" for name, value in NVFP4.items()]


@pytest.fixture
def packed(program: Program, checkpoint: Path, tmp_path: Path) -> Path:
  """The checkpoint in NVFP4."""
  out = tmp_path / "packed"
  arguments = [*TINY, *FLAGS, f"--config.io.checkpoint={checkpoint}", f"--out={out}"]
  done = program("export", *arguments, "--dtype=nvfp4")
  assert done.code == 0, done.stderr
  return out


def dit_of(folder: Path, **quant: str) -> PyTree:
  settings = {**OVERRIDES, **NVFP4, **quant, "io.checkpoint": str(folder)}
  return Pipeline.from_config(load_config("configs/tiny.py", settings)).models.params["dit"]


def test_weights_in_nvfp4_are_those_that_loading_the_source_gives(checkpoint: Path, packed: Path):
  before, after = dit_of(checkpoint), dit_of(packed)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
  ):
    is_packed = any(getattr(key, "name", "") in ("codes", "scales", "amax") for key in path)
    expected = a if is_packed or a.ndim < 2 else a.astype(jnp.bfloat16).astype(jnp.float32)
    assert b.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(b), err_msg=str(path))
  assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(after))


def test_weights_in_nvfp4_are_not_read_as_something_else(packed: Path):
  for quant, said in (
    ({"quant.weights": "static_6"}, "quant.weights='mse', not 'static_6'"),
    ({"quant.weight_blocks": "16x16"}, "quant.weight_blocks='1x16', not '16x16'"),
    ({"quant.linears": "none"}, "quant.linears='nvfp4', not 'none'"),
  ):
    with pytest.raises(ValueError, match=re.escape(said)):
      dit_of(packed, **quant)


def test_weights_in_nvfp4_are_not_trained_or_widened(
  program: Program, packed: Path, tmp_path: Path
):
  source = f"--config.io.checkpoint={packed}"
  done = program("train", *TINY, *FLAGS, source, f"--workdir={tmp_path / 'run'}")
  assert done.code == 2 and "are for sampling" in done.stderr
  assert not (tmp_path / "run").exists()
  done = program("export", *TINY, *FLAGS, source, f"--out={tmp_path / 'wide'}")
  assert done.code == 2 and "--dtype=bfloat16 needs" in done.stderr
  done = program("export", *TINY, source, f"--out={tmp_path / 'wide'}", "--dtype=nvfp4")
  assert done.code == 2 and "needs --config.quant.linears=nvfp4" in done.stderr
  assert not (tmp_path / "wide").exists()


def test_nothing_to_export_is_an_error(program: Program, tmp_path: Path):
  done = program("export", *TINY, "--config.io.checkpoint=", f"--out={tmp_path / 'exported'}")
  assert done.code == 2 and "io.checkpoint is empty" in done.stderr
  assert not (tmp_path / "exported").exists()
