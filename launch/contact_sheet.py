"""Shows a video as one picture, a row of frames for each shot of its script.

  python -m launch.contact_sheet --config=configs/tiny.py --video=outputs/demo.mp4 \
      --script=configs/scripts/demo.json --out=outputs/demo.png
"""

import numpy as np
from absl import flags

from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main
from longlive_jax.data.prompts import Script, load_script
from longlive_jax.io.atomic import check_writable
from longlive_jax.io.contact_sheet import Row, spread_frames, write_contact_sheet
from longlive_jax.io.video import read_video

CONFIG = define_config_flag()
VIDEO = flags.DEFINE_string("video", "outputs/demo.mp4", "video to show")
SCRIPT = flags.DEFINE_string("script", "configs/scripts/demo.json", "script that it was made from")
OUT = flags.DEFINE_string("out", "outputs/sheet.png", "picture to write")
COLUMNS = flags.DEFINE_integer("columns", 6, "frames a shot", lower_bound=1)


def shot_rows(
  script: Script, frames: np.ndarray, experiment: Experiment, columns: int
) -> list[Row]:
  """One row of `columns` frames a shot; where each shot begins follows from the script.

  Raises:
    ValueError: the video is of another length than those of the script.
  """
  fps, block_latents = experiment.video.fps, experiment.model.block_latents
  rows, start = [], 0
  for shot in script.shots:
    stop = start + experiment.block_frames * shot.count_blocks(fps, block_latents)
    stop -= 0 if rows else 3  # the first latent of a video is a single frame
    rows.append(Row(shot.prompt, spread_frames(frames[start:stop], columns)))
    start = stop
  if start != len(frames):
    raise ValueError(
      f"--video has {len(frames)} frames, but a video of --script has {start}; give the script"
      " that it was made from"
    )
  return rows


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  check_writable(OUT.value)
  video = experiment.video
  frames = read_video(VIDEO.value, fps=video.fps, height=video.height, width=video.width)
  rows = shot_rows(load_script(SCRIPT.value), frames, experiment, COLUMNS.value)
  write_contact_sheet(OUT.value, rows)


if __name__ == "__main__":
  run_main(main)
