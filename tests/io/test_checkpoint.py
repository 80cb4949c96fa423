"""Checkpoints of weights and of training states."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.io.checkpoint import (
  TrainCheckpointer,
  load_params,
  read_config,
  read_metadata,
  save_params,
)
from longlive_jax.io.leaves import disk_groups, disk_places, flat, nested
from longlive_jax.io.left_behind import without_closed_loops


def weights(layers: int = 3) -> dict:
  rng = np.random.default_rng(0)
  ffn = rng.normal(size=(layers, 4, 8)).astype(np.float32)
  return {
    "dit": {
      "embed": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)},
      "layers": {"ffn": {"up": jnp.asarray(ffn)}, "scale": jnp.arange(layers * 2.0).reshape(-1, 2)},
    },
    "vae": {"stages": {0: {"w": jnp.ones((2, 2), jnp.bfloat16)}, 1: {"w": jnp.zeros(())}}},
  }


def shapes(tree, dtype=None):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype), tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("group_bytes", [1, 100, 2**30])
def test_round_trip(tmp_path, group_bytes):
  trees = weights()
  config, metadata = {"name": "tiny"}, {"steps": 3}
  save_params(tmp_path / "a", trees, config, metadata, group_bytes=group_bytes)
  assert_same(load_params(tmp_path / "a", shapes(trees)), trees)
  assert (read_config(tmp_path / "a"), read_metadata(tmp_path / "a")) == (config, metadata)
  assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_one_leaf_a_layer_on_disk():
  leaves = {name: leaf for g in disk_groups(weights()["dit"], 1) for name, leaf in g.items()}
  assert set(leaves) == {
    "embed/kernel",
    *(f"layers/{i}/ffn/up" for i in range(3)),
    *(f"layers/{i}/scale" for i in range(3)),
  }
  assert leaves["layers/1/ffn/up"].shape == (4, 8)


def test_layers_that_are_not_stacked_stay_as_they_are():
  assert disk_places("decoder/layers/0/w", (3, 2)) == [("decoder/layers/0/w", ...)]
  assert disk_places("layers", (3, 2)) == [("layers", ...)]
  assert disk_places("a/layers/w", (2, 5)) == [("a/layers/0/w", 0), ("a/layers/1/w", 1)]
  assert nested(flat({"a": {"0": 1, "b": {"c": 2}}})) == {"a": {"0": 1, "b": {"c": 2}}}


def test_stored_numbers_are_converted(tmp_path):
  trees = weights()
  save_params(tmp_path / "a", trees, {}, {})
  half = load_params(tmp_path / "a", shapes(trees, jnp.bfloat16))
  up = half["dit"]["layers"]["ffn"]["up"]
  assert up.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(up), np.asarray(trees["dit"]["layers"]["ffn"]["up"]).astype(ml_dtypes.bfloat16)
  )
  wide = load_params(tmp_path / "a", shapes(trees, jnp.float32))
  assert wide["vae"]["stages"][0]["w"].dtype == jnp.float32


def test_a_network_alone(tmp_path):
  trees = weights()
  save_params(tmp_path / "a", trees, {}, {})
  assert_same(load_params(tmp_path / "a", {"vae": shapes(trees["vae"])}), {"vae": trees["vae"]})


def test_shardings_are_followed(tmp_path):
  trees = weights()
  save_params(tmp_path / "a", trees, {}, {})
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("fsdp",))
  sharding = NamedSharding(mesh, P(None, "fsdp"))
  abstract = shapes(trees)
  abstract["dit"]["layers"]["ffn"]["up"] = jax.ShapeDtypeStruct(
    (3, 4, 8), jnp.float32, sharding=sharding
  )
  up = load_params(tmp_path / "a", abstract)["dit"]["layers"]["ffn"]["up"]
  assert up.sharding == sharding
  np.testing.assert_array_equal(np.asarray(up), np.asarray(trees["dit"]["layers"]["ffn"]["up"]))


def change(tree: dict, name: str, leaf) -> dict:
  leaves = flat(tree)
  leaves.pop(name, None)
  return nested(leaves | ({name: leaf} if leaf is not None else {}))


@pytest.mark.parametrize(
  ("name", "leaf", "line"),
  [
    ("embed/kernle", jnp.ones(2), r"lacks 'dit/embed/kernle' \(did you mean 'embed/kernel'\?\)"),
    ("embed/kernel", None, "has 'dit/embed/kernel', which the configuration has not"),
    (
      "layers/ffn/up",
      jnp.ones((3, 4, 9)),
      r"'dit/layers/0/ffn/up' has shape \(4, 8\) in the checkpoint but \(4, 9\)",
    ),
    ("layers/ffn/up", jnp.ones((4, 4, 8)), "lacks 'dit/layers/3/ffn/up'"),
    ("layers/ffn/up", jnp.ones((2, 4, 8)), "has 'dit/layers/2/ffn/up'"),
  ],
)
def test_a_checkpoint_that_does_not_fit_names_the_leaf(tmp_path, name, leaf, line):
  tree = weights()["dit"]
  save_params(tmp_path / "a", {"dit": tree}, {}, {})
  with pytest.raises(ValueError, match=line) as caught:
    load_params(tmp_path / "a", {"dit": shapes(change(tree, name, leaf))})
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
  tree = weights()["dit"]
  tree["layers"]["ffn"]["up"] = tree["layers"]["ffn"]["up"].at[1, 0, 0].set(bad)
  save_params(tmp_path / "a", {"dit": tree}, {}, {})
  with pytest.raises(ValueError, match=r"weights 'dit/layers/1/ffn/up' .* are not finite"):
    load_params(tmp_path / "a", {"dit": shapes(tree)})
  loaded = load_params(tmp_path / "a", {"dit": shapes(tree)}, check_finite=False)
  assert_same(loaded["dit"], tree)


def test_missing_and_damaged_checkpoints(tmp_path):
  trees = weights()
  with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it has no config.json"):
    load_params(tmp_path / "none", shapes(trees))
  save_params(tmp_path / "a", {"dit": trees["dit"]}, {}, {})
  with pytest.raises(FileNotFoundError, match="has no weights of 'vae'"):
    load_params(tmp_path / "a", shapes(trees))


@pytest.mark.parametrize("damage", ["emptied", "cut", "scrambled"])
def test_a_damaged_checkpoint_gives_one_line(tmp_path, damage):
  tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
  save_params(tmp_path / "a", {"dit": tree}, {}, {})
  part = tmp_path / "a" / "dit" / "000"
  data = max((p for p in part.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  if damage == "emptied":
    shutil.rmtree(part)
    part.mkdir()
  elif damage == "cut":
    data.write_bytes(data.read_bytes()[:100])
  else:
    data.write_bytes(b"x" * data.stat().st_size)
  with pytest.raises(ValueError, match=r"part '.*000' of the checkpoint is damaged") as caught:
    load_params(tmp_path / "a", {"dit": shapes(tree)})
  assert "\n" not in str(caught.value)


def test_saving_again_replaces_and_a_failure_keeps_the_old(tmp_path):
  folder = tmp_path / "a"
  save_params(folder, {"dit": {"w": jnp.zeros(2)}}, {"n": 1}, {})
  save_params(folder, {"dit": {"w": jnp.ones(2)}}, {"n": 2}, {})
  assert read_config(folder) == {"n": 2}
  with pytest.raises(TypeError):
    save_params(folder, {"dit": {"w": jnp.zeros(2)}}, {"n": object()}, {})
  loaded = load_params(folder, {"dit": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}})
  np.testing.assert_array_equal(loaded["dit"]["w"], np.ones(2, np.float32))
  assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_folder_is_not_overwritten(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="holds something that is not a checkpoint"):
    save_params(tmp_path, {}, {}, {})
  assert (tmp_path / "notes.txt").read_text() == "mine"


class Moments(NamedTuple):
  count: jax.Array
  nu: dict


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["step", "params", "opt", "key"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
  step: jax.Array
  params: dict
  opt: tuple
  key: jax.Array


def make_state(seed: int = 0) -> State:
  params = {"a": jax.random.normal(jax.random.key(seed), (7, 3)), "b": jnp.ones(2, jnp.bfloat16)}
  moments = Moments(jnp.zeros((), jnp.int32), jax.tree.map(jnp.square, params))
  keys = jax.random.split(jax.random.key(seed + 1), 2)
  return State(jnp.zeros((), jnp.int32), params, (moments, ()), keys)


def test_a_training_state_comes_back_to_the_bit(tmp_path):
  state = make_state()
  with TrainCheckpointer(tmp_path, every=2, keep=2) as checkpointer:
    assert checkpointer.restore_latest(state) is state
    assert checkpointer.latest_extra() == {}
    assert not checkpointer.save(1, state)
    assert checkpointer.save(2, state, {"clip": 5})
    assert not checkpointer.save(2, state, force=True)
  with TrainCheckpointer(tmp_path, every=2, keep=2) as checkpointer:
    restored = checkpointer.restore_latest(make_state(seed=9))
    assert (checkpointer.latest_step, checkpointer.latest_extra()) == (2, {"clip": 5})
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
  assert_same(jax.random.key_data(restored.key), jax.random.key_data(state.key))
  assert_same((restored.params, restored.opt), (state.params, state.opt))


def test_only_the_newest_are_kept(tmp_path):
  with TrainCheckpointer(tmp_path, every=1, keep=2) as checkpointer:
    for step in range(1, 5):
      checkpointer.save(step, {"x": jnp.full(3, float(step))})
    checkpointer.wait()
    x = checkpointer.restore_latest({"x": jnp.zeros(3)})["x"]
  np.testing.assert_array_equal(x, np.full(3, 4.0, np.float32))
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["3", "4"]


def test_the_last_step_can_be_forced(tmp_path):
  with TrainCheckpointer(tmp_path, every=10, keep=1) as checkpointer:
    assert checkpointer.save(7, {"x": jnp.zeros(1)}, force=True)
    checkpointer.wait()
    assert checkpointer.latest_step == 7


def test_a_donated_state_is_saved_as_it_was(tmp_path):
  update = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((512, 1024))
  with TrainCheckpointer(tmp_path, every=5, keep=1) as checkpointer:
    for step in range(1, 10):
      x = update(x)
      checkpointer.save(step, {"x": x})
    x = checkpointer.restore_latest({"x": x})["x"]
  np.testing.assert_array_equal(x, np.full(x.shape, 5.0, np.float32))


def test_a_state_that_does_not_fit_names_the_leaf(tmp_path):
  with TrainCheckpointer(tmp_path, every=1, keep=1) as checkpointer:
    checkpointer.save(1, {"params": {"up": jnp.zeros((2, 3))}})
    with pytest.raises(ValueError, match=r"'params.up' is \(2, 3\) there and \(2, 4\) here"):
      checkpointer.restore_latest({"params": {"up": jnp.zeros((2, 4))}})
    with pytest.raises(ValueError, match=r"'params.uq' is absent there"):
      checkpointer.restore_latest({"params": {"uq": jnp.zeros((2, 3))}})


def test_a_state_moves_to_another_mesh(tmp_path):
  def sharded(devices: int) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(jax.devices()[:devices]), ("fsdp",)), P("fsdp"))

  value = np.arange(16, dtype=np.float32).reshape(8, 2)
  with TrainCheckpointer(tmp_path, every=1, keep=1) as checkpointer:
    checkpointer.save(1, {"x": jax.device_put(value, sharded(8))})
    for devices in (8, 4, 1):
      template = {"x": jax.device_put(np.zeros_like(value), sharded(devices))}
      x = checkpointer.restore_latest(template)["x"]
      assert x.sharding == sharded(devices)
      np.testing.assert_array_equal(x, value)


def steps_of(folder: Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def cut(folder: Path) -> None:
  """Truncates the largest array file of a checkpoint."""
  file = max(folder.rglob("d/*"), key=lambda found: found.stat().st_size)
  os.truncate(file, file.stat().st_size // 2)


def noise(seed: int) -> dict[str, jax.Array]:
  return {"x": jax.random.normal(jax.random.key(seed), (256, 64))}


def save_three(folder: Path) -> None:
  with TrainCheckpointer(folder, every=1, keep=3) as checkpointer:
    for step in (1, 2, 3):
      beside = {"bank": np.full(5, float(step))}
      checkpointer.save(step, noise(step), {"config": {"step": step}}, beside)


def test_truncated_arrays_are_set_aside_for_the_checkpoint_before(tmp_path, caplog):
  save_three(tmp_path)
  cut(tmp_path / "2")
  cut(tmp_path / "3")
  with TrainCheckpointer(tmp_path, every=1, keep=3, needs=("config",)) as checkpointer:
    assert_same(checkpointer.restore_latest(noise(0)), noise(1))
    assert checkpointer.latest_step == 1
    assert checkpointer.latest_extra() == {"config": {"step": 1}}
    assert_same(checkpointer.latest_arrays(), {"bank": np.full(5, 1.0)})
    assert checkpointer.save(2, noise(2))
  assert steps_of(tmp_path) == ["1", "2", "2.unreadable", "3.unreadable"]
  assert f"checkpoint '{tmp_path / '3'}' cannot be read; it is now '3.unreadable'" in caplog.text
  assert "the run goes on from step 1" in caplog.text


def test_nothing_is_set_aside_if_all_arrays_are_truncated(tmp_path):
  save_three(tmp_path)
  for step in "123":
    cut(tmp_path / step)
  with (
    TrainCheckpointer(tmp_path, every=1, keep=3) as checkpointer,
    pytest.raises(ValueError, match=f"no checkpoint in '{tmp_path}' can be read .1, 2, 3 are"),
  ):
    checkpointer.restore_latest(noise(0))
  assert steps_of(tmp_path) == ["1", "2", "3"]


def test_reads_left_behind_print_nothing_and_other_errors_do():
  printed: list[object] = []
  hook = without_closed_loops(lambda unraisable: printed.append(unraisable.exc_value))
  other = [RuntimeError("Event loop is open"), ValueError("Event loop is closed")]
  for error in (*other, RuntimeError("Event loop is closed")):
    hook(SimpleNamespace(exc_value=error))
  assert printed == other


@pytest.mark.parametrize("text", ["", '{"custom_meta', "{}", None])
def test_a_checkpoint_without_its_settings_cannot_be_read(tmp_path, text):
  save_three(tmp_path)
  for step in "32":
    file = tmp_path / step / "_CHECKPOINT_METADATA"
    file.unlink() if text is None else file.write_text(text)
  with TrainCheckpointer(tmp_path, every=1, keep=3, needs=("config",)) as checkpointer:
    assert checkpointer.latest_step == 1
  assert steps_of(tmp_path) == ["1", "2.unreadable", "3.unreadable"]
  shutil.rmtree(tmp_path / "1" / "state")
  with pytest.raises(ValueError, match=f"no checkpoint in '{tmp_path}' can be read .1 are there"):
    TrainCheckpointer(tmp_path, every=1, keep=3)
  assert (tmp_path / "1").is_dir()


def test_a_file_in_place_of_the_checkpoints_is_named(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(NotADirectoryError, match="it is a file") as caught:
    TrainCheckpointer(tmp_path / "checkpoints", every=1, keep=3)
  assert str(tmp_path / "checkpoints") in str(caught.value)


def test_json_is_readable(tmp_path):
  save_params(tmp_path / "a", {}, {"model": {"width": 4}}, {"commit": "abc"})
  assert json.loads((tmp_path / "a" / "config.json").read_text())["model"]["width"] == 4


def test_metadata_must_be_an_object(tmp_path):
  (tmp_path / "metadata.json").write_text("[]")
  with pytest.raises(ValueError, match="metadata.json' is damaged: it is not a JSON object"):
    read_metadata(tmp_path)
