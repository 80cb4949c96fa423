"""What waits for a connection and what is kept of a session stay bounded."""

import asyncio
import json

import pytest

from longlive_jax.serve.card import Card
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.frames import Form, encode_block
from longlive_jax.serve.outbox import MOST, Closing, Delivery, Outbox
from longlive_jax.serve.reel import Reel
from tests.serve.fake import FACTS, picture


def delivery(block: int) -> Delivery:
  return Delivery(block, 0, "", (), lambda: None)


def test_items_come_in_order_until_the_end():
  async def main() -> list:
    outbox = Outbox()
    outbox.event("a", x=1)
    outbox.put(delivery(0))
    outbox.close(1000, "done")
    outbox.event("late")
    return [await outbox.get() for _ in range(3)]

  first, second, third = asyncio.run(main())
  assert json.loads(first) == {"type": "a", "x": 1}
  assert second.block == 0 and third == Closing(1000, "done")


def test_a_client_that_reads_no_events_is_cut_off():
  async def main() -> object:
    outbox = Outbox()
    for _ in range(3 * MOST):
      outbox.event("a")
    assert outbox.closed
    return await outbox.get()

  assert asyncio.run(main()) == Closing(1008, "events are not read")


def test_messages_are_not_read_while_answers_wait():
  async def main() -> None:
    outbox = Outbox()
    for _ in range(MOST // 2 + 1):
      outbox.event("a")
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await outbox.get()
    await asyncio.wait_for(waiting, 1.0)

  asyncio.run(main())


def test_frames_of_blocks_that_are_made_again_are_dropped():
  async def main() -> list[object]:
    outbox = Outbox()
    for block in range(3):
      outbox.put(delivery(block))
      outbox.event("e", block=block)
    outbox.drop_frames(1)
    return [await outbox.get() for _ in range(4)]

  items = asyncio.run(main())
  assert [item.block for item in items if isinstance(item, Delivery)] == [0]


def messages(block: int) -> tuple[bytes, ...]:
  return encode_block(picture(0, block, "a"), block, FACTS.first_frame(block), Form())


def test_a_reel_keeps_what_was_not_played():
  counted: list[int] = []
  reel = Reel(FACTS, 0, counted.append)
  for block in range(3):
    made = reel.add(messages(block))
    assert made.end == FACTS.first_frame(block + 1)
    if block < 2:
      made.sent()
  assert reel.sent == FACTS.first_frame(2) and len(counted) == 2
  with pytest.raises(Refused, match="from 0 to 13, the frames sent"):
    reel.played(14, back=False)
  reel.played(6, back=False)
  assert [d.block for d in reel] == [1, 2]
  reel.played(3, back=False)
  assert reel.position == 6
  reel.played(3, back=True)
  assert reel.position == 3
  again = Reel(FACTS, 6, counted.append)
  again.restore(reel.messages())
  assert [d.block for d in again] == [1, 2] and again.sent == FACTS.first_frame(3)


def test_what_was_on_its_way_when_going_back_does_not_count():
  reel = Reel(FACTS, 0, lambda size: None)
  first, second = reel.add(messages(0)), reel.add(messages(1))
  first.sent()
  reel.rewind(1)
  second.sent()
  assert reel.sent == FACTS.first_frame(1) and [d.block for d in reel] == [0]


def test_a_card_knows_which_prompt_holds():
  card = Card("session_x", "", 0, 0)
  assert card.prompt_of(5) == ""
  card.push(0, "a", "cut")
  card.push(3, "b", "keep")
  card.push(3, "c", "cut")
  card.push(6, "d", "recache")
  assert [card.prompt_of(block) for block in (0, 2, 3, 5, 6, 9)] == list("aaccdd")
  card.made, card.position = 7, 40
  card.rewind(4, 29)
  assert (card.made, card.position, card.prompts) == (4, 29, [(0, "a", "keep"), (3, "c", "cut")])


def test_blocks_and_frames():
  first = [FACTS.first_frame(block) for block in range(4)]
  assert first == [0, 5, 13, 21]
  for block in range(3):
    assert {FACTS.block_at(frame) for frame in range(first[block], first[block + 1])} == {block}
  assert FACTS.most_blocks(21 / 24) == 3 and FACTS.most_blocks(20.9 / 24) == 2
  assert FACTS.most_blocks(0.01) == 1 and FACTS.seconds(3) == 21 / 24
