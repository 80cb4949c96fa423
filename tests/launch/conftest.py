"""Programs run inside the test process, at the smallest sizes."""

import importlib
import json
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from absl import flags
from absl import logging as absl_logging

from longlive_jax.build import declare_networks, fresh_params
from longlive_jax.config.flags import run_main
from longlive_jax.config.load import load_config, to_json
from longlive_jax.io.checkpoint import save_params
from tests.launch.tiny import OVERRIDES, TINY, Outcome, Program


@pytest.fixture(autouse=True)
def at_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Paths such as configs/tiny.py are relative to the root."""
  monkeypatch.chdir(root)


def forget_flags() -> None:
  """Several programs define --out; a process that runs one after the other must forget them."""
  programs = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("launch.")]
  for program in programs:
    for flag in list(flags.FLAGS.flags_by_module_dict()[program]):
      delattr(flags.FLAGS, flag.name)
  for name in list(flags.FLAGS):
    if name.partition(".")[0] == "config":
      delattr(flags.FLAGS, name)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
  """Calls `python -m launch.NAME ARGUMENTS` in this process: `program(name, *arguments)`."""

  def run(name: str, *arguments: str) -> Outcome:
    forget_flags()
    known = f"launch.{name}" in sys.modules
    module = importlib.import_module(f"launch.{name}")
    module = importlib.reload(module) if known else module  # for its flags
    terminate, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    logger, stderr = absl_logging.get_absl_logger(), absl_logging.get_absl_handler()
    handlers, filters = logger.handlers[:], stderr.filters[:]
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)  # as in a process of its own
    monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *arguments])
    capsys.readouterr()
    try:
      with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        warnings.filterwarnings("ignore", r"the load_module\(\) method")  # ml_collections calls it
        run_main(module.main, **getattr(module, "RUN", {}))
    finally:
      signal.signal(signal.SIGTERM, terminate)
      sys.unraisablehook = hook
      logger.handlers[:], stderr.filters[:] = handlers, filters
      absl_logging.set_verbosity(verbosity)
    out, err = capsys.readouterr()
    return Outcome(int(ended.value.code or 0), out, err)

  return run


@pytest.fixture(scope="session")
def checkpoint(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Weights of the smallest networks, fresh but for a head that says something."""
  experiment = load_config(root / "configs/tiny.py", {**OVERRIDES, "io.checkpoint": ""})
  params = fresh_params(experiment, declare_networks(experiment))
  head = params["dit"]["head"]["proj"]
  head["kernel"] = 0.2 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
  folder = tmp_path_factory.mktemp("weights") / "fresh"
  save_params(folder, params, json.loads(to_json(experiment)), {"stage": "none", "steps": 0})
  return folder


@pytest.fixture
def sample(program: Program, checkpoint: Path) -> Callable[..., Outcome]:
  """`launch.sample` of the smallest networks: `sample(*arguments)`; later flags win."""

  def run(*arguments: str) -> Outcome:
    return program("sample", *TINY, f"--config.io.checkpoint={checkpoint}", *arguments)

  return run
