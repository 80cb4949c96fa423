"""From an experiment to something that runs: the single place that sees every layer."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from absl import logging
from jax.sharding import Mesh

from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.io.tuned import put_tuned
from longlive_jax.kernels.matmul_choice import use_kernels
from longlive_jax.model.between import OnePass
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.module import Network
from longlive_jax.model.narrow import narrowed
from longlive_jax.model.ops import Ops, attend_with, cudnn_attention, dense_attention
from longlive_jax.model.text import declare_text, frozen_params
from longlive_jax.model.tokenizer import load_tokenizer
from longlive_jax.model.vae import declare_vae
from longlive_jax.parallel.mesh import sampling_mesh
from longlive_jax.parallel.parked import in_pieces, parked
from longlive_jax.parallel.rules import RULES, WHOLE, Rule, shardings_of
from longlive_jax.parallel.share import AS_THEY_ARE, Travel, shared_ops
from longlive_jax.quant.fp8 import from_bytes, to_bytes
from longlive_jax.quant.fp8_attention import fp8_attention
from longlive_jax.quant.joint import unrolled_params
from longlive_jax.quant.policy import quantise_params, quantised_ops
from longlive_jax.sample.sampler import Models, Sampler
from longlive_jax.types import PyTree
from longlive_jax.weights import find_adapters, find_checkpoint, load_networks, with_adapters


def enable_compile_cache(experiment: Experiment) -> None:
  """Keeps compiled executables in `io.compile_cache`, so that the next start compiles nothing.

  It is a setting of the whole process, for programs to make before anything is compiled.
  """
  folder = experiment.io.compile_cache
  if not folder:
    return
  try:
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # or JAX would warn at every program
      pass
  except OSError as error:
    logging.warning("nothing is cached: io.compile_cache='%s': %s", folder, error.strerror)
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _use_tuned() -> None:
  """Puts what XLA has timed before into the compilation cache, for a GPU."""
  folder = jax.config.jax_compilation_cache_dir
  if not folder or jax.default_backend() != "gpu":
    return
  try:
    logging.info("%d choices of algorithms that were timed before", put_tuned(folder))
  except OSError as error:
    logging.warning("what was timed before is not used: %s", error)


def choose_ops(experiment: Experiment) -> Ops:
  """Attention by capability: cuDNN for half precision on a GPU, plain `jnp` elsewhere.

  Raises:
    ValueError: `model.attention` asks for what this device or dtype cannot do.
  """
  wanted, dtype = experiment.model.attention, experiment.model.dtype
  able = jax.default_backend() == "gpu" and dtype != "float32"
  if not able and (wanted == "cudnn" or (wanted == "fp8" and jax.default_backend() == "gpu")):
    raise ValueError(
      f"model.attention={wanted} needs a GPU and model.dtype=bfloat16; found"
      f" {jax.default_backend()} and {dtype}; use auto or jnp"
    )
  chosen = wanted if wanted != "auto" else "cudnn" if able else "jnp"
  logging.info("attention: %s", chosen)
  dense = {"cudnn": cudnn_attention, "fp8": fp8_attention}.get(chosen, dense_attention)
  return Ops(attend=attend_with(dense), dense=dense)


def sampling_ops(experiment: Experiment, local: bool = False) -> Ops:
  """`choose_ops`, with kernels between products where `quant.kernels` allows; no gradients.

  Args:
    experiment: `quant.kernels`, `model.dtype`.
    local: the operations see what one of several devices has, inside `shard_map`.

  Raises:
    ValueError: as `choose_ops` and `use_kernels`.
  """
  ops = choose_ops(experiment)
  if experiment.model.dtype != "bfloat16" or not use_kernels(experiment.quant.kernels, local):
    return ops
  return dataclasses.replace(ops, between=OnePass())


def travel_of(experiment: Experiment) -> Travel:
  """How devices that share a block exchange its queries, keys and values."""
  return Travel(to_bytes, from_bytes) if experiment.parallel.exchange == "fp8" else AS_THEY_ARE


def unrolls(experiment: Experiment) -> bool:
  """Whether the sampler's transformer has separate layers, see `sample.unroll_layers`.

  "auto": on a GPU, unless weights are in NVFP4: they are small to copy, and compile slowly.
  """
  setting, slow = experiment.sample.unroll_layers, experiment.quant.linears == "nvfp4"
  return setting == "on" or (setting == "auto" and not slow and jax.default_backend() == "gpu")


def declare_networks(experiment: Experiment) -> dict[str, Network]:
  """The three networks of an experiment: "dit", "vae", "text"."""
  model, vae = experiment.model, experiment.model.vae
  form = None if vae.convolution == "auto" else vae.convolution
  return {
    "dit": declare_dit(model),
    "vae": declare_vae(vae, dtype=vae.dtype, form=form),
    "text": declare_text(model.text),
  }


def fresh_params(
  experiment: Experiment,
  networks: dict[str, Network],
  mesh: Mesh | None = None,
  rules: Mapping[str, Sequence[Rule]] = RULES,
  *,
  narrow: bool = False,
) -> dict[str, PyTree]:
  """Freshly drawn parameters of networks, from `train.seed`, placed on a mesh by `rules`.

  Args as for `build_models`.
  """
  model, seed, text = experiment.model, experiment.train.seed, experiment.model.text
  places = {n: shardings_of(net.abstract, rules[n], mesh) for n, net in networks.items() if mesh}

  def as_used(name: str, tree: PyTree) -> PyTree:
    return narrowed({name: tree}, model)[name] if narrow else tree

  params = {
    name: network.init(seed, places.get(name), functools.partial(as_used, name))
    for name, network in networks.items()
  }
  if "text" in networks and text.frozen_seed >= 0:
    frozen = as_used("text", frozen_params(networks["text"], text))
    params["text"] = jax.device_put(frozen, places["text"]) if mesh else frozen
  return params


def build_models(
  experiment: Experiment,
  mesh: Mesh | None = None,
  *,
  narrow: bool = False,
  shared: bool = False,
  plain: bool = False,
  park: Callable[[PyTree], PyTree] = parked,
  choose: Callable[[Experiment], Ops] = choose_ops,
) -> Models:
  """Networks with parameters from `io.checkpoint`, or fresh ones when it is empty.

  Args:
    experiment: checked experiment.
    mesh: over which the parameters are split.
    narrow: matrices in the dtypes that they are used in, for sampling; else all is float32, but for
      a frozen text encoder on the mesh of a training run.
    shared: the mesh is of a sampler whose devices share each block: parameters are whole on all,
      and the operations are those of `shared_ops`.
    plain: the operations quantise nothing, whatever `quant` says.
    park: what moves the text encoder to host memory where `model.text.parked`.
    choose: what makes the operations of one device; `sampling_ops` for sampling.

  Raises:
    FileNotFoundError: no such checkpoint or tokenizer.
    ValueError: its tensors do not fit the experiment, or are not finite.
  """
  networks, rules = declare_networks(experiment), WHOLE if shared else RULES
  ops = choose(experiment)
  ops = shared_ops(ops, mesh, travel_of(experiment)) if mesh and shared else ops
  ops = ops if plain else quantised_ops(ops, experiment.quant, networks["dit"].abstract)
  tokenizer = load_tokenizer(experiment.model.text)
  make = functools.partial(_params, experiment, mesh=mesh, rules=rules, narrow=narrow)
  params = make({"text": networks["text"]})
  if mesh and not narrow:  # a frozen encoder takes no more room than it is used with
    dtype = experiment.model.text.dtype
    cast = jax.jit(lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree), donate_argnums=0)
    params["text"] = cast(params["text"])
  if experiment.model.text.parked:  # before there is anything else in memory
    params["text"] = park(params["text"])
  params |= make({name: networks[name] for name in ("dit", "vae")})
  return Models(
    experiment=experiment,
    dit=networks["dit"],
    vae=networks["vae"],
    text=networks["text"],
    params=params,
    tokenizer=tokenizer,
    ops=ops,
  )


def _params(
  experiment: Experiment,
  networks: dict[str, Network],
  *,
  mesh: Mesh | None,
  rules: Mapping[str, Sequence[Rule]],
  narrow: bool,
) -> dict[str, PyTree]:
  """Parameters of some networks, of `io.checkpoint` or fresh."""
  if not experiment.io.checkpoint:
    return fresh_params(experiment, networks, mesh, rules, narrow=narrow)
  folder = find_checkpoint(experiment.io.checkpoint)
  return load_networks(experiment, networks, folder, mesh, narrow=narrow, rules=rules)


def build_vae(experiment: Experiment, mesh: Mesh) -> tuple[Network, PyTree]:
  """The autoencoder alone, its parameters on every device of a mesh; see `build_models`."""
  networks = {"vae": declare_networks(experiment)["vae"]}
  if experiment.io.checkpoint:
    folder = find_checkpoint(experiment.io.checkpoint)
    return networks["vae"], load_networks(experiment, networks, folder, mesh)["vae"]
  places = shardings_of(networks["vae"].abstract, RULES["vae"], mesh)
  return networks["vae"], networks["vae"].init(experiment.train.seed, places)


class Pipeline(Sampler):
  """Scripts in, videos out.

  pipeline = Pipeline.from_config(load_config("configs/tiny.py"))
  video = pipeline.generate(Script.of("top red circle moving left, over snow"))
  """

  @classmethod
  def from_config(cls, experiment: Experiment, *, mesh: Mesh | None = None) -> "Pipeline":
    """Builds the networks of a checked experiment, loads `io.checkpoint`, merges `io.adapters`.

    Matrices are loaded in the dtype in which their network multiplies (`model.dtype` for the
    transformer); those of the transformer are then quantised if `quant.linears` says so.

    Args:
      experiment: checked experiment.
      mesh: over which weights are split, from `make_mesh`; every device works on all of a video.
        Default: `parallel.seq` devices share each block, and have all weights; the other settings
        of `parallel` are of training alone.

    Raises:
      FileNotFoundError: no such checkpoint, or it lacks a network.
      ValueError: the weights contradict the experiment, `parallel.seq` cannot be, or adapters do
        not fit.
    """
    _use_tuned()
    shared = mesh is None and experiment.parallel.seq > 1
    mesh, adapters = sampling_mesh(experiment) if shared else mesh, find_adapters(experiment)
    choose = functools.partial(sampling_ops, local=shared)
    models = build_models(
      experiment, mesh, narrow=True, shared=shared, park=in_pieces, choose=choose
    )
    dit, network = with_adapters(adapters, models.dit, models.params["dit"], mesh), models.dit
    dit = quantise_params(dit, experiment.quant)
    if unrolls(experiment):
      dit, network = unrolled_params(dit, models.ops), declare_dit(experiment.model, unrolled=True)
    return cls(dataclasses.replace(models, dit=network, params={**models.params, "dit": dit}))

  @classmethod
  def from_checkpoint(
    cls, folder: str | Path, *, dtype: str = "", seq: int = 1, mesh: Mesh | None = None
  ) -> "Pipeline":
    """Loads weights together with the configuration that was saved beside them.

    Args:
      folder: a checkpoint, or the name of weights that ship.
      dtype: `model.dtype` to use instead of the saved one, "bfloat16" or "float32", whatever dtype
        is stored.
      seq: `parallel.seq` to use, whatever the weights were trained with.
      mesh: as for `from_config`; any, whatever mesh the weights were saved on.

    Raises:
      FileNotFoundError: no such checkpoint, or it lacks a network.
      ValueError: its parts contradict each other.
    """
    overrides = {"parallel.seq": seq} | ({"model.dtype": dtype} if dtype else {})
    experiment = load_config(find_checkpoint(str(folder)) / "config.json", overrides)
    return cls.from_config(experiment, mesh=mesh)
