"""A live session makes the video of the script, to the bit, whatever happens between its blocks."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from longlive_jax.data.prompts import BlockPrompt, Script, Shot
from longlive_jax.model.kv_cache import Window, admit, keep_sink
from longlive_jax.sample.moment import overwritten
from longlive_jax.sample.rollout import RolloutState
from longlive_jax.sample.sampler import Sampler
from longlive_jax.sample.schedule import SampleState, Schedule
from longlive_jax.sample.session import Session
from tests.sample.compiles import counting
from tests.sample.live import (
  BLOCKS,
  CACHES,
  SEED,
  STORY,
  check_blocks,
  expected,
  play,
  sampler_of,
)
from tests.sample.tiny import BLOCK, experiment

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
  return sampler_of("float32")


@pytest.fixture
def session(sampler: Sampler) -> Session:
  return Session(sampler, seed=SEED)


def whole(sampler: Sampler, script: Script, **options: object) -> list[np.ndarray]:
  """Frames of a script, block by block."""
  return list(sampler.stream(script, **options))


def last_latents(session: Session) -> np.ndarray:
  """Latents `[1, F, H, W, C]` of the last block."""
  return session._now().rollout.history[-1][1]


@pytest.mark.parametrize("name", CACHES)
def test_live_is_the_script_with_a_fork_a_save_and_a_pause_in_between(name: str, tmp_path: Path):
  sampler = sampler_of(name)
  session = Session(sampler, seed=SEED)
  frames = list(play(session, range(3)))
  session = session.fork()
  frames += play(session, range(3, 5))
  session.save(tmp_path / "saved")
  session.close()
  session = Session.load(sampler, tmp_path / "saved")
  frames += play(session, range(5, 6))
  session.park()
  frames += play(session, range(6, BLOCKS))
  check_blocks(frames, expected(name))


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("keep", [1, 4])
def test_going_back_gives_the_same_frames_to_the_bit(name: str, keep: int):
  """At every block, with all that the restore points reach; pins, cuts and recaches among them."""
  session, wanted = Session(sampler_of(name), seed=SEED, keep=keep), expected(name)
  for block in range(BLOCKS):
    list(play(session, [block]))
    for back in range(1, min(keep, block + 1) + 1):
      first = block + 1 - back
      session.rewind(first)
      assert session.block == first
      check_blocks(list(play(session, range(first, block + 1))), wanted[first : block + 1])


@pytest.mark.parametrize("seed", range(40))
def test_what_a_block_overwrites_or_forgets_is_all_that_differs_afterwards(seed: int):
  """Of random policies and stories; contents of slots are numbers of the writes that made them."""
  rng = random.Random(seed)
  sink, pin = rng.randrange(3), rng.random() < 0.5
  window = Window(sink + pin + rng.randint(1, 4), sink)
  config = dataclasses.replace(
    Schedule.of(experiment()), window=window, pin=pin, recache_cuts=rng.random() < 0.5
  )
  state, contents, past = SampleState(), [0] * window.slots, []
  writes = itertools.count(1)
  for block in range(14):
    transition = rng.choice(["cut", "recache", None, None]) if block else "start"
    entry = BlockPrompt("", 0, transition)
    lost = overwritten(config, RolloutState(block, (state,), ()), entry)
    past.append((state, list(contents), {slot: contents[slot] for slot in lost}))
    if transition == "recache":
      old, pinned = state.slots, state.slots.pin
      slots = keep_sink(old, window)
      for other in sorted(set(old.blocks) - set(slots.blocks)):
        slots, slot = admit(slots, other, 0.0, window)
        contents[slot] = next(writes)
      state = SampleState(dataclasses.replace(slots, pin=pinned), state.cuts)
    for step in (config.enter, config.settle):
      (state,), tables = step((state,), block, [transition == "cut"])
      contents[int(tables.slot[0])] = next(writes)
    now = list(contents)
    for before, wanted, kept in reversed(past):
      for slot, content in kept.items():
        now[slot] = content
      assert now[: before.slots.level] == wanted[: before.slots.level]


def test_going_back_and_on_with_other_prompts_is_the_video_of_those(sampler: Sampler):
  session = Session(sampler, seed=SEED)
  list(play(session, range(6)))
  session.rewind(3)
  session.push("a red circle", "recache")
  frames = [session.next_block() for _ in range(2)]
  session.cut("it falls")
  frames.append(session.next_block())
  shots = Shot("a red circle", 2), Shot("it rises", 1, transition="keep")
  shots = *shots, Shot("a red circle", 2, transition="recache"), Shot("it falls", 1)
  check_blocks(frames, whole(sampler, Script(shots, seed=SEED))[3:])


def test_going_back_keeps_what_was_pushed_for_that_block(session: Session):
  frames = list(play(session, range(BLOCKS)))
  session.rewind(BLOCKS - 1)
  assert session.describe().pending == STORY[BLOCKS - 1]
  check_blocks([session.next_block()], frames[-1:])
  session.rewind(BLOCKS)  # changes nothing
  assert session.block == BLOCKS


def test_only_the_last_restore_points_are_kept(sampler: Sampler):
  session = Session(sampler, seed=SEED, keep=2)
  list(play(session, range(5)))
  status = session.describe()
  assert status.oldest_block == 3 and status.restore_bytes > 0
  for block in (2, 6, -1, 1.5, "4"):
    with pytest.raises(ValueError, match=f"back to block {block}: the oldest .* is 3 of 5; keep=2"):
      session.rewind(block)
  without = Session(sampler, keep=0)
  without.push("one")
  without.next_block()
  assert without.describe().restore_bytes == 0 and without.describe().oldest_block == 1
  with pytest.raises(ValueError, match="back to block 0: the oldest .* is 1 of 1; keep=0"):
    without.rewind(0)


def test_a_fork_is_independent(session: Session):
  frames = list(play(session, range(4)))
  fork = session.fork()
  fork.cut("a blue square")
  other = [fork.next_block() for _ in range(2)]
  frames += play(session, range(4, 6))
  fork.rewind(3)  # a fork can go back before it was made, and the other one does not notice
  check_blocks(list(play(fork, range(3, 6))), frames[3:])
  fork.close()
  frames += play(session, range(6, BLOCKS))
  check_blocks(frames, expected("float32"))
  assert not np.array_equal(other[0], frames[4])


def test_sessions_of_one_sampler_take_turns(sampler: Sampler):
  one, two = Session(sampler, seed=SEED), Session(sampler, seed=3, index=2)
  two.push("another")
  frames, others = [], []
  for block in range(BLOCKS):
    frames += play(one, [block])
    others.append(two.next_block())
    if block == 3:
      one.park()
  check_blocks(frames, expected("float32"))
  script = Script.of("another", blocks=BLOCKS, seed=3)
  check_blocks(others, whole(sampler, script, first_index=2))


def test_a_window_run_again_is_a_fresh_rollout_of_its_clean_latents(sampler: Sampler):
  """Of the sink under the old prompt and all else under the new one."""
  session, run = Session(sampler, seed=SEED), sampler.prepare()
  session.push("a red circle")
  for _ in range(6):
    session.next_block()
  history = dict(session._now().rollout.history)
  assert list(history) == [0, 4, 5]
  session.push("it falls", "recache")
  session.next_block()

  params = sampler.models.params["dit"]
  old, new = (sampler.texts(run, [prompt]) for prompt in ("a red circle", "it falls"))
  state = RolloutState(0, (SampleState(),), run.engine.empty())
  for block, latents in history.items():
    state = dataclasses.replace(state, block=block)
    texts, entry = (new if block else old), BlockPrompt("", 0)
    _, state = run.absorb(params, state, texts, [entry], latents)
  keys = np.asarray([SEED], np.uint32), np.zeros(1, np.uint32)
  entry = BlockPrompt("it falls", 0, "keep")
  latents, _ = run.sample(params, state, new, [entry], keys, *run.known(None))
  np.testing.assert_allclose(last_latents(session), latents, atol=1e-5)


def test_an_image_is_the_first_frame(sampler: Sampler):
  session = Session(sampler, seed=SEED, image=IMAGE)
  session.push("one")
  with pytest.raises(ValueError, match="begins with an image: make its first block before"):
    session.extend(np.zeros((BLOCK, 2, 4, 4)))
  frames = [session.next_block() for _ in range(2)]
  session.rewind(0)
  again = [session.next_block() for _ in range(2)]
  script = Script.of("one", blocks=2, seed=SEED)
  wanted = whole(sampler, script, images=IMAGE[None])
  check_blocks(frames, wanted)
  check_blocks(again, wanted)


def test_given_latents_are_those_of_a_prefix(session: Session, sampler: Sampler):
  given = np.random.default_rng(1).standard_normal((2 * BLOCK, 2, 4, 4)).astype(np.float32)
  script = Script((Shot("one", blocks=2), Shot("two", blocks=2)), seed=SEED)
  wanted = whole(sampler, script, prefix=given[None])
  session.push("one")
  first = session.extend(given[:BLOCK])
  second = session.extend(jax.numpy.asarray(given[BLOCK:]))
  frames = [first, second, session.next_block(), session.next_block()]
  session.cut("two")
  frames += [session.next_block() for _ in range(2)]
  check_blocks(frames, wanted)
  session.rewind(3)
  session.push("two")
  both = session.extend(given)
  assert both.shape == (8 * BLOCK, 32, 64, 3) and session.block == 5


def test_a_video_is_encoded_and_a_transition_takes_effect_at_its_first_block(
  session: Session, sampler: Sampler
):
  video = np.random.default_rng(2).integers(0, 256, (4 * BLOCK * 2 - 1, 32, 64, 3), np.uint8)
  session.push("one")
  session.next_block()
  session.cut("two")
  frames = session.extend(video)
  assert frames.shape == (8 * BLOCK, 32, 64, 3) and session.block == 3
  assert session.describe().prompts[1:] == (
    BlockPrompt("Cut. two", 1, "cut"),
    BlockPrompt("two", 1),
  )
  np.testing.assert_array_equal(last_latents(session)[0], sampler.encode_video(video)[BLOCK:])
  assert session._now().rollout.states[0].slots.pin == 1


def test_a_parked_session_is_off_the_devices_and_goes_on_as_it_was(session: Session):
  list(play(session, range(5)))
  moment = session._now()
  held = jax.tree.leaves((moment.rollout.caches, moment.decoder))
  before = jax.tree.map(np.array, (moment.rollout.caches, moment.decoder))
  session.park()
  session.park()  # a second call does nothing
  assert session.describe().parked and all(array.is_deleted() for array in held)
  fork = session.fork()
  assert fork.describe().parked
  session.unpark()
  session.unpark()
  assert not session.describe().parked and fork.describe().parked
  moment = session._now()
  jax.tree.map(np.testing.assert_array_equal, (moment.rollout.caches, moment.decoder), before)
  frames, others = (list(play(s, range(5, BLOCKS))) for s in (session, fork))
  check_blocks(frames, expected("float32")[5:])
  check_blocks(others, frames)


def test_a_closed_session_frees_its_memory_and_says_so(session: Session):
  list(play(session, range(2)))
  fork, moment = session.fork(), session._now()
  session.close()
  session.close()
  assert all(a.is_deleted() for a in jax.tree.leaves((moment.rollout.caches, moment.decoder)))
  calls = (
    *(session.next_block, session.fork, session.park, session.unpark, session.describe),
    *(lambda: session.push("one"), lambda: session.rewind(0), lambda: session.block),
    *(lambda: session.save("nowhere"), lambda: session.extend(IMAGE[None])),
  )
  for call in calls:
    with pytest.raises(ValueError, match="^the session is closed$"):
      call()
  check_blocks(list(play(fork, range(2, 4))), expected("float32")[2:4])


def test_the_last_push_before_a_block_counts(session: Session, sampler: Sampler):
  assert session.cut("never shown") == 0
  assert session.push("one", "recache") == 0
  frames = [session.next_block()]
  assert session.cut("never shown") == 1
  assert session.push("two") == 1
  frames.append(session.next_block())
  script = Script((Shot("one", 1), Shot("two", 1, transition="keep")), seed=SEED)
  check_blocks(frames, whole(sampler, script))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda s: s.push(""), "^prompt='' must be text that is not empty$"),
    (lambda s: s.push(" \n"), "must be text that is not empty"),
    (lambda s: s.push(3), "^prompt=3 must be text"),
    (lambda s: s.cut("&#32;"), "^prompt='&#32;' must be text that is not empty$"),
    (lambda s: s.push("\u200b"), r"^prompt='\\u200b' must be text that is not empty$"),
    (lambda s: s.push("\ud800"), r"^prompt='\\ud800' has characters that are no text"),
    (lambda s: s.push("x" * 30), r"model\.text\.length=24"),
    (lambda s: s.cut("x" * 20), r"model\.text\.length=24"),  # with the prefix
    (lambda s: s.push("x", "fade"), "^transition='fade' must be one of cut, keep, recache"),
    (lambda s: s.extend(np.zeros((3, 2, 4, 4))), r"a multiple of model\.block_latents=2"),
    (lambda s: s.extend(np.zeros((0, 2, 4, 4))), r"a multiple of model\.block_latents=2"),
    (lambda s: s.extend(np.zeros((2, 3, 4, 4))), r"prefix has shape \(1, 2, 3, 4, 4\)"),
    (lambda s: s.extend(np.zeros((2, 2, 4, 4), int)), "^latents are int64; they must be floats"),
    (lambda s: s.extend(np.full((2, 2, 4, 4), np.nan)), "not finite"),
    (lambda s: s.extend(np.zeros((4, 32, 64, 3), np.uint8)), "has 4 frames; .* at least 5"),
    (
      lambda s: s.extend(np.zeros((9, 16, 64, 3), np.uint8)),
      r"the video to go on with has shape \(9, 16, 64, 3\); it must be \(any, 32, 64, 3\)",
    ),
  ],
)
def test_a_wrong_call_changes_nothing_and_is_named(session: Session, call, message: str):
  session.push("one")
  session.next_block()
  session.push("two", "recache")
  before = session.describe()
  with pytest.raises(ValueError, match=message) as caught:
    call(session)
  assert "\n" not in str(caught.value)
  assert session.describe() == before


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"seed": -1}, r"^seed=-1 must be a whole number, at least 0 and below 2\*\*32$"),
    ({"seed": 1.0}, r"^seed=1\.0 must be"),
    ({"index": 2**32}, "^index=4294967296 must be"),
    ({"keep": -1}, "^keep=-1 must be"),
    ({"image": IMAGE[:16]}, r"must be uint8 \(1, 32, 64, 3\)"),
    ({"image": IMAGE / 255}, r"images are float64"),
  ],
)
def test_a_wrong_beginning_is_named(sampler: Sampler, options: dict, message: str):
  with pytest.raises(ValueError, match=message):
    Session(sampler, **options)


def test_a_sampler_that_several_processes_share_is_refused(sampler: Sampler):
  elsewhere = SimpleNamespace(sharding=SimpleNamespace(is_fully_addressable=False))
  shared = SimpleNamespace(
    experiment=sampler.experiment,
    prepare=lambda: SimpleNamespace(engine=SimpleNamespace(latents=elsewhere)),
  )
  with pytest.raises(ValueError, match="a sampler all of whose devices are of this process"):
    Session(shared)


def test_the_first_block_needs_a_prompt(session: Session):
  for call in (session.next_block, lambda: session.extend(np.zeros((BLOCK, 2, 4, 4)))):
    with pytest.raises(ValueError, match="no prompt yet: push one before the first block"):
      call()
  assert session.push("one") == 0
  assert len(session.next_block()) == 4 * BLOCK - 3


def test_the_seed_of_the_configuration_is_used_when_none_is_given(sampler: Sampler):
  assert Session(sampler).seed == sampler.experiment.sample.seed


def test_a_block_that_is_not_finite_is_named_and_can_be_taken_back(sampler: Sampler):
  dit = jax.tree.map(np.array, sampler.models.params["dit"])
  dit["head"]["proj"]["bias"][0] = np.nan
  models = dataclasses.replace(sampler.models, params={**sampler.models.params, "dit": dit})
  broken = Sampler(models)
  broken._compiled = sampler._compiled
  session = Session(sampler, seed=SEED)
  list(play(session, range(3)))
  session.sampler = broken
  with pytest.raises(FloatingPointError, match="block 4 of the video .* not finite"):
    session.next_block()
  session.sampler = sampler
  session.rewind(3)
  check_blocks(list(play(session, range(3, 5))), expected("float32")[3:5])


def test_a_block_that_is_interrupted_ends_the_session(
  session: Session, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
):
  list(play(session, range(2)))
  fork = session.fork()

  def interrupt(*args: object) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(sampler.prepare().decoder, "frames", interrupt)
    with pytest.raises(KeyboardInterrupt):
      session.next_block()
  for call in (session.next_block, session.park, lambda: session.rewind(1)):
    with pytest.raises(ValueError, match="^block 2 was interrupted: load the session again"):
      call()
  check_blocks(list(play(fork, [2])), expected("float32")[2:3])


def test_nothing_compiles_once_there_was_a_session(sampler: Sampler, tmp_path: Path):
  Session(sampler)
  jax.clear_caches()
  with counting() as counts:
    session = Session(sampler, seed=SEED)
    list(play(session, range(6)))
    fork = session.fork()
    fork.rewind(4)
    fork.park()
    fork.extend(np.zeros((BLOCK, 2, 4, 4), np.float32))
    session.save(tmp_path / "saved")
    Session.load(sampler, tmp_path / "saved").next_block()
  assert not counts


def test_a_session_says_where_it_stands(session: Session, sampler: Sampler):
  new = session.describe()
  assert (new.block, new.frames, new.seconds, new.prompts, new.prompt) == (0, 0, 0, (), "")
  list(play(session, range(6)))
  session.push("it rises")
  status = session.describe()
  assert (status.block, status.frames) == (6, 6 * 4 * BLOCK - 3)
  assert status.seconds == pytest.approx(status.frames / 24)
  plan = sampler.plan([Script((Shot("a red circle", 6),))])[0]
  assert status.prompts[:2] == plan[:2] and len(status.prompts) == 6
  assert status.prompts[5] == BlockPrompt("Cut. a blue square", 1, "cut")
  assert (status.prompt, status.pending) == ("a blue square", ("it rises", "keep"))
  assert status.cache_bytes == sum(a.nbytes for a in jax.tree.leaves(session._now().rollout.caches))
  json.dumps(dataclasses.asdict(status))
