"""Scripts in, frames out: the sampler that the command line, evaluation and servers use.

`Sampler.prepare` compiles everything for a batch size; after that any script of any length runs
without compiling. Frames leave block by block, so memory does not grow with the length.

    for frames in sampler.stream(script):   # uint8 [29, H, W, 3], then [32, H, W, 3], ...
      ...

Noise is keyed by (seed, index of the script, block): the same script gives the same video
whatever else is in its batch.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.data.prompts import BlockPlan, BlockPrompt, Script, expand
from longlive_jax.model import solvers
from longlive_jax.model.module import Network
from longlive_jax.model.ops import REFERENCE, Ops
from longlive_jax.model.tokenizer import Tokenizer
from longlive_jax.sample.block import Denoiser, Texts
from longlive_jax.sample.compiled import Compiled, Keys
from longlive_jax.sample.decoder import Decoder, encode_frames
from longlive_jax.sample.embed import Embedder
from longlive_jax.sample.latents import block_noise, block_shape, split_blocks, watched
from longlive_jax.sample.rollout import Engine
from longlive_jax.sample.together import together
from longlive_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Models:
  """Networks with their parameters.

  Attributes:
    experiment: checked experiment.
    dit, vae, text: declared networks.
    params: {"dit": ..., "vae": ..., "text": ...}.
    tokenizer: of the text encoder.
    ops: how the transformer multiplies, attends and normalises.
  """

  experiment: Experiment
  dit: Network
  vae: Network
  text: Network
  params: dict[str, PyTree]
  tokenizer: Tokenizer
  ops: Ops = REFERENCE


class Sampler:
  """Generates videos from scripts.

  Args:
    models: networks and parameters.

  Attributes:
    embed: embeddings of prompts.
  """

  def __init__(self, models: Models):
    self.models = models
    self.experiment = models.experiment
    self._compiled: dict[int, Compiled] = {}
    text = self.experiment.model.text
    self.embed = Embedder(text, models.text, models.params["text"], models.tokenizer)

  def prepare(self, batch: int = 1) -> Compiled:
    """Compiles everything that videos of this batch size need; a second call is free."""
    if batch not in self._compiled:
      models, sample = self.models, self.experiment.sample
      plan = solvers.plan(sample.solver, sample.steps, self.experiment.model.shift)
      denoiser = Denoiser(models.dit, self.experiment.model, plan, sample.guidance, models.ops)
      shape = block_shape(self.experiment, batch)
      made = together(
        {
          "engine": lambda: Engine(denoiser, self.experiment, models.params["dit"], batch),
          "decoder": lambda: Decoder(
            *(models.vae, models.params["vae"], shape), sample.decode_latents, sample.decode_tiles
          ),
          "text": self.embed.compile,
        }
      )
      engine, decoder = made["engine"], made["decoder"]
      seeds = jax.ShapeDtypeStruct((batch,), jnp.uint32)
      number = jax.ShapeDtypeStruct((), jnp.int32)
      draw = jax.jit(lambda s, i, b: block_noise(s, i, b, shape[1:]))
      noise = draw.lower(seeds, seeds, number).compile()
      finite = jax.jit(lambda x: jnp.isfinite(x).all()).lower(engine.latents).compile()
      self._compiled[batch] = Compiled(engine, decoder, noise, finite)
    return self._compiled[batch]

  def generate(self, script: Script, **options: Any) -> np.ndarray:
    """The whole video of a script, uint8 `[T, H, W, 3]`; options as for `stream`."""
    return np.concatenate(list(self.stream(script, **options)))

  def stream(self, script: Script, **options: Any) -> Iterator[np.ndarray]:
    """Yields the frames of one script block by block; see `stream_batch`."""
    for frames in self.stream_batch([script], **options):
      yield frames[0]

  def stream_batch(
    self,
    scripts: Sequence[Script],
    *,
    first_index: int = 0,
    images: Array | np.ndarray | None = None,
    prefix: Array | np.ndarray | None = None,
  ) -> Iterator[np.ndarray]:
    """Yields the frames of several scripts block by block.

    Args:
      scripts: with equal numbers of blocks; prompts, cuts and seeds may differ.
      first_index: index of the first script, part of the noise's key.
      images: image-to-video: `[B, H, W, 3]` uint8, the first frame of each video.
      prefix: video extension: latents `[B, P * F, H, W, C]` that come before the script, whole
        blocks; their frames are yielded too.

    Yields:
      uint8 `[B, T, H, W, 3]`; T is 4 F - 3 for the first block of F latents and 4 F after.

    Raises:
      ValueError: scripts of different lengths, a prompt too long, shapes that do not fit, a prefix
        that is not finite, or both images and a prefix.
      FloatingPointError: a block came out with numbers that are not finite.
    """
    latents = self.latent_blocks(scripts, first_index=first_index, images=images, prefix=prefix)
    state, waiting = None, None
    for number, block in enumerate(latents):
      frames, state = self.prepare(len(scripts)).decoder.decode(block, state)
      if waiting is not None:
        yield np.asarray(waiting)
      if number == 0:  # at once: whoever fills the queue of a device may have to wait for it
        yield np.asarray(frames)
      else:  # when the next block is under way
        waiting = frames
    if waiting is not None:
      yield np.asarray(waiting)

  def latent_blocks(
    self,
    scripts: Sequence[Script],
    *,
    first_index: int = 0,
    images: Array | np.ndarray | None = None,
    prefix: Array | np.ndarray | None = None,
  ) -> Iterator[Array]:
    """Yields the latents `[B, F, H, W, C]` of each block; arguments as for `stream_batch`."""
    plans = self.plan(scripts)
    if images is not None and prefix is not None:
      raise ValueError("images and a prefix are both given; a video that goes on takes no image")
    shape = block_shape(self.experiment, len(scripts))
    given = [] if prefix is None else split_blocks(np.asarray(prefix, np.float32), shape)
    run = self.prepare(len(scripts))
    first = None if images is None else run.decoder.encode_images(np.asarray(images))
    known, mask = run.known(first)
    seeds = [self.experiment.sample.seed if s.seed is None else s.seed for s in scripts]
    keys = np.asarray(seeds, np.uint32), first_index + np.arange(len(scripts), dtype=np.uint32)
    blocks = self._rollout(run, plans, given, keys, known, mask)
    yield from watched(blocks, run.finite)

  def _rollout(
    self,
    run: Compiled,
    plans: Sequence[BlockPlan],
    given: Sequence[np.ndarray],
    keys: Keys,
    known: np.ndarray,
    mask: np.ndarray,
  ) -> Iterator[Array]:
    """Yields the given blocks, then a sampled one for each entry of the plans."""
    params, state = self.models.params["dit"], run.engine.start()
    prompts = [plan[0].prompt for plan in plans]
    texts = self.texts(run, prompts)
    for block in given:
      entries = [BlockPrompt(prompt, 0) for prompt in prompts]
      latents, state = run.absorb(params, state, texts, entries, block)
      yield latents
    for entries in zip(*plans, strict=True):
      if prompts != [entry.prompt for entry in entries]:
        prompts = [entry.prompt for entry in entries]
        texts = self.texts(run, prompts)
      latents, state = run.sample(params, state, texts, entries, keys, known, mask)
      mask = np.zeros_like(mask)
      yield latents

  def encode_video(self, frames: np.ndarray) -> np.ndarray:
    """Latents `[F, h, w, C]` of a video uint8 `[T, H, W, 3]`, to be extended.

    The last frames that do not fill a block of latents are left out.

    Raises:
      ValueError: fewer frames than one block.
    """
    block = self.experiment.model.block_latents
    blocks = (len(frames) + 3) // (4 * block)
    if blocks == 0:
      raise ValueError(
        f"the video to extend has {len(frames)} frames; it must have at least {4 * block - 3}"
      )
    return encode_frames(
      self.models.vae, self.models.params["vae"], frames[: 4 * block * blocks - 3]
    )

  def plan(self, scripts: Sequence[Script]) -> list[BlockPlan]:
    """Prompts and transitions of every block, checked before anything is computed.

    Raises:
      ValueError: no script, or scripts of different lengths, or a prompt that is too long.
    """
    if not scripts:
      raise ValueError("at least one script is needed")
    sample, model = self.experiment.sample, self.experiment.model
    fps = self.experiment.video.fps
    plans = [expand(s, fps, model.block_latents, sample.cut_prefix) for s in scripts]
    lengths = sorted({len(plan) for plan in plans})
    if len(lengths) > 1:
      raise ValueError(
        f"scripts of one batch must have equal numbers of blocks, found {lengths};"
        " generate them one by one or change their blocks"
      )
    self.models.tokenizer(sorted({e.prompt for e in itertools.chain(*plans)}))
    return plans

  def texts(self, run: Compiled, prompts: Sequence[str]) -> Texts:
    """Text keys and values of a block's prompts, one a sample; one entry a guidance branch."""
    params = self.models.params["dit"]
    texts = [run.engine.text_kv(params, np.stack([self.embed(p) for p in prompts]))]
    if run.engine.branches > 1:
      negative = self.embed(self.experiment.sample.negative_prompt)
      texts.append(run.engine.text_kv(params, np.stack([negative] * len(prompts))))
    return tuple(texts)
