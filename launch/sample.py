r"""Makes a video from a script.

  python -m launch.sample --config=configs/tiny.py --script=configs/scripts/demo.json \
      --out=outputs/demo.mp4

The script is JSON, or plain text with one prompt a line. The suffix of --out chooses the format:
.mp4, .gif, or a folder of .png. The resolved configuration is written beside it.
"""

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from longlive_jax.build import Pipeline, enable_compile_cache
from longlive_jax.config import Experiment, Video
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.data.prompts import Script, load_script
from longlive_jax.io.atomic import replacing
from longlive_jax.io.image import read_image
from longlive_jax.io.video import read_video, write_video, writer_for

CONFIG = define_config_flag()
SCRIPT = flags.DEFINE_string("script", None, "script file: .json, or .txt with one prompt a line")
OUT = flags.DEFINE_string(
  "out", "outputs/video.mp4", "video to write: .mp4, .gif, or a folder of .png"
)
IMAGE = flags.DEFINE_string("image", None, "image-to-video: the first frame, instead of a script's")
EXTEND = flags.DEFINE_string("extend", None, "video to go on from; it comes first in the result")


def with_progress(frames: Iterator[np.ndarray], blocks: int) -> Generator[np.ndarray]:
  """Passes frames on and shows blocks done, frames a second, and the time left."""
  with tqdm(total=blocks, unit="block") as bar:
    started, made = time.perf_counter(), 0
    for part in frames:
      made += len(part)
      bar.update(1)
      bar.set_postfix_str(f"{made / (time.perf_counter() - started):.1f} FPS")
      yield part


def read_inputs(script: Script, video: Video) -> dict[str, np.ndarray]:
  """What the flags or the script give to begin with.

  Returns:
    {"image": uint8 `[H, W, 3]`}, {"extend": uint8 `[T, H, W, 3]`} or nothing.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it cannot be read, or both are given.
  """
  image = IMAGE.value or script.image
  if image and EXTEND.value:
    raise ValueError(
      f"--extend={EXTEND.value} and the image '{image}' are both given: a video goes on from"
      " another or begins with an image; leave one out"
    )
  if image:
    return {"image": read_image(image, video.height, video.width)}
  if EXTEND.value:
    size = {"height": video.height, "width": video.width}
    return {"extend": read_video(EXTEND.value, fps=video.fps, **size)}
  return {}


def sample(experiment: Experiment, script: Script, out: Path) -> None:
  """Generates the video of a script and writes it with its configuration."""
  started = time.perf_counter()
  given = read_inputs(script, experiment.video)
  pipeline = Pipeline.from_config(experiment)
  blocks = len(pipeline.plan([script])[0])
  options, given_frames = {}, 0
  if "image" in given:
    options["images"] = given["image"][None]
  if "extend" in given:
    options["prefix"] = pipeline.encode_video(given["extend"])[None]
    latents = options["prefix"].shape[1]
    blocks += latents // experiment.model.block_latents
    given_frames = 4 * latents - 3
  pipeline.prepare()
  ready = time.perf_counter()
  with contextlib.closing(with_progress(pipeline.stream(script, **options), blocks)) as frames:
    count = write_video(out, frames, experiment.video.fps)
  seconds = time.perf_counter() - ready
  with replacing(out.with_name(out.name + ".config.json")) as part:
    part.write_text(to_json(experiment))
  made = count - given_frames
  print(
    f"{out}: {count} frames, {count / experiment.video.fps:.1f} s of video;"
    f" ready in {ready - started:.1f} s, {made} made in {seconds:.1f} s ({made / seconds:.1f} FPS)"
  )


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if not SCRIPT.value:
    raise ValueError("--script is needed: a .json file, or a .txt file with one prompt a line")
  script, out = load_script(SCRIPT.value), Path(OUT.value)
  writer_for(out)  # refuses what cannot be written before anything is computed
  enable_compile_cache(experiment)
  sample(experiment, script, out)


if __name__ == "__main__":
  run_main(main)
