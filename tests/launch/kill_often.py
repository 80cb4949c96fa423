"""Kills a training run at random moments until it is done, and compares it with one left alone.

  python -m tests.launch.kill_often --kills=20

Takes a few minutes, so it is a program and no test; `tests/train` has a few kills of each kind.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from longlive_jax.io.checkpoint import load_params
from longlive_jax.io.metrics import read_metrics
from tests.launch.tiny import SIZES

SETTINGS = (
  "--config=configs/tiny.py:ar",
  *SIZES,
  "--config.io.checkpoint=",
  "--config.data.far_share=0.0",
  "--config.data.max_shots=2",
  "--config.data.blocks=2",
  "--config.train.batch=4",
  "--config.train.recycling.enabled",
  "--config.parallel.seq=2",
  "--config.parallel.fsdp=2",
  "--config.io.checkpoint_every_steps=3",
)


def start(folder: Path, cache: Path, steps: int) -> subprocess.Popen:
  """The run as a process of its own."""
  changes = (f"--config.train.steps={steps}", f"--config.io.compile_cache={cache}")
  command = [sys.executable, "-m", "launch.train", *SETTINGS, *changes, f"--workdir={folder}"]
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(run: subprocess.Popen) -> None:
  """Waits for the end, which must be a good one."""
  _, errors = run.communicate()
  if run.returncode:
    raise SystemExit(f"the run ended with {run.returncode}: {errors.decode()}")


def kill_until_done(folder: Path, cache: Path, steps: int, kills: int, seed: int) -> list[int]:
  """Steps that had been written when each kill came."""
  rng, found = random.Random(seed), []
  for number in range(kills):
    run = start(folder, cache, steps)
    lines, before = folder / "metrics.jsonl", count(folder)
    while run.poll() is None and count(folder) <= before:  # until it takes steps again
      time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 1.0))
    run.kill()
    run.communicate()
    found.append(count(folder) if lines.exists() else 0)
    print(f"kill {number + 1}: {found[-1]} steps written", flush=True)
  return found


def count(folder: Path) -> int:
  """Steps whose metrics are written."""
  lines = folder / "metrics.jsonl"
  return lines.read_bytes().count(b"\n") if lines.is_file() else 0


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    alone, killed, cache = (Path(place) / name for name in ("alone", "killed", "cache"))
    finish(start(alone, cache, given.steps))
    kill_until_done(killed, cache, given.steps, given.kills, given.seed)
    finish(start(killed, cache, given.steps))
    losses = [[(x["step"], x["loss"]) for x in read_metrics(f)] for f in (alone, killed)]
    params = [load_all(f / "params") for f in (alone, killed)]
  same = all(np.array_equal(params[0][name], params[1][name]) for name in params[0])
  if losses[0] != losses[1] or not same:
    raise SystemExit("the killed run ended otherwise than the one left alone")
  print(f"after {given.kills} kills: the same {len(losses[0])} losses and weights, to the bit")


def load_all(folder: Path) -> dict[str, np.ndarray]:
  """Weights of the transformer by name."""
  from longlive_jax.build import declare_networks
  from longlive_jax.config.load import load_config
  from longlive_jax.io.leaves import flat

  network = declare_networks(load_config(folder / "config.json"))["dit"]
  return {n: np.asarray(a) for n, a in flat(load_params(folder, {"dit": network.abstract})).items()}


if __name__ == "__main__":
  main()
