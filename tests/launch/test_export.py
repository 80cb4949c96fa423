"""launch.export: the same weights in another precision."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.build import Pipeline
from longlive_jax.config.load import load_config
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


def test_nothing_to_export_is_an_error(program: Program, tmp_path: Path):
  done = program("export", *TINY, "--config.io.checkpoint=", f"--out={tmp_path / 'exported'}")
  assert done.code == 2 and "io.checkpoint is empty" in done.stderr
  assert not (tmp_path / "exported").exists()
