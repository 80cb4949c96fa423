"""The training loop: what is saved, resumed, written and refused.

The network is a vector; like the real ones, its step draws everything from (seed, step). Run as a
program, this file is the training run that is killed: WORKDIR SIGNAL STEP PAUSE TIMES.
"""

import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Data, Experiment, Io, Model, Train, Video
from longlive_jax.config.load import from_json, run_main
from longlive_jax.config.walk import settings
from longlive_jax.io.metrics import read_metrics
from longlive_jax.io.train_checkpoint import TrainCheckpointer
from longlive_jax.train.loop import MAY_CHANGE, Rider, Step, run, steps_done
from longlive_jax.train.state import TrainState, apply_gradients, init_state, make_optimizer
from longlive_jax.train.watch import TOGETHER_SECONDS

STEPS = 12
TRAIN = Train(steps=STEPS, lr=0.1, warmup_steps=2, beta1=0.9, weight_decay=0.01, ema_start_step=3)
EXPERIMENT = Experiment(
  train=TRAIN, io=Io(checkpoint_every_steps=5, keep_checkpoints=2, log_every_steps=1)
)
OPTIMIZER = make_optimizer(TRAIN)


def changed(**settings: Any) -> Experiment:
  """The experiment with settings of `train` and `io` replaced."""
  train = {f.name for f in dataclasses.fields(Train)} & set(settings)
  io = set(settings) - train
  return dataclasses.replace(
    EXPERIMENT,
    train=dataclasses.replace(TRAIN, **{n: settings[n] for n in train}),
    io=dataclasses.replace(EXPERIMENT.io, **{n: settings[n] for n in io}),
  )


def fresh() -> TrainState:
  return init_state({"w": jnp.linspace(-1, 1, 33), "b": jnp.ones((2, 3))}, OPTIMIZER)


