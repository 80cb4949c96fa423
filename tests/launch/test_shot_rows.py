"""The contact sheet's command: which frames belong to which shot."""

import numpy as np
import pytest

from launch.contact_sheet import shot_rows
from longlive_jax.config import Experiment, Model, Video
from longlive_jax.data.prompts import Script, Shot

EXPERIMENT = Experiment(model=Model(block_latents=4), video=Video(fps=24))
SCRIPT = Script((Shot("a", 1), Shot("b", 2)))


def test_shots_begin_where_the_script_says():
  frames = np.arange(13 + 32)[:, None, None, None] * np.ones((1, 2, 2, 3), int)
  rows = shot_rows(SCRIPT, frames, EXPERIMENT, 6)
  assert [row.caption for row in rows] == ["a", "b"]
  assert [int(f.min()) for f in rows[0].frames[[0, -1]]] == [0, 12]
  assert [int(f.min()) for f in rows[1].frames[[0, -1]]] == [13, 44]


def test_a_video_of_another_script_is_refused():
  with pytest.raises(ValueError, match="has 40 frames, but a video of --script has 45"):
    shot_rows(SCRIPT, np.zeros((40, 2, 2, 3)), EXPERIMENT, 6)
