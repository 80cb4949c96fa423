"""Our networks against Diffusers and transformers: same tensors, same outputs.

Tiny networks with random numbers everywhere are made by the libraries from our configuration files,
saved as they save them, and imported by the tables of keys. Needs the extra `parity`.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from longlive_jax.config import Model, Text, Vae
from longlive_jax.convert import diffusers_config as files
from longlive_jax.convert.keys_dit import dit_rows
from longlive_jax.convert.keys_text import TWINS, text_rows
from longlive_jax.convert.keys_vae import vae_rows
from longlive_jax.convert.torch_import import check_foreign, import_params, leaf_at
from longlive_jax.model.attention import Full
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.module import Network
from longlive_jax.model.rope import video_rope
from longlive_jax.model.text import declare_text
from longlive_jax.model.vae import declare_vae
from longlive_jax.types import PyTree

WHY = "needs the extra 'parity': pip install -e .[parity]"
torch = pytest.importorskip("torch", reason=WHY)
diffusers = pytest.importorskip("diffusers", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

TOLERANCE = 1e-4  # largest error, relative to the largest number of the output
DIT = Model(
  width=96,
  ffn_width=160,
  heads=3,
  layers=3,
  frequency_width=64,
  dtype="float32",
  text=Text(width=40, length=12),
  vae=Vae(latent_channels=8),
)
VAE = Vae(encoder_width=16, decoder_width=24, latent_channels=6)
TEXT = Text(
  vocabulary=90, width=32, attention_width=48, ffn_width=80, heads=6, layers=3, length=160
)
RNG = np.random.default_rng(0)
MEAN, STD = RNG.normal(size=VAE.latent_channels), RNG.uniform(0.5, 2, VAE.latent_channels)


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> None:
  """PyTorch takes all cores otherwise."""
  torch.set_num_threads(2)


def randomise(module: Any, seed: int) -> Any:
  """Draws every parameter, so that none is 0 or 1, with outputs of moderate size."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      shape = tuple(parameter.shape)
      value = rng.normal(size=shape)
      if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
        value = 1 + 0.3 * value
      elif name.endswith("bias") and len(shape) == 1:
        value *= 0.3
      elif name.endswith("scale_shift_table"):
        value *= 0.5
      elif "relative_attention_bias" not in name and "shared" not in name:
        value *= (value.size / shape[0]) ** -0.5
      parameter.copy_(torch.from_numpy(value))
  return module.float().eval()


def saved(module: Any, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """`config.json` and tensors of a folder that the library writes."""
  module.save_pretrained(folder)
  config = json.loads((folder / "config.json").read_text())
  (file,) = folder.glob("*.safetensors")
  return config, load_file(file)


def check_close(ours: Any, theirs: Any) -> None:
  """Fails unless two outputs agree within the tolerance."""
  ours, theirs = np.asarray(ours), theirs.detach().numpy()
  assert ours.shape == theirs.shape and theirs.dtype == np.float32
  error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
  assert error < TOLERANCE, f"relative error {error:.2e}"


def channels_first(x: Any) -> np.ndarray:
  """`[B, F, H, W, C]` as the libraries order it, `[B, C, F, H, W]`."""
  return np.moveaxis(np.asarray(x), -1, 1)


def normals(*shape: int, seed: int = 7) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network, PyTree]:
  """The library's transformer; ours with its parameters."""
  module = diffusers.WanTransformer3DModel.from_config(files.dit_json(DIT))
  config, tensors = saved(randomise(module, 1), tmp_path_factory.mktemp("transformer"))
  assert files.model_from_json(config, DIT) == DIT
  network = declare_dit(DIT)
  return module, network, import_params(dit_rows(DIT, "diffusers"), tensors, network.abstract)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_transformer_gives_the_velocities_of_diffusers(transformer, per_token):
  module, network, params = transformer
  x, prompts = normals(2, 3, 8, 12, 8), normals(2, DIT.text.length, DIT.text.width, seed=8)
  times = np.array([[937.0] * 3, [12.0] * 3], np.float32)
  if per_token:
    times = np.array([[0.0, 500.0, 999.0], [31.25, 31.25, 750.5]], np.float32)
  theirs_at = np.repeat(times, 4 * 6, 1) if per_token else times[:, 0]
  with torch.no_grad():
    theirs = module(
      hidden_states=torch.tensor(channels_first(x)),
      timestep=torch.tensor(theirs_at),
      encoder_hidden_states=torch.tensor(prompts),
    ).sample

  def run(params: PyTree) -> jax.Array:
    model = network.bind(params)
    plan = Full(video_rope(np.arange(3), 4, 6, DIT.head_dim))
    return model(x, times, model.text_kv(prompts), plan)[0]

  check_close(channels_first(jax.jit(run)(params)), theirs)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network, PyTree, dict]:
  """The library's VAE; ours with its parameters and statistics; its configuration file."""
  module = diffusers.AutoencoderKLWan.from_config(files.vae_json(VAE, MEAN, STD))
  randomise(module, 2)
  with torch.no_grad():
    module.decoder.conv_out.weight *= 0.25  # the library clamps to [-1, 1]
    module.decoder.conv_out.bias *= 0.25
  config, tensors = saved(module, tmp_path_factory.mktemp("vae"))
  assert files.vae_from_json(config, VAE) == VAE
  network = declare_vae(VAE)
  params = import_params(vae_rows(VAE, "diffusers"), tensors, network.abstract)
  mean, std = files.latent_statistics(config)
  return module, network, params | {"latent_mean": mean, "latent_std": std}, config


