"""The shapes world: captioned multi-shot clips that can be drawn, and read back, exactly.

One or two coloured shapes move over a named background on a torus, so a shot may have any length.
Everything a caption says can be measured in the pixels (`longlive_jax.eval.shapes_score`); speed,
size and place are left open.

`python -m longlive_jax.data.shapes --out=DIR --clips=N --seed=S` writes examples as video files,
with `--shot_blocks=8 --max_shots=3` of shots of random lengths: a training set of files.
"""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from longlive_jax import checks
from longlive_jax import config as config_lib
from longlive_jax.config.flags import run_main
from longlive_jax.data.shapes_render import (
  BACKGROUNDS,
  COLOURS,
  DIRECTIONS,
  SHAPES,
  render_batch,
  render_packed,
)
from longlive_jax.data.shapes_spec import (
  MAX_OBJECTS,
  ClipSpec,
  ObjectSpec,
  ShotSpec,
  sample_clip,
  shot_frames,
)
from longlive_jax.io.atomic import check_writable

__all__ = [
  "ClipSpec",
  "ObjectSpec",
  "ShotSpec",
  "pack",
  "pack_many",
  "render",
  "render_batch",
  "render_packed",
  "sample_clip",
  "shot_frames",
  "write_clips",
]

NEVER = 2**30  # first frame of a shot that pads a packed clip
CHUNK_FRAMES = 32  # rendered by one call on the host


def pack(spec: ClipSpec, max_shots: int | None = None) -> dict[str, np.ndarray]:
  """Turns a clip into arrays of fixed size for `render_packed`.

  Args:
    spec: the clip.
    max_shots: S, the shots to make room for; default as many as the clip has.

  Returns:
    first_frame, background [S] int32; colour, shape [S, 2] int32; present, size [S, 2],
    start, velocity [S, 2, 2] float32 (y before x).
  """
  room = len(spec.shots) if max_shots is None else max_shots
  if room < len(spec.shots):
    raise ValueError(f"the clip has {len(spec.shots)} shots; max_shots={room} is too small")
  out = {
    "first_frame": np.full(room, NEVER, np.int32),
    "background": np.zeros(room, np.int32),
    "colour": np.zeros((room, MAX_OBJECTS), np.int32),
    "shape": np.zeros((room, MAX_OBJECTS), np.int32),
    "present": np.zeros((room, MAX_OBJECTS), np.float32),
    "size": np.ones((room, MAX_OBJECTS), np.float32),
    "start": np.zeros((room, MAX_OBJECTS, 2), np.float32),
    "velocity": np.zeros((room, MAX_OBJECTS, 2), np.float32),
  }
  names = list(COLOURS)
  for i, (first, shot) in enumerate(zip(spec.first_frames, spec.shots, strict=True)):
    out["first_frame"][i] = first
    out["background"][i] = BACKGROUNDS.index(shot.background)
    for j, thing in enumerate(shot.objects):
      out["colour"][i, j] = names.index(thing.colour)
      out["shape"][i, j] = SHAPES.index(thing.shape)
      out["present"][i, j] = 1.0
      out["size"][i, j] = thing.size
      out["start"][i, j] = thing.start
      out["velocity"][i, j] = np.asarray(DIRECTIONS[thing.direction]) * thing.speed
  return out


def pack_many(specs: Sequence[ClipSpec], max_shots: int | None = None) -> dict[str, np.ndarray]:
  """Packs clips and stacks them: every array of `pack` with a leading axis B."""
  room = max(len(s.shots) for s in specs) if max_shots is None else max_shots
  clips = [pack(spec, room) for spec in specs]
  return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}


def render(
  spec: ClipSpec, video: config_lib.Video, start: int = 0, stop: int | None = None
) -> np.ndarray:
  """Renders frames start..stop-1 of a clip on the host.

  Args:
    spec: the clip.
    video: size of the picture.
    start: first frame.
    stop: end, exclusive; default the end of the clip. May lie beyond it: the last shot goes on.

  Returns:
    [T, H, W, 3] uint8.
  """
  stop = spec.frames if stop is None else stop
  room = 1 << (len(spec.shots) - 1).bit_length()  # few sizes, few compilations
  packed = jax.tree.map(lambda a: jnp.asarray(a)[None], pack(spec, room))
  parts = []
  for base in range(start, stop, CHUNK_FRAMES):
    indices = jnp.arange(base, base + CHUNK_FRAMES)
    pixels = render_batch(packed, indices, height=video.height, width=video.width)[0]
    pixels = np.asarray(jnp.round((pixels + 1.0) * 127.5).astype(jnp.uint8))
    parts.append(pixels[: stop - base])
  if not parts:
    return np.zeros((0, video.height, video.width, 3), np.uint8)
  return np.concatenate(parts)


