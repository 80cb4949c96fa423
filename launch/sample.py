"""Makes a video from a script.

  python -m launch.sample --config=configs/tiny.py --script=configs/scripts/demo.json \
      --out=outputs/demo.mp4

The script is JSON, or plain text with one prompt a line. The suffix of --out chooses the format:
.mp4, .gif, or a folder of .png. The resolved configuration is written beside it.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from longlive_jax.build import Pipeline
from longlive_jax.config import Experiment
from longlive_jax.config.load import define_config_flag, from_flags, run_main, to_json
from longlive_jax.data.prompts import Script, load_script
from longlive_jax.io.image import read_image
from longlive_jax.io.video import read_video, write_video

CONFIG = define_config_flag()
SCRIPT = flags.DEFINE_string("script", None, "script file: .json, or .txt with one prompt a line")
OUT = flags.DEFINE_string("out", "outputs/video.mp4", "video to write: .mp4, .gif, or a folder")
IMAGE = flags.DEFINE_string("image", None, "image-to-video: the first frame")
EXTEND = flags.DEFINE_string("extend", None, "video to go on from; its latents come first")


def enable_compile_cache(folder: str) -> None:
  """Keeps compiled executables in `folder`, so that the next start compiles nothing."""
  if folder:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def with_progress(frames: Iterator[np.ndarray], blocks: int) -> Iterator[np.ndarray]:
  """Passes frames on and shows blocks done, frames a second, and the time left."""
  with tqdm(total=blocks, unit="block") as bar:
    started, made = time.perf_counter(), 0
    for part in frames:
      made += len(part)
      bar.update(1)
      bar.set_postfix_str(f"{made / (time.perf_counter() - started):.1f} FPS")
      yield part


def inputs(pipeline: Pipeline, script: Script) -> dict[str, np.ndarray]:
  """The first frame or the latents that the flags or the script name, as stream options."""
  video = pipeline.experiment.video
  options = {}
  image = IMAGE.value or script.image
  if image:
    options["images"] = read_image(image, video.height, video.width)[None]
  if EXTEND.value:
    frames = read_video(EXTEND.value, fps=video.fps, height=video.height, width=video.width)
    options["prefix"] = pipeline.encode_video(frames)[None]
  return options


def sample(experiment: Experiment, script: Script, out: Path) -> None:
  """Generates the video of a script and writes it with its configuration."""
  started = time.perf_counter()
  pipeline = Pipeline.from_config(experiment)
  options = inputs(pipeline, script)
  blocks = len(pipeline.plan([script])[0])
  pipeline.prepare()
  ready = time.perf_counter()
  extra = options["prefix"].shape[1] // experiment.model.block_latents if EXTEND.value else 0
  frames = with_progress(pipeline.stream(script, **options), blocks + extra)
  count = write_video(out, frames, experiment.video.fps)
  seconds = time.perf_counter() - ready
  out.with_name(out.name + ".config.json").write_text(to_json(experiment))
  print(
    f"{out}: {count} frames, {count / experiment.video.fps:.1f} s of video;"
    f" ready in {ready - started:.1f} s, made in {seconds:.1f} s ({count / seconds:.1f} FPS)"
  )


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  experiment = from_flags(CONFIG.value)
  if not SCRIPT.value:
    raise ValueError("--script is required: a .json or .txt file")
  enable_compile_cache(experiment.io.compile_cache)
  sample(experiment, load_script(SCRIPT.value), Path(OUT.value))


if __name__ == "__main__":
  run_main(main)
