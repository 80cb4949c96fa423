"""The benchmark program: its records, at sizes that take no time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Experiment
from longlive_jax.config.load import load_config
from longlive_jax.config.schema import Video
from longlive_jax.data.shapes import write_clips
from longlive_jax.eval import bench_block
from longlive_jax.eval.bench import Case, chain, measure
from longlive_jax.model.dit import cast_params
from longlive_jax.model.ops import REFERENCE
from tests.launch.tiny import OVERRIDES, TINY

BLOCK = {"model.width": 64, "model.ffn_width": 64, "model.heads": 2}
QUICK = ("--sizes=tiny", "--repeats=3", "--warm_seconds=0")


def test_every_part_has_a_record_of_how_fast_how_right_and_where(program, tmp_path):
  out = tmp_path / "quant.jsonl"
  done = program("bench", *QUICK, f"--out={out}")
  assert done.code == 0, done.stderr
  records = [json.loads(line) for line in out.read_text().splitlines()]
  assert done.stdout.count("\n") == 1 + len(records)
  assert {(record["case"], record["implementation"]) for record in records} >= {
    ("quantise", "jnp"),
    ("fake quantise", "jnp"),
    ("product with a packed weight", "bfloat16"),
    ("product with a packed weight", "jnp"),
    ("read the packed cache", "jnp"),
  }
  for record in records:
    assert 0 < record["p10_us"] <= record["median_us"] <= record["p90_us"]
    assert record["error"] < 0.01 and record["compile_seconds"] > 0
    assert record["versions"]["jax"] == jax.__version__ and record["device"]


def test_a_block_is_timed_in_every_precision():
  experiment = load_config("configs/tiny.py", {**OVERRIDES, **BLOCK})

  def unrolls(variant: Experiment) -> bool:
    return variant.quant.linears == "none"

  (case,) = bench_block.cases(experiment, REFERENCE, cast_params, unrolls)
  records = {record["implementation"]: record for record in measure(case, 2, 0.0)}
  assert set(records) == set(bench_block.VARIANTS)
  errors = {name: record["error"] for name, record in records.items()}
  assert errors["bfloat16"] == 0 and min(errors["nvfp4 linears"], errors["nvfp4 cache"]) > 1e-4
  assert max(errors.values()) < 0.5
  held = {name: record["argument_bytes"] for name, record in records.items()}
  assert {name for name, record in records.items() if record["unrolled"]} == {
    "bfloat16",
    "nvfp4 cache",
  }
  ratio = records["nvfp4 cache"]["cache_bytes"] / records["bfloat16"]["cache_bytes"]
  assert ratio == pytest.approx(9 / 64, rel=0.06)  # of float32, and an amax a small slot
  assert held["nvfp4 both"] < min(held["nvfp4 linears"], held["nvfp4 cache"]) < held["bfloat16"]


def test_a_case_that_is_not_there(program, tmp_path):
  done = program("bench", *QUICK, "--only=nothing", f"--out={tmp_path / 'x.jsonl'}")
  assert done.code == 2 and "--only=nothing" in done.stderr and done.stderr.count("\n") == 1
  assert not (tmp_path / "x.jsonl").exists()


def test_a_chain_does_every_job_and_walks_over_the_weights():
  weights = [jnp.eye(8) * factor for factor in (1.0, 2.0, 3.0)]
  found = chain(lambda x, w: x @ w, 4, 3)(jnp.ones((8, 8)), (weights,))
  np.testing.assert_array_equal(np.asarray(found)[:, 0, 0], [1, 2, 3, 1])


def test_errors_and_rates_are_of_one_job():
  x = jnp.ones((4, 4))
  case = Case(
    name="twice",
    sizes={},
    inputs="ones",
    functions={"right": lambda x: 2 * x, "off": lambda x: 2.02 * x},
    args=(x,),
    value=lambda y: y,
    reference="right",
    calls=10,
    flops=16.0,
  )
  right, off = measure(case, repeats=2, warm_seconds=0.0)
  assert right["error"] == 0 and off["error"] == pytest.approx(0.01, rel=1e-3)
  assert right["tflops_per_second"] == pytest.approx(16 / right["median_us"] / 1e6)


TRAIN = (
  *TINY,
  "--config.io.checkpoint=",
  "--config.data.blocks=2",
  "--config.train.batch=1",
  "--repeats=2",
)


def test_parts_of_a_training_step_are_timed_in_each_layout(program, tmp_path):
  out = tmp_path / "train.jsonl"
  variants = ("--config.parallel.seq=2", "--variants=balanced,plain", "--parts=vae,forward")
  done = program("bench_train", *TRAIN, *variants, f"--out={out}")
  assert done.code == 0, done.stderr
  records = [json.loads(line) for line in out.read_text().splitlines()]
  found = {(record["implementation"], record["part"]): record for record in records}
  assert set(found) == {(v, p) for v in ("balanced", "plain") for p in ("vae", "forward")}
  for (variant, _), record in found.items():
    assert 0 < record["p10_seconds"] <= record["median_seconds"] <= record["p90_seconds"]
    assert record["sizes"]["half"] * record["sizes"]["seq"] == 2
    assert record["sizes"]["half"] == (2 if variant == "plain" else 1)


def test_the_share_of_one_of_several_devices_is_timed(program, tmp_path):
  out = tmp_path / "share.jsonl"
  done = program("bench_train", *TRAIN, "--ranks=2", "--parts=vae", f"--out={out}")
  assert done.code == 0, done.stderr
  (record,) = [json.loads(line) for line in out.read_text().splitlines()]
  assert record["sizes"]["devices"] == 2 and record["median_seconds"] > 0


def test_reading_files_is_timed_without_weights(program, tmp_path, written):
  out, place = tmp_path / "data.jsonl", f"--config.data.path={written}"
  data = (*TRAIN, "--parts=data", "--config.data.source=videos", f"--out={out}")
  done = program("bench_train", *data, place, "--config.parallel.seq=2")
  assert done.code == 0, done.stderr
  (record,) = [json.loads(line) for line in out.read_text().splitlines()]
  assert record["part"] == "data" and record["repeats"] == 2
  assert 0 < record["p10_seconds"] <= record["median_seconds"] <= record["p90_seconds"]
  whole = 4 * record["sizes"]["latents"] - 3
  assert record["sizes"]["frames"] > whole  # a device also reads what is to the left of its part
  missing = program("bench_train", *data, "--config.data.path=nowhere")
  assert missing.code == 2 and "nowhere" in missing.stderr and missing.stderr.count("\n") == 1
  both = program("bench_train", *TRAIN, "--parts=vae,data", place)
  assert both.code == 2 and "--parts=vae,data: data is of the host" in both.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A folder of video files."""
  folder = tmp_path_factory.mktemp("clips")
  write_clips(folder, 2, 0, [1, 1], Video(height=96, width=160, fps=24))
  return folder


def test_parts_and_layouts_that_are_not_known(program):
  done = program("bench_train", *TRAIN, "--parts=sideways")
  assert done.code == 2 and "--parts has 'sideways'; use some of vae, text" in done.stderr


def test_a_whole_sampler_is_timed(program, tmp_path):
  out = tmp_path / "rollout.jsonl"
  done = program("bench_rollout", *TINY, "--config.io.checkpoint=", "--blocks=2", f"--out={out}")
  assert done.code == 0, done.stderr
  records = [json.loads(line) for line in out.read_text().splitlines()]
  assert [record["part"] for record in records] == ["latents", "decode", "frames"]
  for record in records:
    assert 0 < record["p10_seconds"] <= record["median_seconds"] <= record["p90_seconds"]
    assert record["frames_per_second"] == pytest.approx(8 / record["median_seconds"])
  assert all(seconds > 0 for seconds in records[0]["first_frames_seconds"])
  wrong = program("bench_rollout", *TINY, "--parts=pictures", f"--out={tmp_path / 'x'}")
  assert wrong.code == 2 and "use some of latents, decode, frames" in wrong.stderr