def test_the_vae_encodes_as_diffusers(autoencoder):
  module, network, params, config = autoencoder
  video = np.clip(normals(2, 13, 32, 48, 3), -1, 1)
  with torch.no_grad():
    theirs = module.encode(torch.tensor(channels_first(video))).latent_dist
  mean, log_variance = jax.jit(lambda p: network.bind(p).moments(video))(params)
  check_close(channels_first(mean), theirs.mean)
  check_close(channels_first(log_variance), theirs.logvar)
  latents = jax.jit(lambda p: network.bind(p).encode(video))(params)
  shift, size = (torch.tensor(config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
  check_close(channels_first(latents), (theirs.mean - shift) / size)  # as its pipelines do


def test_the_vae_decodes_as_diffusers(autoencoder):
  module, network, params, config = autoencoder
  latents = normals(2, 4, 2, 3, VAE.latent_channels)
  shift, size = (np.asarray(config[f"latents_{k}"], np.float32) for k in ("mean", "std"))
  raw = latents * size + shift
  with torch.no_grad():
    theirs = module.decode(torch.tensor(channels_first(raw))).sample
  assert 0.3 < theirs.abs().max() < 1
  check_close(channels_first(jax.jit(lambda p: network.bind(p).decode(latents))(params)), theirs)
  check_close(channels_first(jax.jit(lambda p: network.bind(p).decode_raw(raw))(params)), theirs)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Network, PyTree]:
  """The library's text encoder; ours with its parameters."""
  module = transformers.UMT5EncoderModel(transformers.UMT5Config(**files.text_json(TEXT)))
  config, tensors = saved(randomise(module, 3), tmp_path_factory.mktemp("text"))
  assert files.text_from_json(config, TEXT) == TEXT
  network = declare_text(TEXT)
  return module, network, import_params(text_rows(TEXT, "diffusers"), tensors, network.abstract)


@pytest.mark.parametrize("masked", [False, True])
def test_the_text_encoder_gives_the_embeddings_of_transformers(encoder, masked):
  module, network, params = encoder
  ids = np.random.default_rng(9).integers(TEXT.vocabulary, size=(2, TEXT.length)).astype(np.int32)
  mask = np.arange(TEXT.length)[None] < np.array([[TEXT.length], [11]]) if masked else None
  with torch.no_grad():
    theirs = module(
      torch.tensor(ids), None if mask is None else torch.tensor(mask.astype(np.int32))
    )
  run = jax.jit(lambda p: network.bind(p)(ids, mask, zero_padding=False))
  check_close(run(params), theirs.last_hidden_state)


def test_a_pipeline_folder_with_our_files_is_loaded_by_diffusers(
  tmp_path, transformer, autoencoder, encoder
):
  autoencoder[0].save_pretrained(tmp_path / "vae")
  encoder[0].save_pretrained(tmp_path / "text_encoder")
  for name, data in (
    ("model_index.json", files.pipeline_json()),
    ("vae/config.json", files.vae_json(VAE, MEAN, STD)),
    ("text_encoder/config.json", files.text_json(TEXT)),
  ):
    (tmp_path / name).write_text(json.dumps(data))
  given = {"tokenizer": None, "scheduler": diffusers.UniPCMultistepScheduler()}
  # the library reads this network from files only with a further package, accelerate
  pipe = diffusers.WanPipeline.from_pretrained(tmp_path, transformer=transformer[0], **given)
  assert pipe.config.expand_timesteps and pipe.vae_scale_factor_spatial == 16
  for part, saved_by in ((pipe.vae, autoencoder[0]), (pipe.text_encoder, encoder[0])):
    theirs = saved_by.state_dict()
    assert part.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in part.state_dict().items())


def library_module(library: ModuleType, name: str, config: dict[str, Any]) -> Any:
  """A module without numbers."""
  with torch.device("meta"):
    if library is transformers:
      return transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    return getattr(diffusers, name).from_config(config)


LIGHT = Vae(encoder_width=80, decoder_width=128)
FULL = {
  "dit": (declare_dit, dit_rows, Model(), files.dit_json, diffusers),
  "text": (declare_text, text_rows, Text(), files.text_json, transformers),
  "vae": (declare_vae, vae_rows, Vae(), files.vae_json, diffusers),
  "light_vae": (declare_vae, vae_rows, LIGHT, files.vae_json, diffusers),
}


@pytest.mark.parametrize("name", FULL)
def test_keys_and_shapes_of_the_released_sizes_are_those_of_the_libraries(name):
  declare, table, cfg, to_json, library = FULL[name]
  config, abstract = to_json(cfg), declare(cfg).abstract
  module = library_module(library, config.get("_class_name", ""), config)
  theirs = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
  for twin, key in TWINS.items() if library is transformers else ():
    assert theirs.pop(twin) == theirs[key]
  rows = table(cfg, "diffusers")
  assert {row.key for row in rows} == theirs.keys()
  for row in rows:
    wanted = leaf_at(abstract, row.path).shape
    tensor = np.broadcast_to(np.float32(0), theirs[row.key])
    check_foreign(row, tensor, wanted if row.layer is None else wanted[1:])
