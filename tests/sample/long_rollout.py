"""Memory and compilations of a long rollout, with fresh weights.

  python -m tests.sample.long_rollout --latents=1024

One JSON line a length (`--latents` may be repeated): sizes in MiB. `peak` is the most that was ever
resident, compiling included; `early` and `late` what is resident after 64 latents and at the end;
`arrays` the most that JAX arrays held between two blocks. `compilations` are those after the start.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import jax

from longlive_jax.build import build_models
from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.sample.sampler import Sampler
from tests.sample.compiles import counting
from tests.sample.tiny import experiment

ROOT = Path(__file__).resolve().parents[2]
EARLY = 64  # latents
MIB = 2**20


def script_of(blocks: int) -> Script:
  """Shots of 5 blocks; every other one goes on under another prompt."""
  lengths = [min(5, blocks - start) for start in range(0, blocks, 5)]
  kinds = ("cut", "keep", "cut", "recache")
  return Script(
    tuple(
      Shot(f"prompt {i % 7}", length, transition=kinds[i % 4]) for i, length in enumerate(lengths)
    )
  )


def resident(field: str) -> float:
  """MiB: "VmRSS" is what is resident now, "VmHWM" the most there ever was."""
  status = Path("/proc/self/status")
  if not status.is_file():  # not Linux: only the most is known
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
  line = next(line for line in status.read_text().splitlines() if line.startswith(field))
  return int(line.split()[1]) / 1024


def held() -> int:
  """Bytes of all live arrays."""
  return sum(array.nbytes for array in jax.live_arrays())


def measure(sampler: Sampler, latents: int) -> dict[str, object]:
  """Generates that many latents and throws the frames away."""
  size = sampler.experiment.model.block_latents
  early = frames = arrays = 0
  sampler.prepare()
  start = time.perf_counter()
  with counting() as counts:
    for block, part in enumerate(sampler.stream(script_of(latents // size)), 1):
      frames += len(part)
      arrays = max(arrays, held())
      if block == EARLY // size:
        early = resident("VmRSS")
  return {
    "latents": latents,
    "frames": frames,
    "peak": round(resident("VmHWM"), 1),
    "early": round(early, 1),
    "late": round(resident("VmRSS"), 1),
    "arrays": round(arrays / MIB, 3),
    "compilations": counts["compilations"],
    "traces": counts["traces"],
    "seconds": round(time.perf_counter() - start, 2),
  }


def sizes(smallest: bool) -> Experiment:
  """The smallest experiment, or `configs/tiny.py` with fresh weights."""
  if smallest:
    return experiment(window_latents=4, pin_shots=False)
  return load_config(ROOT / "configs" / "tiny.py", {"io.checkpoint": ""})


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--latents", type=int, action="append", required=True)
  parser.add_argument("--smallest", action="store_true", help="the sizes of the tests")
  args = parser.parse_args()
  sampler = Sampler(build_models(sizes(args.smallest)))
  for latents in args.latents:
    print(json.dumps(measure(sampler, latents)), flush=True)


if __name__ == "__main__":
  main()
