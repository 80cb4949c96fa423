"""From an experiment to networks with parameters: what is loaded, cast, chosen and refused."""

import errno
import json
import logging
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax import build, weights
from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config, to_json
from longlive_jax.io.checkpoint import save_params
from longlive_jax.io.leaves import flat
from longlive_jax.model.attention import BlockCausal, block_borders
from longlive_jax.model.between import OnePass
from longlive_jax.model.dit import cast_params
from longlive_jax.model.narrow import narrowed
from longlive_jax.model.rope import video_rope
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.quant.fp8_rows import Fp8OnePass
from longlive_jax.quant.policy import quantise_params
from longlive_jax.types import PyTree
from tests.launch.tiny import OVERRIDES


def tiny(root: Path, **overrides: object) -> Experiment:
  dotted = {name.replace("__", "."): value for name, value in overrides.items()}
  base = {**OVERRIDES, "io.checkpoint": ""}
  return load_config(root / "configs/tiny.py", {**base, **dotted})


@pytest.fixture(scope="module")
def experiment(root) -> Experiment:
  return tiny(root)


@pytest.fixture(scope="module")
def params(experiment) -> dict[str, PyTree]:
  """Fresh weights, none of them zero."""
  fresh = build.fresh_params(experiment, build.declare_networks(experiment))
  leaves, structure = jax.tree.flatten(fresh)
  rng = np.random.default_rng(0)
  noisy = [x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for x in leaves]
  return jax.tree.unflatten(structure, noisy)


def save(folder: Path, params: dict[str, PyTree], experiment: Experiment) -> Path:
  save_params(folder, params, json.loads(to_json(experiment)), {})
  return folder


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_float32_arrays_of_jax_whatever_is_stored(
  root, tmp_path, experiment, params, dtype
):
  """Arrays of numpy cannot be indexed by traced ids, as the text encoder does."""
  stored = jax.tree.map(lambda a: a.astype(dtype), params)
  folder = save(tmp_path / "a", stored, experiment)
  models = build.build_models(tiny(root, io__checkpoint=str(folder)))
  for name, leaf in flat(models.params).items():
    assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32, name
  ids, mask = models.tokenizer(["one red circle"])
  encode = jax.jit(lambda ids, mask: models.text.bind(models.params["text"])(ids, mask))
  assert np.isfinite(encode(ids, mask)).all()
  for a, b in zip(jax.tree.leaves(models.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, np.asarray(b).astype(dtype).astype(np.float32))


def test_fresh_weights_follow_the_seed(root, experiment):
  networks = build.declare_networks(experiment)
  other = build.fresh_params(tiny(root, train__seed=1), networks)
  for name, same in (("dit", False), ("vae", False), ("text", True)):  # the encoder is frozen
    a = jax.tree.leaves(build.fresh_params(experiment, networks)[name])
    b = jax.tree.leaves(other[name])
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) == same, name


def test_casting_ahead_changes_no_bit(root, params):
  """What is multiplied in bfloat16 is cast before or at its product; the rest must stay."""
  network = build.declare_networks(tiny(root, model__dtype="bfloat16"))["dit"]
  cast = cast_params(params["dit"], "bfloat16")
  rng = np.random.default_rng(1)
  latents = jnp.asarray(rng.standard_normal((1, 4, 2, 2, 4)), jnp.float32)
  prompts = jnp.asarray(rng.standard_normal((1, 5, 16)), jnp.float32)
  timesteps = jnp.asarray([[0.0, 0.0, 731.3, 731.3]])
  plan = BlockCausal(video_rope(np.arange(4), 1, 1, 12), block_borders(4, 2, 1))

  @jax.jit
  def velocity(params: PyTree) -> jax.Array:
    model = network.bind(params)
    return model(latents, timesteps, model.text_kv(prompts), plan)[0]

  whole, narrow = np.asarray(velocity(params["dit"])), np.asarray(velocity(cast))
  np.testing.assert_array_equal(whole, narrow)
  assert np.std(whole) > 0.01
  half = sum(a.nbytes for a in jax.tree.leaves(cast))
  assert half < 0.65 * sum(a.nbytes for a in jax.tree.leaves(params["dit"]))


