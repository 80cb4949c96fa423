"""Samplers and stories for the tests of live sessions."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from longlive_jax.config import Experiment, Quant
from longlive_jax.config.load import from_flags, from_json, to_json
from longlive_jax.data.prompts import Script, Shot
from longlive_jax.model.dit import declare_dit
from longlive_jax.parallel.mesh import replicate, sampling_mesh
from longlive_jax.parallel.share import shared_ops
from longlive_jax.sample.sampler import Models, Sampler
from longlive_jax.sample.session import Session
from tests.sample.tiny import experiment, models

SEED = 9
# name -> dtype of the plain cache, settings of the sampler, of quantisation
CACHES: dict[str, tuple[str, dict, dict]] = {
  "float32": ("float32", {"window_latents": 6}, {}),  # slots of sink, pin and own block
  "bfloat16": ("bfloat16", {"window_latents": 6, "pin_shots": False, "recache_cuts": True}, {}),
  "nvfp4": (
    "float32",
    {"window_latents": 6, "sink_latents": 0, "guidance": 1.5},
    {"cache": "nvfp4", "cache_smoothing": "tokens"},
  ),
  "fp8": ("float32", {"window_latents": 6}, {"cache": "fp8"}),
}
# first block -> what is pushed before it; from block 3 on the window is full
STORY = {
  0: ("a red circle", "cut"),
  2: ("it rises", "keep"),
  4: ("it falls", "recache"),
  5: ("a blue square", "cut"),
  7: ("it rises", "recache"),
}
BLOCKS = 8


def settings(name: str, seq: int = 1, **sample: object) -> Experiment:
  """The experiment of a cache, with heads of 16 channels."""
  dtype, own, quant = CACHES[name]
  config = from_json(to_json(experiment(**own | sample)))
  config.model.width, config.model.dtype, config.quant = 32, dtype, Quant(**quant)
  config.parallel.seq = seq
  return from_flags(config)


@functools.cache
def parts() -> Models:
  """Networks and weights of all samplers."""
  return models(settings("float32"))


@functools.cache
def sampler_of(name: str, seq: int = 1) -> Sampler:
  """The sampler of a cache, on one device or on several that share each block."""
  config = settings(name, seq)
  made = dataclasses.replace(parts(), experiment=config, dit=declare_dit(config.model))
  if seq > 1:
    mesh = sampling_mesh(config)
    made = dataclasses.replace(
      made, params=replicate(made.params, mesh), ops=shared_ops(made.ops, mesh)
    )
  return Sampler(made)


def script_of(story: dict[int, tuple[str, str]], blocks: int) -> Script:
  """The story as a script."""
  ends = [*list(story)[1:], blocks]
  shots = [
    Shot(prompt, end - first, transition=transition)
    for (first, (prompt, transition)), end in zip(story.items(), ends, strict=True)
  ]
  return Script(tuple(shots), seed=SEED)


@functools.cache
def expected(name: str, seq: int = 1) -> tuple[np.ndarray, ...]:
  """Frames of each block of the story, made from a script."""
  return tuple(sampler_of(name, seq).stream(script_of(STORY, BLOCKS)))


def play(session: Session, blocks: Sequence[int] | range) -> Iterator[np.ndarray]:
  """Frames of these blocks of the story, which is pushed as it goes on."""
  for block in blocks:
    if block in STORY:
      assert session.push(*STORY[block]) == block
    yield session.next_block()


def check_blocks(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
  """Blocks are the same to the bit."""
  assert len(found) == len(wanted)
  for block, (a, b) in enumerate(zip(found, wanted, strict=True)):
    np.testing.assert_array_equal(a, b, err_msg=f"block {block}")
