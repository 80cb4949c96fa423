"""A live session: one video, made block by block while its prompts arrive.

    session = Session(sampler, seed=7)
    session.push("one red circle moving right, over snow")
    frames = session.next_block()  # uint8 [29, H, W, 3]
    session.cut("one purple triangle moving up, over sand")
    frames = session.next_block()  # uint8 [32, H, W, 3]

The frames are, to the bit, those of a script with these prompts, as both make their blocks with
`Compiled.sample`. A session is a value and a name for it: each block turns one `Moment` into the
next, and fork, rewind, park, save and load are copies of moments to one place or another.
Sessions of one sampler may take turns; one session belongs to one thread at a time.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from longlive_jax.checks import check_shape
from longlive_jax.data.prompts import Shot, first_block
from longlive_jax.sample.aside import ASIDE
from longlive_jax.sample.block import Texts
from longlive_jax.sample.latents import not_finite, split_blocks
from longlive_jax.sample.moment import Account, Moment, Status, on_host, overwritten, status
from longlive_jax.sample.sampler import Sampler
from longlive_jax.sample.session_files import Saved, read_session, write_session
from longlive_jax.types import Array

KEEP = 3  # restore points


class Session:
  """One video in the making.

  Every method raises ValueError on a session that is closed.

  Args:
    sampler: prepared here for a batch of one if it is not yet.
    seed: of the noise, 0 <= seed < 2**32; None = `sample.seed`.
    index: part of the noise's key like the seed, the index of a script in `stream_batch`.
    image: uint8 `[H, W, 3]`, the first frame.
    keep: blocks that `rewind` can go back. Each takes host memory (`aside.py`) for a slot of the
      cache and the decoder's state, 5.4 GiB at 5B in bfloat16, 3.7 with the NVFP4 cache; one under
      `recache`, or a cut under `sample.recache_cuts`, for all slots but the sink. 0 = none.

  Raises:
    ValueError: an image of another size, a number out of range, or a sampler some of whose devices
      belong to another process.
  """

  def __init__(
    self,
    sampler: Sampler,
    *,
    seed: int | None = None,
    index: int = 0,
    image: np.ndarray | None = None,
    keep: int = KEEP,
  ):
    self.sampler = sampler
    self.seed = sampler.experiment.sample.seed if seed is None else seed
    self.index, self.keep = index, keep
    for name, value in (("seed", self.seed), ("index", index), ("keep", keep)):
      if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 0 and below 2**32")
    self._run = run = sampler.prepare()
    if not run.engine.latents.sharding.is_fully_addressable:
      raise ValueError("a session needs a sampler all of whose devices are of this process")
    self._first = None if image is None else run.decoder.encode_images(np.asarray(image)[None])
    self._keeper, self._cut_prefix = run.keeper, sampler.experiment.sample.cut_prefix
    self._moment: Moment | None = Moment(run.engine.start(), None, Account())
    self._gone = ""  # why there is no moment
    self._points: tuple[Moment, ...] = ()
    self._text: tuple[str, Texts] | None = None

  def push(self, prompt: str, transition: str = "keep") -> int:
    """Says what is shown from the next block on.

    Until that block is made, a later push takes the place of an earlier one.

    Args:
      prompt: not empty once cleaned; at most `model.text.length` tokens, with the cut's prefix.
      transition: "keep", "recache" or "cut" as in a script; without effect at the first block.

    Returns:
      Index of the block at which it takes effect.

    Raises:
      ValueError: a prompt or transition that does not work; then nothing has changed.
    """
    moment, shot = self._now(), Shot(prompt, transition=transition)
    made = moment.account.made
    first = first_block(shot, made[-1] if made else None, self._cut_prefix)
    self.sampler.models.tokenizer(sorted({first.prompt, prompt}))
    account = dataclasses.replace(moment.account, pending=shot)
    self._moment = dataclasses.replace(moment, account=account)
    return moment.rollout.block

  def cut(self, prompt: str) -> int:
    """Begins a new shot with the next block: `push(prompt, "cut")`."""
    return self.push(prompt, "cut")

  def next_block(self) -> np.ndarray:
    """Makes the next block.

    Returns:
      Frames uint8 `[T, H, W, 3]`; T is 4 F - 3 for the first block of F latents and 4 F after.

    Raises:
      ValueError: nothing was pushed yet.
      FloatingPointError: the block has numbers that are not finite. It counts as made; `rewind`
        takes it back.
    """
    return self._advance(None)

  def extend(self, latents_or_video: Array | np.ndarray) -> np.ndarray:
    """Goes on with blocks that are given, as if they had been sampled.

    What was pushed takes effect at the first of them.

    Args:
      latents_or_video: whole blocks of latents `[P * F, h, w, C]`, or a video uint8
        `[T, H, W, 3]`, of which last frames that do not fill a block are left out.

    Returns:
      Their frames as this session decodes them, uint8 `[T, H, W, 3]` as for `next_block`.

    Raises:
      ValueError: nothing was pushed yet, it has another shape or less than a block, it is not
        finite, or the session begins with an image and has no block yet.
    """
    moment, given = self._now(), np.asarray(latents_or_video)
    if self._first is not None and moment.rollout.block == 0:
      raise ValueError("the session begins with an image: make its first block before it goes on")
    moment.account.enter(self._cut_prefix)
    if given.dtype != np.uint8 and not jnp.issubdtype(given.dtype, jnp.floating):
      raise ValueError(f"latents are {given.dtype}; they must be floats, or a video uint8")
    if given.dtype == np.uint8:
      video = self.sampler.experiment.video
      check_shape("the video to go on with", given.shape, (None, video.height, video.width, 3))
      given = self.sampler.encode_video(given)
    blocks = split_blocks(given[None].astype(np.float32), self._run.engine.block_shape)
    return np.concatenate([self._advance(block) for block in blocks])

  def _advance(self, given: np.ndarray | None) -> np.ndarray:
    """Frames of the next block, sampled or given."""
    self.unpark()
    moment, run, params = self._now(), self._run, self.sampler.models.params["dit"]
    block = moment.rollout.block
    entry, account = moment.account.enter(self._cut_prefix)
    step = params, moment.rollout, self._texts(entry.prompt), [entry]
    lost = overwritten(run.engine.schedule, moment.rollout, entry) if self.keep else []
    slots = self._keeper.take(moment, lost)  # a point to go back to leaves beside the block's work
    point = ASIDE.start((moment.decoder, slots)) if self.keep else None
    self._lose(f"block {block} was interrupted: load the session again or begin another")
    if given is None:
      keys = np.asarray([self.seed], np.uint32), np.asarray([self.index], np.uint32)
      latents, rollout = run.sample(*step, keys, *run.known(None if block else self._first))
    else:
      latents, rollout = run.absorb(*step, given)
    if point:
      self._points = (*self._points, on_host(moment, *point()))[-self.keep :]
    finite, (frames, decoder) = run.finite(latents), run.decoder.frames(latents, moment.decoder)
    self._moment = Moment(rollout, decoder, account).with_host_history()
    if not finite:
      raise not_finite(block + 1)
    return frames[0]

  def _texts(self, prompt: str) -> Texts:
    """Text keys and values of a prompt; those of the last one are kept."""
    if self._text is None or self._text[0] != prompt:
      self._text = prompt, self.sampler.texts(self._run, [prompt])
    return self._text[1]

  def fork(self) -> "Session":
    """An independent session that goes on from here, with the same seed.

    It has its own cache and decoder state on the devices (or none, if this one is parked), and
    shares what never changes, such as restore points.
    """
    moment, other = self._now(), copy.copy(self)
    other._moment = self._keeper.copied(moment)
    return other

  def rewind(self, block: int) -> None:
    """Goes back to just before a block was made, with what was pushed for it still pending.

    Args:
      block: its index; the next block's own changes nothing.

    Raises:
      ValueError: the block is not made yet, or too long ago; names the oldest that will do.
    """
    newest, oldest = self.block, self._oldest
    if not isinstance(block, int | np.integer) or not oldest <= block <= newest:
      raise ValueError(
        f"the session cannot go back to block {block}: the oldest that will do is {oldest} of"
        f" {newest}; keep={self.keep} (--rewind_blocks of launch.serve) says how many are kept"
      )
    if block == newest:
      return
    self.unpark()
    moment, points = self._now(), [p for p in self._points if p.rollout.block >= block]
    slots = {s: part for p in reversed(points) for s, part in (p.slots or {}).items()}
    self._lose("going back was interrupted: load the session again or begin another")
    target = dataclasses.replace(points[0], slots=slots)
    self._moment = self._keeper.on_devices(target, moment.rollout.caches)
    self._points = tuple(p for p in self._points if p.rollout.block < block)

  def park(self) -> None:
    """Moves cache and decoder state to host memory, and forgets the text's keys and values.

    A parked session goes on by itself with its next block; nothing of its video changes.
    """
    moment = self._now()
    self._moment, self._text = self._keeper.all_on_host(moment), None
    moment.delete()

  def unpark(self) -> None:
    """Moves a parked session back to the devices."""
    moment = self._now()
    if moment.slots is not None:
      self._moment = self._keeper.on_devices(moment)

  def snapshot(self) -> Callable[[str | Path], None]:
    """What `save` would do now, for any time and thread; holds the cache in host memory."""
    saved = Saved(self.seed, self.index, self._keeper.all_on_host(self._now()), self._first)
    engine, experiment = self._run.engine, self.sampler.experiment
    return lambda path: write_session(path, saved, engine, experiment)

  def save(self, path: str | Path) -> None:
    """Writes the session to a folder, which appears when it is complete.

    Restore points are not written.

    Args:
      path: of the folder; an older save there is replaced.

    Raises:
      OSError: it cannot be written.
      ValueError: the folder holds something else.
    """
    self.snapshot()(path)

  @classmethod
  def load(cls, sampler: Sampler, path: str | Path, *, keep: int = KEEP) -> "Session":
    """Goes on with a saved session, to the bit if the devices are as many as those that saved it.

    Args:
      sampler: of the same model, weights and settings of `sample` and `quant`; on any mesh.
      path: of the folder.
      keep: as for the constructor; blocks made before the save cannot be taken back.

    Raises:
      FileNotFoundError: there is no saved session.
      ValueError: it is damaged, or of another experiment, whose settings are named.
    """
    run = sampler.prepare()
    saved = read_session(path, run.engine, run.keeper.part, run.decoder.state, sampler.experiment)
    session = cls(sampler, seed=saved.seed, index=saved.index, keep=keep)
    session._first, session._moment = saved.first, saved.moment
    session.unpark()
    return session

  @property
  def block(self) -> int:
    """Index of the next block: how many are made."""
    return self._now().rollout.block

  @property
  def _oldest(self) -> int:
    """The oldest block that `rewind` can go back to."""
    return self._points[0].rollout.block if self._points else self.block

  def describe(self) -> Status:
    """Where the session stands, as plain values (`dataclasses.asdict` makes JSON of it)."""
    cache = self._run.engine.caches
    return status(self._now(), self._points, cache, self.sampler.experiment)

  def close(self) -> None:
    """Frees the memory of the session; forks go on. A second call does nothing."""
    if self._moment is not None:
      self._moment.delete()
    self._lose("the session is closed")
    self._points, self._text = (), None

  def _now(self) -> Moment:
    """The moment between the last block and the next one."""
    if self._moment is None:
      raise ValueError(self._gone)
    return self._moment

  def _lose(self, why: str) -> None:
    """Lets go of the moment, whose arrays are about to be donated or deleted."""
    self._moment, self._gone = None, why
