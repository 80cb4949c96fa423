"""Training in two processes: the losses of one, over any of its meshes, and how they end."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from longlive_jax.build import Pipeline
from longlive_jax.config import Video
from longlive_jax.data.shapes import write_clips
from longlive_jax.io.leaves import flat
from longlive_jax.io.metrics import read_metrics
from tests.launch.tiny import TINY, Outcome, Program

STEPS, SAVED = 9, 7  # of a run; of its checkpoint before the last
SECONDS = 300  # for a run
# Collectives of two processes sum in another order than those of one, so losses are not equal to
# the bit: they differ by 1.3e-7 at most in what is run here.
SAME = 1e-5
SETTINGS = (
  *TINY,
  "--config.io.checkpoint=",
  "--config.io.checkpoint_every_steps=7",
  "--config.model.heads=4",
  "--config.data.blocks=4",
  "--config.train.batch=4",
  "--config.train.final_lr_fraction=1.0",
  f"--config.train.steps={STEPS}",
  "--config.train.recycling.enabled=true",
)
GROUPS = ("--config.parallel.fsdp=2", "--config.parallel.seq=2")  # of 8 devices, data=2
ACROSS = ("--config.parallel.seq=4", "--config.train.accumulate=4")  # of 4, a clip over all of them
Start = Callable[..., list[subprocess.Popen]]


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def start(
  command: list[str], devices: int, processes: int = 1, own: Sequence[Sequence[str]] = ()
) -> list[subprocess.Popen]:
  """Starts a program in so many processes of `devices` each, with flags of their own."""
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
  address = f"--coordinator=localhost:{free_port()}"
  each = [
    (address, f"--processes={processes}", f"--process={i}", *(own[i] if own else ()))
    if processes > 1
    else ()
    for i in range(processes)
  ]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return [
    subprocess.Popen([sys.executable, *command, *flags], env=environment, **pipes) for flags in each
  ]


def ended(children: list[subprocess.Popen]) -> list[Outcome]:
  """Waits for all; kills what hangs."""
  last = time.monotonic() + SECONDS
  try:
    found = [child.communicate(timeout=max(last - time.monotonic(), 0.1)) for child in children]
  finally:
    for child in children:
      child.kill()
  return [Outcome(child.returncode, *said) for child, said in zip(children, found, strict=True)]


def train(workdir: Path, devices: int, processes: int, *arguments: str) -> list[Outcome]:
  command = ["-m", "launch.train", *SETTINGS, f"--workdir={workdir}", *arguments]
  done = ended(start(command, devices, processes))
  assert [one.code for one in done] == [0] * processes, "\n".join(one.stderr for one in done)
  return done


def losses(workdir: Path) -> dict[int, float]:
  return {int(line["step"]): line["loss"] for line in read_metrics(workdir)}


def assert_same(here: dict[int, float], there: dict[int, float], steps: range) -> None:
  assert list(here) == list(steps)
  np.testing.assert_allclose(
    [here[step] for step in steps], [there[step] for step in steps], rtol=SAME
  )


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory, compiled_quickly) -> Path:
  """A run of one process."""
  os.chdir(root)
  folder = tmp_path_factory.mktemp("alone")
  train(folder, 8, 1, *GROUPS)
  return folder


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory, compiled_quickly) -> tuple[Path, list[Outcome]]:
  """The same of two, ended by SIGTERM to one of them."""
  os.chdir(root)
  folder = tmp_path_factory.mktemp("stopped")
  command = ["-m", "launch.train", *SETTINGS, f"--workdir={folder}", *GROUPS]
  children = start([*command, f"--config.train.steps={10**6}"], 4, 2)
  lines, last = folder / "metrics.jsonl", time.monotonic() + SECONDS
  while time.monotonic() < last and all(child.poll() is None for child in children):
    if lines.exists() and lines.read_text().count("\n") >= 2:
      children[1].send_signal(signal.SIGTERM)
      break
    time.sleep(0.02)
  return folder, ended(children)


def test_two_processes_have_the_losses_of_one(alone, stopped):
  curve = losses(stopped[0])
  steps = range(1, min(len(curve), STEPS) + 1)
  assert len(steps) >= 3
  assert_same({step: curve[step] for step in steps}, losses(alone), steps)
  kept = [line["recycling/kept"] for line in read_metrics(stopped[0])]
  assert kept[0] == 0 < kept[2]  # errors of both processes come back to both


def test_sigterm_to_one_process_ends_both_after_the_same_step(stopped):
  folder, done = stopped
  assert [one.code for one in done] == [143, 143], [one.stderr for one in done]
  saved = max(int(path.name) for path in (folder / "checkpoints").iterdir())
  assert list(losses(folder)) == list(range(1, saved + 1))
  assert not (folder / "params").exists()
  assert f"stopped after step {saved}, checkpoint saved" in done[0].stdout
  told = ["step" in one.stdout.replace("steps", "") for one in done]
  assert told == [True, False]  # process 0 tells for both


def test_processes_with_different_settings_do_not_begin(root, tmp_path):
  os.chdir(root)
  command = ["-m", "launch.train", *SETTINGS, f"--workdir={tmp_path / 'run'}"]
  each = [("--config.train.lr=0.1",), ("--config.train.lr=0.25", "--config.train.seed=7")]
  done = ended(start(command, 1, 2, each))
  line = "train.seed is 0 in process 0 and 7 in process 1"
  for one in done:
    assert one.code == 2 and line in one.stderr, one.stderr
    assert "train.lr is 0.1 in process 0 and 0.25 in process 1" in one.stderr
    assert one.stderr.count("\n") == 1 and one.stderr.startswith("error: ")
  assert not (tmp_path / "run").exists()


def test_a_run_of_two_processes_goes_on_in_one(alone, stopped, tmp_path):
  folder = Path(shutil.copytree(stopped[0], tmp_path / "run"))
  saved = max(losses(folder))
  if saved >= STEPS:
    pytest.skip(f"the machine is busy: {saved} steps were done before SIGTERM came")
  train(folder, 8, 1, *GROUPS)
  assert_same(losses(folder), losses(alone), range(1, STEPS + 1))


def test_a_run_of_one_goes_on_in_two_that_share_each_clip(alone, tmp_path):
  folder = Path(shutil.copytree(alone, tmp_path / "run"))
  shutil.rmtree(folder / "checkpoints" / str(STEPS))
  shutil.rmtree(folder / "params")
  script = tmp_path / "short.json"
  script.write_text('{"shots": [{"prompt": "one red circle", "blocks": 1}]}')
  videos = ("--config.io.evaluate_every_steps=9", f"--config.io.evaluate_scripts={script}")
  first, second = train(folder, 2, 2, *ACROSS, *videos)
  assert "mesh data 1, fsdp 1, half 1, seq 4" in first.stdout
  assert f"steps {SAVED + 1} to {STEPS}" in first.stdout
  assert "weights after 9 steps" in first.stdout and "weights" not in second.stdout
  assert_same(losses(folder), losses(alone), range(1, STEPS + 1))
  assert (folder / "videos" / "000009" / "short.mp4").is_file()
  here, there = (
    flat(Pipeline.from_checkpoint(f / "params").models.params) for f in (folder, alone)
  )
  assert list(here) == list(there)
  for name, value in here.items():
    np.testing.assert_allclose(value, there[name], atol=1e-4, err_msg=name)


def test_two_processes_read_their_own_parts_of_videos(root, tmp_path):
  os.chdir(root)
  write_clips(tmp_path / "clips", 4, 0, (4,), Video(height=32, width=32))
  data = ("--config.data.source=videos", f"--config.data.path={tmp_path / 'clips'}")
  few = ("--config.train.steps=2", "--config.train.batch=1", "--config.train.accumulate=1")
  plain = ("--config.parallel.halo_latents=1", "--config.train.recycling.enabled=false")
  for folder, devices, processes in (("one", 4, 1), ("two", 2, 2)):
    train(tmp_path / folder, devices, processes, *ACROSS, *data, *few, *plain)
  assert_same(losses(tmp_path / "two"), losses(tmp_path / "one"), range(1, 3))


ONE_FAILS = """
import jax
from launch.processes import define_process_flags
from longlive_jax.config.flags import run_main
from longlive_jax.io.processes import of_first, wait_for_all

