"""A few thousand messages of nonsense; `python -m tests.serve.fuzz` sends more."""

import logging

from tests.serve.fuzz import fuzz
from tests.serve.running import running


def test_nonsense_gets_clear_answers(caplog, tmp_path):
  with running(state_dir=tmp_path) as run:
    told = fuzz(run, 3000, seed=11, tick=lambda done: None)
  assert run.backend.made == run.backend.closed > 20
  kinds = {what.rpartition(" ")[0] for what in told}
  assert {"HTTP", "close", "event error", "raw"} <= kinds
  ours = ("absl", "asyncio", "uvicorn.error")
  errors = [r for r in caplog.records if r.levelno >= logging.ERROR and r.name in ours]
  assert not errors, errors[:3]