def test_norms_biases_and_times_stay_float32(params):
  dtypes = {n: leaf.dtype for n, leaf in flat(cast_params(params["dit"], "bfloat16")).items()}
  kept = [n for n, dtype in dtypes.items() if dtype == np.float32]
  assert {"layers/self_attn/norm_q/scale", "layers/modulation", "layers/ffn/up/bias"} <= set(kept)
  assert "time_embed/up/kernel" in kept and "time_proj/kernel" in kept
  assert dtypes["layers/ffn/up/kernel"] == dtypes["head/proj/kernel"] == ml_dtypes.bfloat16


def test_a_pipeline_from_a_checkpoint_brings_its_configuration(root, tmp_path, params):
  experiment = tiny(root, sample__steps=3, train__steps=17)
  folder = save(tmp_path / "a", params, experiment)
  pipeline = build.Pipeline.from_checkpoint(folder)
  assert pipeline.experiment == tiny(
    root, sample__steps=3, train__steps=17, io__checkpoint=str(folder)
  )
  with pytest.raises(AttributeError, match="sealed"):
    pipeline.experiment.sample.steps = 4


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("{", r"config.json': the configuration is not JSON"),
    ('{"model": {"widht": 3}}', r"unknown setting 'model.widht' \(did you mean 'width'\?\)"),
    ('{"model": {"width": 25}}', "model.width=25 must be"),
  ],
)
def test_a_checkpoint_with_a_wrong_configuration(tmp_path, experiment, text, line):
  folder = save(tmp_path / "a", {}, experiment)
  (folder / "config.json").write_text(text)
  with pytest.raises(ValueError, match=line):
    build.Pipeline.from_checkpoint(folder)


def test_checkpoints_are_found_by_path_and_by_name(tmp_path, monkeypatch, experiment):
  monkeypatch.setattr(weights, "ASSETS", tmp_path / "assets")
  line = "io.checkpoint='b' is neither a checkpoint folder nor one of the shipped weights: none"
  with pytest.raises(FileNotFoundError, match=line):
    weights.find_checkpoint("b")
  shipped = save(tmp_path / "assets" / "b", {}, experiment)
  assert weights.find_checkpoint("b") == shipped
  assert weights.find_checkpoint(str(save(tmp_path / "c", {}, experiment))) == tmp_path / "c"
  with pytest.raises(FileNotFoundError, match="shipped weights: b$"):
    weights.find_checkpoint("d")


def test_weights_of_other_sizes_name_the_settings(root, tmp_path, experiment, params):
  folder = save(tmp_path / "a", params, experiment)
  wanted = {"model__layers": 3, "model__text__width": 8, "io__checkpoint": str(folder)}
  with pytest.raises(ValueError, match=r"model.layers=2 there, 3 here") as caught:
    build.build_models(tiny(root, **wanted))
  assert "model.text.width=16 there, 8 here" in str(caught.value)
  assert "model.shift" not in str(caught.value) and "\n" not in str(caught.value)


def test_attention_by_capability(root, monkeypatch, caplog):
  with pytest.raises(ValueError, match="model.attention=cudnn needs a GPU .* found cpu"):
    build.choose_ops(tiny(root, model__attention="cudnn"))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with pytest.raises(ValueError, match="found gpu and float32; use auto or jnp"):
    build.choose_ops(tiny(root, model__attention="cudnn"))
  chosen = {}
  for dtype in ("float32", "bfloat16"):
    with caplog.at_level(logging.INFO, "absl"):
      caplog.clear()
      build.choose_ops(tiny(root, model__dtype=dtype))
      chosen[dtype] = caplog.messages
  assert chosen == {"float32": ["attention: jnp"], "bfloat16": ["attention: cudnn"]}


def test_kernels_between_products_are_for_sampling_alone(root, monkeypatch):
  on = {"model__dtype": "bfloat16", "quant__kernels": "on"}
  with pytest.raises(ValueError, match="quant.kernels=on needs a GPU of compute capability 9"):
    build.sampling_ops(tiny(root, **on))
  monkeypatch.setattr(build, "use_kernels", lambda setting, local: setting != "off")
  assert isinstance(build.sampling_ops(tiny(root, **on)).between, OnePass)
  assert isinstance(build.sampling_ops(tiny(root, model__dtype="bfloat16")).between, OnePass)
  for plain in (on | {"quant__kernels": "off"}, on | {"model__dtype": "float32"}):
    assert build.sampling_ops(tiny(root, **plain)).between is None
  assert build.build_models(tiny(root, **on)).ops.between is None  # as training does
  models = build.build_models(tiny(root, **on, quant__linears="fp8"), choose=build.sampling_ops)
  assert isinstance(models.ops.between, Fp8OnePass)
  assert models.ops.between.quantises(("layers/ffn/up", "layers/ffn/down"))


