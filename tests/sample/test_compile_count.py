"""After `prepare` nothing is traced or compiled: not for a longer video, another prompt, a cut,
another seed, a prefix, or prompts computed again.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.data.prompts import Script, Shot
from longlive_jax.sample.sampler import Sampler
from tests.sample.compiles import counting
from tests.sample.tiny import BLOCK, experiment, models

SHORT = Script.of("one", blocks=1)
LONG = Script(
  (
    Shot("a red circle", blocks=3),
    Shot("a blue square", blocks=3),
    Shot("it rises", blocks=1, transition="keep"),
    Shot("it falls", blocks=2, transition="recache"),
    Shot("a red circle", blocks=1),
  )
)
OTHER = Script((Shot("one", blocks=4), Shot("two", blocks=6, transition="recache")), seed=9)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
  made = Sampler(models(experiment(window_latents=4, pin_shots=False)))
  made.prepare()
  made.prepare(2)
  return made


@pytest.fixture(autouse=True)
def nothing_compiled_by_others() -> None:
  """Forgets the small functions that other tests have already compiled."""
  jax.clear_caches()


def test_the_counter_counts():
  with counting() as counts:
    jax.jit(lambda x: 3 * x + 1)(jnp.ones(()))
  assert counts["traces"] >= 1 and counts["compilations"] >= 1
  after = dict(counts)
  jax.jit(lambda x: 3 * x + 2)(jnp.ones(()))
  assert dict(counts) == after


PREFIX = np.zeros((1, 2 * BLOCK, 2, 4, 4), np.float32)
RUNS = {
  "the first video": ([SHORT], {}),
  "a longer one with cuts and other prompts": ([LONG], {}),
  "another seed": ([dataclasses.replace(LONG, seed=123)], {}),
  "another index": ([LONG], dict(first_index=17)),
  "a video that goes on": ([LONG], dict(prefix=PREFIX)),
  "a prefix on the device": ([LONG], dict(prefix=jax.device_put(PREFIX))),
  "a batch whose samples differ": ([LONG, OTHER], {}),
  "the batch the other way round": ([OTHER, LONG], {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_compiles_after_the_start(sampler: Sampler, name: str):
  scripts, options = RUNS[name]
  with counting() as counts:
    for frames in sampler.stream_batch(scripts, **options):
      assert frames.dtype == np.uint8
  assert not counts


def test_a_prompt_that_was_never_seen_compiles_nothing(sampler: Sampler):
  with counting() as counts:
    for prompt in ("", "a", "Zwölf Füße", "x" * 23):
      sampler.embed(prompt)
  assert not counts


def test_a_second_prepare_is_free(sampler: Sampler):
  with counting() as counts:
    assert sampler.prepare() is sampler.prepare(1)
    assert sampler.prepare(2) is not sampler.prepare()
  assert not counts


def test_an_image_compiles_once(sampler: Sampler):
  image = np.zeros((1, 32, 64, 3), np.uint8)
  next(sampler.stream(SHORT, images=image))
  with counting() as counts:
    next(sampler.stream(LONG, images=image + 1))
  assert not counts


def test_a_fill_level_has_its_own_executable_and_no_other_is_needed(sampler: Sampler):
  engine = sampler.prepare().engine
  assert list(engine.denoise) == list(engine.commit) == [1, 2]
