"""The benchmark program: its records, at sizes that take no time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config.schema import Video
from longlive_jax.data.prompts import MOST_BLOCKS
from longlive_jax.data.shapes import write_clips
from longlive_jax.eval import bench_quant, bench_rollout
from longlive_jax.eval.bench import Case, chain, check_some, implementations_of, measure
from tests.launch.tiny import TINY

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
    ("read the packed cache", "jnp"),
  }
  for record in records:
    assert 0 < record["p10_us"] <= record["median_us"] <= record["p90_us"]
    assert record["error"] < 0.01 and record["compile_seconds"] > 0
    assert record["versions"]["jax"] == jax.__version__ and record["device"]


def test_a_case_that_is_not_there(program, tmp_path):
  done = program("bench", *QUICK, "--only=nothing", f"--out={tmp_path / 'x.jsonl'}")
  assert done.code == 2 and "--only=nothing" in done.stderr and done.stderr.count("\n") == 1
  assert not done.stdout and not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("flags", [("--only=nothing",), ("--only=ffn", "--implementations=none")])
def test_names_are_looked_at_before_anything_is_built(program, tmp_path, monkeypatch, flags):
  drawn, draw = [], jax.random.normal

  def noted(*args, **options):
    drawn.append(draw(*args, **options))
    return drawn[-1]

  monkeypatch.setattr(jax.random, "normal", noted)
  done = program("bench", "--suite=gemm", *QUICK, *flags, f"--out={tmp_path / 'x.jsonl'}")
  assert done.code == 2 and flags[-1].partition("=")[2] in done.stderr and not done.stdout
  assert drawn and all(isinstance(x, jax.core.Tracer) for x in drawn)


def test_implementations_are_those_of_all_cases():
  found = implementations_of(lambda: bench_quant.cases(bench_quant.SIZES["tiny"]))
  assert found == {n for c in bench_quant.cases(bench_quant.SIZES["tiny"]) for n in c.functions}


def test_one_of_a_list_at_least_is_needed():
  check_some("parts", ["a"], ("a", "b"))
  with pytest.raises(ValueError, match="--parts is empty; use some of a, b"):
    check_some("parts", [], ("a", "b"))


def test_a_chain_does_every_job_and_walks_over_the_weights():
  weights = [jnp.eye(8) * factor for factor in (1.0, 2.0, 3.0)]
  found = chain(lambda x, w: x @ w, 4, 3)(jnp.ones((8, 8)), (weights,))
  np.testing.assert_array_equal(np.asarray(found)[:, 0, 0], [1, 2, 3, 1])


def test_each_job_of_a_chain_decodes_its_weight_again():
  run = chain(lambda x, w: x @ jnp.sin(w), 4, 2)
  text = jax.jit(run).lower(jnp.ones((8, 8)), ([jnp.eye(8)] * 2,)).compile().as_text()
  assert text.count(" sine(") == 4


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
  (alone,) = measure(case, repeats=2, warm_seconds=0.0, only=("off",))
  assert alone["error"] == off["error"] and alone["reference"] == "right"


def test_what_is_compared_may_be_computed_otherwise_and_of_other_arguments():
  def square(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * x**2

  case = Case(
    name="square",
    sizes={},
    inputs="a number",
    functions={"once": square, "tenfold": square},
    args=(jnp.float32(3.0),),
    value=lambda y: y,
    reference="by hand",
    own={"once": (jnp.float32(1.0),), "tenfold": (jnp.float32(10.0),)},
    values={"tenfold": lambda y: y / 8},
    truth=lambda: jnp.float32(9.0),
  )
  once, tenfold = measure(case, repeats=1, warm_seconds=0.0)
  assert once["error"] == 0 and tenfold["error"] == pytest.approx(0.25)
  assert once["flops"] is None and once["reference"] == "by hand"


def test_a_run_that_is_interrupted_leaves_what_it_measured(program, tmp_path, monkeypatch):
  whole = bench_quant.cases

  def interrupted(sizes):
    yield next(iter(whole(sizes)))
    raise KeyboardInterrupt

  monkeypatch.setattr(bench_quant, "cases", interrupted)
  out = tmp_path / "part.jsonl"
  assert program("bench", *QUICK, f"--out={out}").code == 130
  assert [json.loads(line)["case"] for line in out.read_text().splitlines()] == ["quantise"]


def test_each_implementation_is_traced(program, tmp_path):
  flags = ("--only=read", f"--profile={tmp_path / 'traces'}", f"--out={tmp_path / 'x.jsonl'}")
  done = program("bench", *QUICK, *flags)
  assert done.code == 0, done.stderr
  (place,) = (tmp_path / "traces" / "read_the_packed_cache").iterdir()
  assert [each.name for each in place.iterdir()] == ["jnp"]
  assert list(place.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (("--suite=nothing",), "attention|block|elementwise|gemm|quant|sp|step|vae"),
    (("--steps=4,0",), "--steps=4,0 must be numbers of at least 1, such as 4,2"),
    (("--steps=two",), "--steps=two must be numbers of at least 1"),
    (("--profile=README.md",), "README.md: it is a file; give the name of a folder"),
    (
      ("--only=read", "--implementations=jnp,kernal"),
      "--implementations has 'kernal'; here --suite=quant has jnp",
    ),
  ],
)
def test_what_cannot_be_timed_is_refused_in_one_line(program, tmp_path, flags, said):
  done = program("bench", *QUICK, *flags, f"--out={tmp_path / 'x.jsonl'}")
  assert done.code == 2 and said in done.stderr and done.stderr.count("\n") == 1


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


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--parts=pictures", "--parts has 'pictures'; use some of latents, decode, frames"),
    ("--parts=", "--parts is empty; use some of latents, decode, frames"),
    ("--parts= ", "--parts has ''; use some of latents, decode, frames"),
    ("--blocks=99999999999999999999", "--blocks=99999999999999999999 must be at most 99997"),
    ("--blocks=99998", "--blocks=99998 must be at most 99997"),
  ],
)
def test_parts_and_blocks_that_cannot_be_timed(program, tmp_path, flag, said):
  done = program("bench_rollout", *TINY, flag, f"--out={tmp_path / 'x'}")
  assert done.code == 2 and said in done.stderr and done.stderr.count("\n") == 1
  assert not done.stdout and not list(tmp_path.iterdir())


def test_the_most_blocks_are_those_of_a_script(program, tmp_path, monkeypatch):
  asked = []

  def measure(experiment, make, parts, blocks):
    asked.append(bench_rollout.script_of(experiment, blocks))
    raise KeyboardInterrupt

  monkeypatch.setattr(bench_rollout, "measure", measure)
  out = f"--out={tmp_path / 'x'}"
  assert program("bench_rollout", *TINY, "--blocks=99997", out).code == 130
  assert [shot.blocks for shot in asked[0].shots] == [MOST_BLOCKS]
