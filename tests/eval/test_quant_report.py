"""The quantisation report: measures of a matrix by hand, and the program."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.eval.quant_report import MEASURES, measured, plot, table, weight_rows
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise

X = np.asarray(jax.random.normal(jax.random.key(0), (32, 64)))


def test_measures_of_a_random_matrix():
  found = measured(jnp.asarray(X), Spec("mse"))
  back = np.asarray(dequantise(quantise(jnp.asarray(X), Spec("mse")), jnp.float32))
  error = np.linalg.norm(back - X) / np.linalg.norm(X)
  np.testing.assert_allclose(found["relative_error"], error, rtol=1e-5)
  np.testing.assert_allclose(found["underflow"], np.mean(back == 0), rtol=1e-5)
  peaks = np.abs(back).reshape(32, 4, 16).max(-1)
  scales = np.asarray(quantise(jnp.asarray(X), Spec("mse")).scales, np.float32)
  ratio = peaks / scales / (np.abs(X).max() / 1536)
  np.testing.assert_allclose(found["four"], np.mean(np.abs(ratio - 4) < 1e-3), rtol=1e-5)
  assert 0.2 < found["four"] < 0.7
  assert measured(jnp.asarray(X), Spec("static_6"))["four"] == 0.0


def test_measures_of_special_matrices():
  assert measured(jnp.zeros((16, 16)), Spec("mse")) == dict.fromkeys(MEASURES, 0.0)
  tiny = np.full((2, 16), 1e-9, np.float32)
  tiny[0] = 1.0
  found = measured(jnp.asarray(tiny), Spec("static_6"))
  assert (found["underflow"], found["saturated"]) == (0.5, 0.0)


def test_rows_and_their_table(tmp_path: Path):
  kernel = jnp.stack([jnp.asarray(X), jnp.zeros_like(X)])
  params = {"layers": {"ffn": {"up": {"kernel": kernel}}}}
  rows = weight_rows(params, ["layers/ffn/up"], Spec("mse", transpose=True))
  rows += [{**row, "kind": "activation"} for row in rows]
  paths, means = table(rows, "weight", "relative_error")
  assert paths == ["layers/ffn/up"] and means.shape == (1, 2)
  expected = measured(jnp.asarray(X), Spec("mse", transpose=True))["relative_error"]
  np.testing.assert_allclose(means, [[expected, 0.0]])
  plot(rows, tmp_path / "plot.png")
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
  json.dumps(rows)