def test_the_compile_cache_is_where_the_setting_says(root, tmp_path, monkeypatch, caplog):
  asked: dict[str, object] = {}
  monkeypatch.setattr(jax.config, "update", asked.__setitem__)
  build.enable_compile_cache(tiny(root))
  assert not asked
  (tmp_path / "file").write_text("")
  build.enable_compile_cache(tiny(root, io__compile_cache=str(tmp_path / "file" / "x")))
  assert not asked and "nothing is cached: io.compile_cache=" in caplog.text
  build.enable_compile_cache(tiny(root, io__compile_cache=str(tmp_path / "cache")))
  assert asked["jax_compilation_cache_dir"] == str(tmp_path / "cache")
  assert (tmp_path / "cache").is_dir()


def test_a_cache_that_cannot_be_written_is_one_warning(root, tmp_path, monkeypatch, caplog):
  def refuse(**_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")

  asked: dict[str, object] = {}
  monkeypatch.setattr(jax.config, "update", asked.__setitem__)
  monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  build.enable_compile_cache(tiny(root, io__compile_cache=str(tmp_path)))
  assert not asked
  line = f"nothing is cached: io.compile_cache='{tmp_path}': Read-only file system"
  assert caplog.messages == [line]


def test_narrow_text_and_video_networks_give_the_same_bits(root, params):
  """Their matrices are converted to the dtype of the activations wherever they are used."""
  settings = {"model__text__dtype": "bfloat16", "model__vae__dtype": "bfloat16"}
  experiment = tiny(root, **settings)
  networks, narrow = build.declare_networks(experiment), narrowed(params, experiment.model)
  assert narrow["text"]["embedding"].dtype == narrow["vae"]["encoder"]["conv_in"]["kernel"].dtype
  assert narrow["text"]["embedding"].dtype == jnp.bfloat16
  ids, mask = jnp.arange(12)[None] % 5, jnp.ones((1, 12), jnp.int32)
  video = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (1, 5, 32, 32, 3)), jnp.float32)

  @jax.jit
  def run(params: dict[str, PyTree]) -> tuple[jax.Array, jax.Array]:
    vae = networks["vae"].bind(params["vae"])
    latents = vae.encode(video)
    text = networks["text"].bind(params["text"])(ids, mask, dtype="bfloat16")
    return text, latents, vae.decode(latents)

  for wide, half in zip(run(params), run(narrow), strict=True):
    np.testing.assert_array_equal(np.asarray(wide), np.asarray(half))
    assert np.std(np.asarray(wide, np.float32)) > 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_is_restored_onto_any_mesh_and_dtype(root, tmp_path, params, packed):
  settings = {"model__width": 48, "model__ffn_width": 64}
  settings |= {"quant__linears": "nvfp4"} if packed else {}
  experiment = tiny(root, **settings)
  fresh = build.fresh_params(experiment, build.declare_networks(experiment))
  stored = {**fresh, "dit": quantise_params(fresh["dit"], experiment.quant)}
  folder = tmp_path / "a"
  about = {"dtype": "nvfp4" if packed else "float32"}
  save_params(folder, stored, json.loads(to_json(experiment)), about)
  alone = build.Pipeline.from_checkpoint(folder).models.params
  mesh = make_mesh(1, fsdp=1, seq=4, devices=jax.devices()[:4])
  spread = build.Pipeline.from_checkpoint(folder, mesh=mesh).models.params
  shared = flat(build.Pipeline.from_checkpoint(folder, seq=2).models.params)
  for name, a in flat(alone).items():
    b = flat(spread)[name]
    assert b.dtype == a.dtype and len(b.sharding.device_set) == 4, name
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
    whole = shared[name]
    assert whole.sharding.is_fully_replicated and len(whole.devices()) == 2, name
    np.testing.assert_array_equal(np.asarray(a), np.asarray(whole), err_msg=name)
  kernel = spread["dit"]["layers"]["ffn"]["up"]["kernel"]
  held = kernel.codes if packed else kernel
  assert held.addressable_shards[0].data.nbytes * 4 == held.nbytes
  if not packed:
    half = build.Pipeline.from_checkpoint(folder, dtype="bfloat16", mesh=mesh).models.params
    kernel = half["dit"]["layers"]["ffn"]["up"]["kernel"]
    expected = alone["dit"]["layers"]["ffn"]["up"]["kernel"].astype(jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(kernel), np.asarray(expected))