@jax.jit
def update(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
  keys = jax.random.split(jax.random.fold_in(jax.random.key(TRAIN.seed), state.step))

  def loss(params: dict) -> jax.Array:
    w = params["w"] - jax.random.normal(keys[0], params["w"].shape)
    return jnp.mean(w**2) + jnp.mean(jnp.sin(params["b"] + jax.random.normal(keys[1], (2, 3))))

  value, gradients = jax.value_and_grad(loss)(state.params)
  return apply_gradients(state, gradients, OPTIMIZER, TRAIN), {"loss": value}


def killed_at(step: int, number: int, pause: float, times: int) -> Step:
  """The update, which sends its own process a signal once a step is done, or more than once."""

  def stepped(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    at = int(state.step) + 1
    out = update(state)
    if at == step:
      time.sleep(pause)
      for _ in range(times):
        os.kill(os.getpid(), number)
        if number == signal.SIGTERM:
          os.kill(os.getpid(), number)  # two at once are one
        time.sleep(2 * TOGETHER_SECONDS if times > 1 else 0)
    return out

  return stepped


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[TrainState, list[float]]:
  """The last state and the losses of a run that nothing disturbs."""
  folder = tmp_path_factory.mktemp("whole")
  state = run(EXPERIMENT, folder, fresh(), update)
  return state, [line["loss"] for line in read_metrics(folder)]


def assert_same_run(folder: Path, state: TrainState, whole: tuple[TrainState, list[float]]):
  """The run in `folder` ended where the undisturbed one did, to the bit."""
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole[0]), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  lines = read_metrics(folder)
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  assert [line["loss"] for line in lines] == whole[1]


def saved_steps(folder: Path) -> list[str]:
  return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_step_is_saved_and_the_run_goes_on_to_the_bit(tmp_path, whole):
  half = run(changed(steps=STEPS // 2), tmp_path, fresh(), update)
  assert (int(half.step), saved_steps(tmp_path)) == (6, ["5", "6"])
  state = run(EXPERIMENT, tmp_path, fresh(), update)
  assert saved_steps(tmp_path) == ["10", "12"]
  assert_same_run(tmp_path, state, whole)


@pytest.mark.parametrize(
  ("name", "step", "pause", "done"),
  [
    ("SIGKILL", 8, 0.5, {5}),
    ("SIGTERM", 8, 0.0, {8}),
    ("SIGINT", 12, 0.0, {10}),
    ("SIGKILL", 11, 0.0, {5, 10}),  # perhaps while 10 is being written
  ],
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path, whole, name, step, pause, done):
  number = getattr(signal, name)
  arguments = [str(tmp_path), str(int(number)), str(step), str(pause), "1"]
  child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
  code = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}[name]
  assert child.returncode == code, child.stderr
  assert child.stderr == ("interrupted\n" if name == "SIGINT" else "")
  assert steps_done(EXPERIMENT, tmp_path) in done
  assert_same_run(tmp_path, run(EXPERIMENT, tmp_path, fresh(), update), whole)


def doomed(folder: Path, number: signal.Signals, step: int, times: int) -> Any:
  """Runs this file, which sends itself a signal so many times after a step."""
  arguments = [str(folder), str(int(number)), str(step), "0.5", str(times)]
  return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)


def test_sigterm_tells_what_is_saved(tmp_path):
  child = doomed(tmp_path, signal.SIGTERM, 8, 1)
  assert (child.returncode, child.stderr) == (143, "")
  assert child.stdout.endswith("stopped after step 8, checkpoint saved; the same command goes on\n")
  assert steps_done(EXPERIMENT, tmp_path) == 8
  assert from_json((tmp_path / "config.json").read_text()) == EXPERIMENT


def test_a_second_sigterm_ends_at_once(tmp_path):
  child = doomed(tmp_path, signal.SIGTERM, 8, 2)
  assert (child.returncode, child.stderr) == (143, "")
  assert "stopped" not in child.stdout
  assert steps_done(EXPERIMENT, tmp_path) == 5


def test_a_run_that_is_refused_leaves_the_settings_of_the_old_one(tmp_path):
  run(changed(steps=2), tmp_path, fresh(), update)
  before = (tmp_path / "config.json").read_text()

  class Refuses(Rider):
    def restore(self, *_: object) -> None:
      raise ValueError("there is no data")

  with pytest.raises(ValueError, match="there is no data"):
    run(changed(steps=3), tmp_path, fresh(), update, Refuses())
  assert (tmp_path / "config.json").read_text() == before
  with pytest.raises(ValueError, match="there is no data"):
    run(changed(steps=3), tmp_path / "other", fresh(), update, Refuses())
  assert not (tmp_path / "other" / "config.json").exists()


def test_a_line_that_was_cut_short_is_written_anew(tmp_path, whole):
  run(changed(steps=6), tmp_path, fresh(), update)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
  assert_same_run(tmp_path, run(EXPERIMENT, tmp_path, fresh(), update), whole)


def test_checkpoints_that_cannot_be_read_are_ignored(tmp_path, whole, caplog):
  run(changed(steps=7), tmp_path, fresh(), update)
  folder = tmp_path / "checkpoints"
  (folder / "10.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  (folder / "11").mkdir()  # a copy that was cut short: nothing of it, or not its arrays
  shutil.copytree(folder / "7", folder / "12")
  shutil.rmtree(folder / "12" / "state")
  assert steps_done(EXPERIMENT, tmp_path) == 7
  assert f"checkpoint '{folder / '11'}' cannot be read; it is now '11.unreadable'" in caplog.text
  assert_same_run(tmp_path, run(EXPERIMENT, tmp_path, fresh(), update), whole)
  assert saved_steps(tmp_path) == ["10", "11.unreadable", "12", "12.unreadable"]


def test_a_checkpoint_emptied_by_a_crash_is_ignored(tmp_path):
  with TrainCheckpointer(tmp_path, 1, 2) as checkpointer:
    checkpointer.save(1, {"x": jnp.ones(3)})
    checkpointer.save(2, {"x": jnp.zeros(3)})
  for file in (tmp_path / "2").rglob("d/*"):
    file.write_bytes(b"")
  with TrainCheckpointer(tmp_path, 1, 2) as checkpointer:
    assert checkpointer.latest_step == 1
    np.testing.assert_array_equal(checkpointer.restore_latest({"x": jnp.zeros(3)})["x"], 1.0)


def test_a_checkpoint_damaged_inside_is_named(tmp_path):
  state = {"x": jax.random.normal(jax.random.key(0), (256, 64))}
  with TrainCheckpointer(tmp_path, 1, 2) as checkpointer:
    checkpointer.save(3, state)
  largest = max((f for f in tmp_path.rglob("d/*")), key=lambda file: file.stat().st_size)
  largest.write_bytes(b"x" * largest.stat().st_size)
  line = rf"'{tmp_path / '3'}' is damaged.*remove it"
  with TrainCheckpointer(tmp_path, 1, 2) as opened, pytest.raises(ValueError, match=line) as caught:
    opened.restore_latest(state)
  assert "\n" not in str(caught.value)


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path, caplog):
  state = run(EXPERIMENT, tmp_path, fresh(), update)
  before = (tmp_path / "metrics.jsonl").read_text()
  with caplog.at_level(logging.INFO, "absl"):
    again = run(changed(steps=10), tmp_path, fresh(), lambda _: pytest.fail("it took a step"))
  assert "nothing to do: 12 steps are done, train.steps=10" in caplog.text
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert (tmp_path / "metrics.jsonl").read_text() == before
  assert saved_steps(tmp_path) == ["10", "12"]


@pytest.mark.parametrize(
  ("section", "line"),
  [
    ({"model": Model(width=1536)}, "holds a run with model.width=3072, not 1536"),
    ({"train": dataclasses.replace(TRAIN, beta1=0.0)}, "train.beta1=0.9, not 0.0"),
    ({"train": dataclasses.replace(TRAIN, stage="vae")}, "train.stage='ar', not 'vae'"),
    ({"train": dataclasses.replace(TRAIN, seed=1)}, "train.seed=0, not 1"),
    ({"data": Data(seed=5)}, "data.seed=1, not 5"),
    ({"video": Video(height=32)}, "video.height=704, not 32"),
    ({"io": Io(checkpoint="other")}, "io.checkpoint='', not 'other'"),
  ],
)
def test_another_configuration_is_refused_by_the_setting(finished, section, line):
  other = dataclasses.replace(EXPERIMENT, **section)
  for attempt in (
    lambda: run(other, finished, fresh(), update),
    lambda: steps_done(other, finished),
  ):
    with pytest.raises(ValueError, match=line) as caught:
      attempt()
    assert "another workdir" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("finished")
  run(changed(steps=2), folder, fresh(), update)
  return folder


def test_what_may_change_is_a_setting():
  assert set(MAY_CHANGE) < {name for name, _, _ in settings(EXPERIMENT)}


def test_another_shape_is_refused_by_the_leaf(finished):
  state = init_state({"w": jnp.zeros(34), "b": jnp.ones((2, 3))}, OPTIMIZER)
  with pytest.raises(ValueError, match=r"'params.w' is \(33,\) there and \(34,\) here"):
    run(EXPERIMENT, finished, state, update)


def test_a_rate_may_change_and_it_is_told(tmp_path, caplog):
  run(changed(steps=2), tmp_path, fresh(), update)
  with caplog.at_level(logging.INFO, "absl"):
    run(changed(steps=3, lr=0.05), tmp_path, fresh(), update)
  assert "train.lr is 0.05 from here on; it was 0.1" in caplog.text


def spoiled(after: int, spoil: Callable[[TrainState, dict], tuple[TrainState, dict]]) -> Step:
  """The update until `after` steps are done, spoiled from then on."""

  def step(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    done = int(state.step)
    state, metrics = update(state)
    return spoil(state, metrics) if done >= after else (state, metrics)

  return step


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  step = spoiled(6, lambda state, metrics: (state, {"loss": metrics["loss"] + jnp.nan}))
  with pytest.raises(FloatingPointError, match=r"loss is nan at step 8.*train.lr=0.1") as caught:
    run(changed(log_every_steps=4), tmp_path, fresh(), step)
  assert "\n" not in str(caught.value)
  assert saved_steps(tmp_path) == ["5"]
  assert [(x["step"], x["loss"] is None) for x in read_metrics(tmp_path)] == [(4, False), (8, True)]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, whole):
  def spoil(state: TrainState, metrics: dict) -> tuple[TrainState, dict]:
    b = state.params["b"].at[1, 2].set(jnp.inf)
    return dataclasses.replace(state, params={**state.params, "b": b}), {"loss": jnp.zeros(())}

  with pytest.raises(FloatingPointError, match="parameters are not finite at step 10: .*train.lr"):
    run(changed(log_every_steps=100), tmp_path, fresh(), spoiled(6, spoil))
  assert saved_steps(tmp_path) == ["5"]
  run(changed(log_every_steps=100), tmp_path, fresh(), update)  # goes on from step 5
  with TrainCheckpointer(tmp_path / "checkpoints", 5, 2) as checkpointer:
    state = checkpointer.restore_latest(fresh())
  jax.tree.map(np.testing.assert_array_equal, state, whole[0])


class Watched:
  """A metric that tells when it is fetched."""

  def __init__(self, value: jax.Array, tell: Callable[[], None]):
    self.value, self.tell = value, tell

  def __array__(self, *_: Any, **__: Any) -> np.ndarray:
    self.tell()
    return np.asarray(self.value)


def test_the_host_fetches_only_what_it_logs_and_one_step_late(tmp_path):
  events: list[str] = []

  def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    number = int(state.step) + 1
    events.append(f"step {number}")
    state, metrics = update(state)
    return state, {"loss": Watched(metrics["loss"], lambda: events.append(f"fetch {number}"))}

  run(changed(log_every_steps=4, checkpoint_every_steps=8), tmp_path, fresh(), step)
  expected = [f"step {n}" for n in range(1, STEPS + 1)]
  expected.insert(expected.index("step 5") + 1, "fetch 4")
  expected.insert(expected.index("step 8") + 1, "fetch 8")  # its checkpoint must not be ahead
  assert events == [*expected, "fetch 12"]


if __name__ == "__main__":
  folder, number, at, pause, times = sys.argv[1:]
  sys.argv = sys.argv[:1]
  killed = killed_at(int(at), int(number), float(pause), int(times))
  run_main(lambda argv: run(EXPERIMENT, folder, fresh(), killed))
