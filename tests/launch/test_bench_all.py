"""The rows that are measured in one go: how they share GPUs, and that their commands are right."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import lanes
from launch.lanes import Ended, Job, measure, run_jobs

# reads the flags of each line in a process of its own, with the program imported once
PARSE = """
import importlib, json, os, sys
from absl import flags
from longlive_jax.config.load import from_flags
module, *lines = sys.argv[1:]
importlib.import_module(module)
for line in lines:
  child = os.fork()
  if child:
    assert os.waitpid(child, 0)[1] == 0, line
    continue
  try:
    sys.argv = [module, *json.loads(line)]
    flags.FLAGS(sys.argv)
    if "config" in flags.FLAGS:
      from_flags(flags.FLAGS["config"].value)
  except BaseException as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
  os._exit(0)
print(len(lines))
"""


def code(text: str) -> tuple[str, ...]:
  return "-c", text


def said(folder: Path, name: str) -> str:
  return (folder / f"{name}.log").read_text()


SHOW = code("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")


def test_jobs_share_the_gpus_and_programs_of_one_follow_each_other(tmp_path):
  jobs = [
    Job("pair", 2, (SHOW, code("print('then')"))),
    Job("one", 1, (SHOW,)),
    Job("bad", 1, (code("import sys; sys.exit(3)"), code("print('never')"))),
  ]
  found = {ended.job.name: ended for ended in run_jobs(jobs, ["4", "7"], tmp_path)}
  assert {name: ended.code for name, ended in found.items()} == {"pair": 0, "one": 0, "bad": 3}
  assert said(tmp_path, "pair") == "4,7\nthen\n" and said(tmp_path, "one") in ("4\n", "7\n")
  assert said(tmp_path, "bad") == "" and found["pair"].gpus == ("4", "7")


def test_two_run_at_a_time_and_one_that_takes_too_long_is_ended(tmp_path):
  wait = code("import time; time.sleep(60)")
  meet = code(
    "import pathlib, sys, time\n"
    f"here = pathlib.Path({str(tmp_path)!r})\n"
    "(here / 'there').touch()\n"
    "while not (here / 'seen').exists(): time.sleep(0.05)"
  )
  see = code(
    "import pathlib, time\n"
    f"here = pathlib.Path({str(tmp_path)!r})\n"
    "while not (here / 'there').exists(): time.sleep(0.05)\n"
    "(here / 'seen').touch()"
  )
  jobs = [Job("long", 1, (wait,), seconds=1.0), Job("meet", 1, (meet,)), Job("see", 1, (see,))]
  began = time.monotonic()
  found: list[Ended] = list(run_jobs(jobs, ["0", "1"], tmp_path))
  assert {ended.job.name: ended.code == 0 for ended in found} == {
    "long": False,
    "meet": True,
    "see": True,
  }
  assert "ended after 1 s" in said(tmp_path, "long") and time.monotonic() - began < 30


def test_leaving_early_ends_what_runs_and_too_few_gpus_are_named(tmp_path):
  note = code(
    "import os, pathlib, time\n"
    f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
    "time.sleep(60)"
  )
  running = run_jobs([Job("quick", 1, (SHOW,)), Job("stays", 1, (note,))], ["0", "1"], tmp_path)
  next(running)
  while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
    time.sleep(0.05)
  running.close()
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)
  with pytest.raises(ValueError, match="pair needs 2 GPUs; there are 1"):
    list(run_jobs([Job("pair", 2, (SHOW,))], ["0"], tmp_path))


def test_every_row_is_a_command_that_its_program_takes(root, tmp_path):
  command = (sys.executable, "-m", "launch.bench_all", "--list", f"--out={tmp_path}")
  listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
  by_program: dict[str, list[str]] = {}
  for line in listed.splitlines():
    _, module, *arguments = shlex.split(line.partition(" python ")[2])
    by_program.setdefault(module, []).append(json.dumps(arguments))
  assert set(by_program) == {
    f"launch.{n}" for n in ("bench", "bench_rollout", "bench_serve", "train")
  }
  runs = {
    module: subprocess.Popen(
      (sys.executable, "-c", PARSE, module, *lines), stdout=subprocess.PIPE, cwd=root
    )
    for module, lines in by_program.items()
  }
  for module, lines in by_program.items():
    out, _ = runs[module].communicate()
    assert out.decode().splitlines()[-1] == str(len(lines)), module


@pytest.mark.parametrize(
  ("given", "line"),
  [
    (("--only=nonsense",), "--only=nonsense is in the name of no row; the rows are two_2steps"),
    (("--gpus=0,0",), "--gpus=0,0 names one twice"),
    (("--gpus=0,",), "--gpus=0, leaves one without a name"),
    ((), "no GPU can be seen with nvidia-smi; --gpus names what it lists"),
    (("--gpus=0",), "no GPU can be seen with nvidia-smi"),
    (("--gpus=0", "--out=/", "--only=gemm"), "'/' is the root of the file system"),
    (("--gpus=0", "--out=", "--only=gemm"), "--out is empty; name a folder"),
    (("--list", "--out="), "--out is empty; name a folder"),
  ],
)
def test_bad_flags_give_one_line(program, monkeypatch, given, line):
  monkeypatch.setenv("PATH", "/nowhere")
  done = program("bench_all", *given)
  assert done.code == 2 and line in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def two_gpus(tmp_path_factory, monkeypatch) -> None:
  """A machine with GPUs 0 and 1, as nvidia-smi tells; the first is cut in parts."""
  folder = tmp_path_factory.mktemp("bin")
  lines = (
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a)",
    "  MIG 1g.10gb     Device  0: (UUID: MIG-0b)",
    "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1a)",
  )
  (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{x}'\n" for x in lines))
  (folder / "nvidia-smi").chmod(0o755)
  monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("name", ["abc", "-1", "2", "99", "00", "GPU-2a", "GPU-"])
def test_a_gpu_that_is_not_there_is_refused(program, two_gpus, tmp_path, name):
  done = program("bench_all", f"--gpus=0,{name}", f"--out={tmp_path / 'x'}")
  assert done.code == 2 and not done.stdout and not (tmp_path / "x").exists()
  said = f"--gpus=0,{name} has '{name}', which is no GPU of this machine; use some of 0, 1, or"
  assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("given", "used"),
  [((), ["0", "1"]), (("--gpus=1",), ["1"]), (("--gpus=GPU-1a,0",), ["GPU-1a", "0"])],
)
def test_gpus_are_those_that_are_named_or_all(
  program, two_gpus, tmp_path, monkeypatch, given, used
):
  found: list[list[str]] = []
  monkeypatch.setattr(lanes, "measure", lambda jobs, gpus, folder: found.append(gpus))
  assert program("bench_all", f"--out={tmp_path}", *given).code == 0
  assert found == [used]


def test_a_folder_that_cannot_be_made_is_named(program, two_gpus):
  done = program("bench_all", "--gpus=0", "--out=/proc/x")
  assert done.code == 2 and "/proc/x" in done.stderr and done.stderr.count("\n") == 1


def test_a_gpu_has_one_name_at_a_time(program, two_gpus, tmp_path):
  done = program("bench_all", "--gpus=1,GPU-1a", f"--out={tmp_path}")
  assert done.code == 2 and "--gpus=1,GPU-1a names one twice" in done.stderr


def test_rows_that_do_not_fit_are_left_out_and_what_runs_ends_with_the_program(
  program, tmp_path, root, two_gpus
):
  for only, count in (("two_2", 2), ("two_2steps,", 1), ("two_2steps,two_bf", 2)):
    done = program("bench_all", "--gpus=0", f"--out={tmp_path}", f"--only={only}")
    assert done.code == 2 and "--gpus=0 are too few for any of these rows" in done.stderr
    assert done.stdout.count("left out: it needs 2 GPUs") == count
  command = (
    sys.executable,
    "-m",
    "launch.bench_all",
    "--gpus=0",
    f"--out={tmp_path}",
    "--only=gemm",
  )
  running = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
  while not (tmp_path / "gemm.log").exists():
    time.sleep(0.1)
  time.sleep(1)  # until its program is started
  running.send_signal(signal.SIGTERM)
  assert running.wait(timeout=30) == 143
  assert not (tmp_path / "gemm.done").exists() and not (tmp_path / "gemm.jsonl").exists()


def test_a_row_that_fails_is_named_and_the_others_count(tmp_path, capsys):
  jobs = [Job("bad", 1, (code("import sys; sys.exit(3)"),)), Job("good", 1, (SHOW,))]
  with pytest.raises(SystemExit, match="1 of 2 rows failed: bad"):
    measure(jobs, ["0"], tmp_path)
  out = capsys.readouterr().out
  assert f"failed with 3, see {tmp_path / 'bad'}.log" in out and "on GPU 0: measured" in out
  assert (tmp_path / "good.done").exists() and not (tmp_path / "bad.done").exists()
