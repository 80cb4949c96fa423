"""Error recycling: buckets, a scripted sequence of additions and draws, and six training steps."""

import random
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax.config.schema import Recycling
from longlive_jax.model import flow
from longlive_jax.train.error_bank import ErrorBank, Recycler, bucket_of
from longlive_jax.train.teacher_forcing import Batch, prepare
from tests.parity.records import Compared, Refused, compare

ATOL, RTOL = 1e-5, 1e-5


def check(archive: Mapping[str, np.ndarray], config: dict) -> Iterator[Compared | Refused]:
  """Checks a file of this layout."""
  rates = config["probs"]
  cfg = Recycling(
    buckets=config["num_buckets"],
    bucket_size=config["max_size"],
    modulation=config["modulate_factor"],
    context_share=rates["context"],
    latent_share=rates["latent"],
    noise_share=rates["noise"],
    clean_share=rates["clean"],
    clean_update_share=rates["clean_buffer_update"],
  )
  yield compare_exactly("bucket/t_bucket_0_999", [bucket_of(cfg, i) for i in range(1000)], archive)
  for name in ("bucket/nearest_owned", "bucket/owned"):
    yield Refused(name, "every process holds all buckets, whatever the mesh")
  yield from check_sequence(archive, cfg, config["py_seed_seq"])
  yield from check_steps(archive, cfg, config)


def compare_exactly(name: str, ours: object, archive: Mapping[str, np.ndarray]) -> Compared:
  """Compares whole numbers."""
  return compare(name, np.asarray(ours), archive[name], 0.0, 0.0)


def check_sequence(
  archive: Mapping[str, np.ndarray], cfg: Recycling, seed: int
) -> Iterator[Compared]:
  """Additions and three kinds of draws, in the recorded order of random numbers."""
  bank, errors = ErrorBank(cfg, random.Random(seed)), archive["seq/errors"]
  samples, valid = np.zeros_like(archive["seq/samples"]), np.zeros((len(errors), 3), bool)
  for i, (error, index) in enumerate(zip(errors, archive["seq/t_index"], strict=True)):
    bank.add(error, int(index))
    drawn = bank.sample(int(index)), bank.sample_any(), bank.sample_any()
    for kind, sample in enumerate(drawn):
      if sample is not None:
        samples[i, kind], valid[i, kind] = sample, True
  yield compare("seq/samples", samples, archive["seq/samples"], ATOL, RTOL)
  yield compare_exactly("seq/sample_valid", valid, archive)
  yield compare_exactly("seq/total_added", bank.added, archive)


def check_steps(
  archive: Mapping[str, np.ndarray], cfg: Recycling, config: dict
) -> Iterator[Compared]:
  """Steps of the objective with the recorded stand-in for a network."""
  table = flow.training_table(5.0)
  recycler = Recycler(cfg, config["py_seed_loss"], config["bs"])
  found = {name: [] for name in ("noisy_input", "clean_input", "x0_pred", "loss", "flags")}
  for step in range(config["steps"]):
    clean, noise = (np.moveaxis(archive[f"loss/{k}"][step], 2, -1) for k in ("clean", "noise"))
    indices = archive["loss/index"][step]
    times = np.asarray(table.timesteps)[indices]
    injection = recycler.draw(indices, clean.shape)
    inputs = prepare(Batch(clean, noise, times, jnp.zeros(0), errors=injection.arrays()), table)
    wave = 0.1 * np.sin(times / 100.0)[..., None, None, None]
    velocity = 0.3 * inputs.noisy - 0.7 * inputs.context + wave
    restored = flow.to_clean(inputs.noisy, velocity, inputs.sigmas)
    wrong = np.asarray(velocity - inputs.target)
    sigmas = np.asarray(inputs.sigmas)[..., None, None, None]
    recycler.keep(injection, indices, np.asarray(restored) - clean, (1 - sigmas) * wrong)
    found["noisy_input"].append(np.moveaxis(np.asarray(inputs.noisy), -1, 2))
    found["clean_input"].append(np.moveaxis(np.asarray(inputs.context), -1, 2))
    found["x0_pred"].append(np.moveaxis(np.asarray(restored), -1, 2))
    found["loss"].append(np.mean(np.mean(wrong**2, (2, 3, 4)) * np.asarray(inputs.weights)))
    given = (injection.context, injection.latents, injection.noise)
    found["flags"].append([*(each is not None for each in given), recycler.latents.added])
  for name in ("noisy_input", "clean_input", "x0_pred", "loss"):
    yield compare(f"loss/{name}", np.stack(found[name]), archive[f"loss/{name}"], ATOL, RTOL)
  yield compare_exactly("loss/flags", found["flags"], archive)