PROCESSES = define_process_flags()

def main(argv):
  with PROCESSES.joined():
    assert of_first(7 + jax.process_index()) == 7
    if jax.process_index() == FAILS:
      raise ValueError("the disk is full")
    wait_for_all("never")

run_main(main)
"""


@pytest.mark.parametrize("fails", [0, 1])
def test_a_process_that_fails_ends_the_other(root, fails):
  os.chdir(root)
  started = time.monotonic()
  done = ended(start(["-c", ONE_FAILS.replace("FAILS", str(fails))], 1, 2))
  assert time.monotonic() - started < 60
  assert (done[fails].code, done[fails].stderr) == (2, "error: the disk is full\n")
  assert done[1 - fails].code not in (0, 2)


@pytest.mark.parametrize(
  ("flags", "found"),
  [
    (("--processes=2", "--process=0"), "--coordinator='' --processes=2 --process=0 must be given"),
    (("--coordinator=a:1", "--processes=2"), "--process=-1 must be given together"),
    (("--coordinator=a:1", "--processes=2", "--process=2"), "--process=2 must be given together"),
    (("--coordinator=a:1", "--processes=-1", "--process=0"), "--processes"),
    (("--distributed",), "the processes did not find each other: "),
  ],
)
def test_flags_that_do_not_belong_together(program: Program, tmp_path, flags, found):
  done = program("train", *SETTINGS, f"--workdir={tmp_path / 'run'}", *flags)
  assert done.code == 2
  assert found in done.stderr and done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()


def known_flags(root: Path) -> set[str]:
  text = "".join((root / "launch" / f"{name}.py").read_text() for name in ("train", "processes"))
  return {"config", *re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)}


def flags_of(words: list[str]) -> set[str]:
  names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
  return {name for name in names if not name.startswith("config.")}


def test_the_script_for_slurm(root):
  file = root / "launch" / "cluster" / "slurm.sh"
  assert subprocess.run(["bash", "-n", file], capture_output=True).stderr == b""
  text = file.read_text()
  command = next(line for line in text.splitlines() if line.startswith("srun"))
  words = shlex.split(command)
  assert flags_of(words[words.index("launch.train") :]) == {"distributed"}
  assert flags_of(shlex.split(text.partition("sbatch")[2].partition("\n#\n")[0])) <= known_flags(
    root
  )
  assert "#SBATCH --signal=TERM@" in text and "#SBATCH --requeue" in text


def test_the_job_for_kubernetes(root):
  documents = yaml.safe_load_all((root / "launch" / "cluster" / "kubernetes.yaml").read_text())
  service, job = documents
  pod = job["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  values = dict(word.removeprefix("--").split("=", 1) for word in container["command"][3:])
  assert flags_of(container["command"]) <= known_flags(root)
  name, pods = job["metadata"]["name"], job["spec"]["completions"]
  assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["parallelism"] == pods
  assert int(values["processes"]) == pods
  assert values["process"] == f"$({container['env'][0]['name']})"
  assert values["coordinator"].startswith(f"{name}-0.{pod['subdomain']}:")
  assert service["metadata"]["name"] == pod["subdomain"]
  assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}
