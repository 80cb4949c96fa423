"""From an experiment to something that runs: the single place that sees every layer."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging

from longlive_jax.config import Experiment
from longlive_jax.config.load import from_json
from longlive_jax.io.checkpoint import load_params, read_config
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.module import Network
from longlive_jax.model.ops import Ops, attend_with, cudnn_attention, dense_attention
from longlive_jax.model.text import declare_text, frozen_params
from longlive_jax.model.tokenizer import load_tokenizer
from longlive_jax.model.vae import declare_vae
from longlive_jax.sample.sampler import Models, Sampler
from longlive_jax.types import PyTree

ASSETS = Path(__file__).parent / "assets"


def choose_ops(experiment: Experiment) -> Ops:
  """Attention by capability: cuDNN for half precision on a GPU, plain `jnp` elsewhere.

  Raises:
    ValueError: `model.attention` asks for what this device or dtype cannot do.
  """
  wanted, dtype = experiment.model.attention, experiment.model.dtype
  able = jax.default_backend() == "gpu" and dtype != "float32"
  if wanted == "cudnn" and not able:
    raise ValueError(
      f"model.attention=cudnn needs a GPU and model.dtype=bfloat16; found"
      f" {jax.default_backend()} and {dtype}; use auto or jnp"
    )
  chosen = wanted if wanted != "auto" else "cudnn" if able else "jnp"
  logging.info("attention: %s", chosen)
  return Ops(attend=attend_with(cudnn_attention if chosen == "cudnn" else dense_attention))


def declare_networks(experiment: Experiment) -> dict[str, Network]:
  """The three networks of an experiment: "dit", "vae", "text"."""
  model = experiment.model
  return {
    "dit": declare_dit(model),
    "vae": declare_vae(model.vae),
    "text": declare_text(model.text),
  }


def find_checkpoint(name: str) -> Path:
  """The folder of a checkpoint: a path, or the name of a set of weights that ships.

  Raises:
    FileNotFoundError: there is no such folder.
  """
  for folder in (Path(name), ASSETS / name):
    if (folder / "config.json").is_file():
      return folder
  shipped = sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").is_file())
  raise FileNotFoundError(
    f"io.checkpoint={name!r} is neither a checkpoint folder nor one of the shipped"
    f" weights: {', '.join(shipped) or 'none'}"
  )


def fresh_params(experiment: Experiment, networks: dict[str, Network]) -> dict[str, PyTree]:
  """Freshly drawn parameters of all networks, from `train.seed`."""
  text = experiment.model.text
  params = {name: networks[name].init(experiment.train.seed) for name in ("dit", "vae")}
  frozen = text.frozen_seed >= 0
  params["text"] = (
    frozen_params(networks["text"], text)
    if frozen
    else networks["text"].init(experiment.train.seed)
  )
  return params


def cast_params(params: PyTree, dtype: str) -> PyTree:
  """Casts the weights of matrix products; vectors (norms, biases, tables) stay float32."""
  return jax.tree.map(lambda a: a.astype(dtype) if a.ndim >= 2 else a, params)


def build_models(experiment: Experiment) -> Models:
  """Networks with parameters from `io.checkpoint`, or fresh ones when it is empty.

  Raises:
    FileNotFoundError: no such checkpoint.
    ValueError: its tensors do not fit the experiment, or are not finite.
  """
  networks = declare_networks(experiment)
  if experiment.io.checkpoint:
    folder = find_checkpoint(experiment.io.checkpoint)
    abstract = {
      name: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), net.abstract)
      for name, net in networks.items()
    }
    params = load_params(folder, abstract)
  else:
    params = fresh_params(experiment, networks)
  return Models(
    experiment=experiment,
    dit=networks["dit"],
    vae=networks["vae"],
    text=networks["text"],
    params=params,
    tokenizer=load_tokenizer(experiment.model.text),
    ops=choose_ops(experiment),
  )


class Pipeline(Sampler):
  """Scripts in, videos out.

  pipeline = Pipeline.from_config(load_config("configs/tiny.py"))
  video = pipeline.generate(Script.of("top red circle moving left, over snow"))
  """

  @classmethod
  def from_config(cls, experiment: Experiment) -> "Pipeline":
    """Builds the networks of a checked experiment and loads `io.checkpoint`."""
    models = build_models(experiment)
    cast = {"dit": cast_params(models.params["dit"], experiment.model.dtype)}
    return cls(dataclasses.replace(models, params={**models.params, **cast}))

  @classmethod
  def from_checkpoint(cls, folder: str | Path) -> "Pipeline":
    """Loads weights together with the configuration that was saved beside them."""
    path = find_checkpoint(str(folder))
    experiment = from_json(json.dumps(read_config(path)))
    experiment.io.checkpoint = str(path)
    experiment.seal()
    return cls.from_config(experiment)