def random_shots(rng: np.random.Generator, blocks: int, most: int) -> list[int]:
  """Lengths of 1 to `most` shots, in blocks, that fill a clip; at least one block each."""
  count = int(rng.integers(1, min(most, blocks) + 1))
  borders = np.sort(rng.choice(np.arange(1, blocks), count - 1, replace=False))
  return np.diff([0, *borders, blocks]).tolist()


def write_clips(
  out: pathlib.Path,
  clips: int,
  seed: int,
  blocks: Sequence[int],
  video: config_lib.Video,
  *,
  max_shots: int = 0,
) -> None:
  """Writes clips in the layout of a paired video dataset: a file and a caption for every shot.

  Args:
    out: folder; gets video/<clip>/<shot>.mp4 and caption/<clip>/<shot>.json.
    clips: how many.
    seed: clip i is drawn from (seed, i).
    blocks: blocks of 8 latents of every shot.
    video: size and frame rate.
    max_shots: if not 0, clips have as many blocks, cut anew into 1 to `max_shots` shots each.

  Raises:
    ValueError: a number is wrong, or the folder holds other clips than these.
    OSError: the folder cannot be written.
  """
  from longlive_jax.io.video import write_video  # needs PyAV, which training does not

  checks.check_at_least("clips", clips, 1)
  specs = {}
  for number in range(clips):
    rng = np.random.default_rng((seed, number))
    lengths = random_shots(rng, sum(blocks), max_shots) if max_shots else blocks
    specs[f"{number:05d}"] = sample_clip(rng, shot_frames(lengths, 8), video)
  make_folder(out, list(specs))
  for folder, spec in specs.items():
    for kind in ("video", "caption"):
      (out / kind / folder).mkdir(parents=True, exist_ok=True)
      for old in (out / kind / folder).iterdir():  # of an earlier run, which had more shots
        if old.stem.isdigit() and int(old.stem) >= len(spec.shots):
          old.unlink()
    for i, (first, shot) in enumerate(zip(spec.first_frames, spec.shots, strict=True)):
      frames = render(spec, video, first, first + shot.frames)
      write_video(out / "video" / folder / f"{i}.mp4", [frames], video.fps)
      text = json.dumps({"caption": shot.caption()})
      (out / "caption" / folder / f"{i}.json").write_text(text + "\n", encoding="utf-8")


def make_folder(out: pathlib.Path, names: Sequence[str]) -> None:
  """Makes the folder of a paired video dataset of these samples.

  Raises:
    ValueError: it is there, and has other samples.
    OSError: it cannot be made, or written.
  """
  check_writable(out, folder=True)
  found = [path for kind in ("video", "caption") for path in (out / kind).glob("[!.]*")]
  others = sorted({path.name for path in found} - set(names))
  if others:
    last = f" to {others[-1]}" if len(others) > 1 else ""
    raise ValueError(
      f"'{out}' holds {len(others)} other clips ({others[0]}{last}) than the {len(names)} to write,"
      " which would be one set with them: give another folder, or remove them"
    )
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = f"the folder cannot be made: {error.strerror}"
    raise OSError(error.errno, reason, str(out)) from error


def _define_flags() -> None:
  """Declares the flags of the command; not at import, where other commands' flags live."""
  flags.DEFINE_string("out", None, "folder to write to")
  flags.DEFINE_integer("clips", 4, "clips to write", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "clip i is drawn from (seed, i)", lower_bound=0)
  flags.DEFINE_list("shot_blocks", ["2", "2"], "blocks of 8 latents of every shot")
  flags.DEFINE_integer(
    "max_shots", 0, "if not 0, the blocks are cut anew into 1 to so many shots", lower_bound=0
  )
  flags.DEFINE_integer("height", 96, "pixels, a multiple of 32", lower_bound=32)
  flags.DEFINE_integer("width", 160, "pixels, a multiple of 32", lower_bound=32)
  flags.DEFINE_integer("fps", 24, "frames a second", lower_bound=1)


def main(argv: Sequence[str]) -> None:
  """Writes clips as the flags say."""
  del argv
  values = flags.FLAGS
  if not values.out:
    raise ValueError("--out is needed: the folder to write to")
  if not all(number.strip().isdecimal() for number in values.shot_blocks):
    raise ValueError(f"--shot_blocks={','.join(values.shot_blocks)} must be numbers such as 2,2")
  blocks = [int(number) for number in values.shot_blocks]
  video = config_lib.Video(height=values.height, width=values.width, fps=values.fps)
  out = pathlib.Path(values.out)
  write_clips(out, values.clips, values.seed, blocks, video, max_shots=values.max_shots)
  logging.info("wrote %d clips to %s", values.clips, values.out)


if __name__ == "__main__":
  _define_flags()
  run_main(main)
