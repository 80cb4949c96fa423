"""The text encoder: outputs with and without mask, layer outputs, position buckets and biases."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from longlive_jax.config import Text
from longlive_jax.convert.keys_text import text_rows
from longlive_jax.convert.torch_import import import_params
from longlive_jax.model.text import declare_text, relative_buckets
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 2e-5, 1e-4


def text_of(config: dict) -> Text:
  """Our configuration of a recorded encoder."""
  return Text(
    vocabulary=config["vocab"],
    width=config["dim"],
    attention_width=config["dim_attn"],
    ffn_width=config["dim_ffn"],
    heads=config["num_heads"],
    layers=config["num_layers"],
    buckets=config["num_buckets"],
    max_distance=config["max_dist"],
  )


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout."""
  if config.get("shared_pos"):
    yield Refused("out", "position biases shared by all layers: every layer has its own table")
    return
  cfg = text_of(config)
  network = declare_text(cfg)
  tensors = {k.removeprefix("param/"): archive[k] for k in archive if k.startswith("param/")}
  params = import_params(text_rows(cfg), tensors, network.abstract)
  ids, mask = (np.asarray(archive[f"in/{name}"], np.int32) for name in ("ids", "mask"))

  @jax.jit
  def run(params: dict) -> dict[str, jax.Array]:
    model = network.bind(params)
    hidden = model.hidden(ids, mask)
    out = {f"act/block{i}": hidden[i] for i in range(cfg.layers)}
    out["out"] = model(ids, mask, zero_padding=False)
    out["out_zeroed"] = model(ids, mask)
    out["out_nomask"] = model(ids, None)
    return out

  for name, ours in run(params).items():
    if name in archive:
      yield compare(name, ours, archive[name], ATOL, RTOL)
  yield from check_positions(archive, cfg, params)


def check_positions(
  archive: Mapping[str, np.ndarray], cfg: Text, params: dict
) -> Iterator[Compared]:
  """Bias of the first layer, and the buckets of the first and last rows of long tables."""
  buckets = relative_buckets(archive["in/ids"].shape[1], cfg.buckets, cfg.max_distance)
  bias = params["layers"]["positions"][0][buckets].transpose(2, 0, 1)[None]
  yield compare("relpos_bias_block0", bias, archive["relpos_bias_block0"], ATOL, RTOL)
  for prefix, count in (("relpos_bucket", cfg.buckets), ("relpos_bucket32", 32)):
    for row, where in ((0, "row0"), (-1, "lastrow")):
      for name in (k for k in archive if k.startswith(f"{prefix}_{where}_")):
        length = archive[name].shape[0]
        ours = relative_buckets(length, count, cfg.max_distance)[row]
        yield compare(name, ours, archive[name], 0.0, 0.0)
