"""A Diffusers folder goes through a checkpoint of ours and back, and the libraries load it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from longlive_jax.config import Experiment
from longlive_jax.config.load import from_flags
from longlive_jax.convert import diffusers_config as files
from longlive_jax.convert.checkpoints import open_checkpoint
from longlive_jax.convert.export import make_export
from longlive_jax.convert.importing import import_job
from longlive_jax.convert.networks import pipeline_sources, sized
from longlive_jax.convert.sources import open_source
from tests.convert.test_against_libraries import (
  DIT,
  MEAN,
  STD,
  TEXT,
  VAE,
  diffusers,
  randomise,
  torch,
  transformers,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

MODEL = dataclasses.replace(DIT, text=TEXT, vae=VAE)


def networks() -> dict[str, Any]:
  """The three networks, made by the libraries."""
  config = transformers.UMT5Config(**files.text_json(TEXT))
  return {
    "transformer": diffusers.WanTransformer3DModel.from_config(files.dit_json(MODEL)),
    "vae": diffusers.AutoencoderKLWan.from_config(files.vae_json(VAE, MEAN, STD)),
    "text_encoder": transformers.UMT5EncoderModel(config),
  }


def test_a_pipeline_folder_there_and_back(tmp_path: Path):
  first, ours, back = (tmp_path / name for name in ("first", "ours", "back"))
  for number, (name, module) in enumerate(networks().items()):
    randomise(module, number).save_pretrained(first / name)
  sources = {name: open_source(path) for name, path in pipeline_sources(first).items()}
  experiment = from_flags(sized(Experiment(), sources))
  assert experiment.model.width == MODEL.width and experiment.model.vae == dataclasses.replace(
    VAE, dtype=experiment.model.vae.dtype
  )
  import_job(experiment, sources).write(ours)
  make_export(open_checkpoint(ours), "diffusers").write(back)
  assert json.loads((back / "model_index.json").read_text())["_class_name"] == "WanPipeline"
  for name in networks():
    before, after = (
      {k: v for file in (f / name).glob("*.safetensors") for k, v in load_file(file).items()}
      for f in (first, back)
    )
    assert set(before) == set(after)
    for key, value in before.items():
      np.testing.assert_array_equal(value, after[key], err_msg=key)
  kinds = {
    "transformer": diffusers.WanTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "text_encoder": transformers.UMT5EncoderModel,
  }
  for name, kind in kinds.items():
    loaded, told = kind.from_pretrained(
      back / name, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    wanted = kind.from_pretrained(first / name, torch_dtype=torch.float32).state_dict()
    for key, value in loaded.state_dict().items():
      assert torch.equal(value, wanted[key]), key


@pytest.mark.parametrize("form", ["torch", "4o6"])
def test_files_of_torch_are_loaded_by_torch(form: str, tmp_path: Path):
  first, ours, back = (tmp_path / name for name in ("first", "ours", "back"))
  randomise(networks()["transformer"], 3).save_pretrained(first / "transformer")
  sources = {name: open_source(path) for name, path in pipeline_sources(first).items()}
  import_job(from_flags(sized(Experiment(), sources)), sources).write(ours)
  if form == "4o6":
    from longlive_jax.convert.jobs import quantise_job

    packed = tmp_path / "packed"
    quantise_job(open_checkpoint(ours), {"quant.weights": "mse"}).write(packed)
    ours = packed
  make_export(open_checkpoint(ours), form).write(back)
  (file,) = back.iterdir()
  tree = torch.load(file, weights_only=True, mmap=True)
  generator = tree["generator"]
  layer = "model.blocks.0.ffn.0"
  if form == "torch":
    stored = load_file(next((first / "transformer").glob("*.safetensors")))
    wanted = torch.from_numpy(stored["blocks.0.ffn.net.0.proj.weight"])
    assert torch.equal(generator[f"{layer}.weight"], wanted)
    return
  assert tree["checkpoint_format"] == "longlive_generator_nvfp4"
  assert tree["quantization"]["weight_scale_rule"] == "mse"
  assert f"{layer}.weight" not in generator
  kinds = {
    name.rpartition("quantized_weight_")[2]: (value.dtype, value.ndim)
    for name, value in generator.items()
    if name.startswith(f"{layer}.quantized")
  }
  assert kinds == {
    "values": (torch.uint8, 2),
    "scale_factors": (torch.float8_e4m3fn, 1),
    "amax": (torch.float32, 1),
    "metadata": (torch.int32, 1),
  }
