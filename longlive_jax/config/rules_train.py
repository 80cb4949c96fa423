"""Checks of the settings of a training run: the loop, its data and its mesh."""

import math
import re

from longlive_jax.checks import check_choice, check_divides
from longlive_jax.config.schema import Data, Distill, Experiment

STAGES = ("vae", "ar", "dmd")
WEIGHTINGS = ("bell", "uniform")
REMATS = ("none", "dots", "inputs", "attention", "full")
REPLACEMENTS = ("random", "oldest")
SOURCES = ("shapes", "videos", "latents", "scripts")
ROLES = ("student", "teacher", "critic")
FITS = ("crop", "stretch")
LAYOUTS = ("balanced", "plain")
EXCHANGES = ("none", "fp8")
MLP = ("down", "up")
LINEARS = (  # paths of the linear layers of the transformer
  "head/proj",
  *(f"layers/{part}/{name}" for part in ("cross_attn", "self_attn") for name in "koqv"),
  *(f"{mlp}/{name}" for mlp in ("layers/ffn", "text_embed", "time_embed") for name in MLP),
  "patch_embed",
  "time_proj",
)


def check_training(experiment: Experiment) -> None:
  """The training loop."""
  train = experiment.train
  check_choice("train.stage", train.stage, STAGES)
  check_choice("train.loss_weighting", train.loss_weighting, WEIGHTINGS)
  check_choice("train.remat", train.remat, REMATS)
  check_choice("train.recycling.replacement", train.recycling.replacement, REPLACEMENTS)
  check_divides("train.batch", train.batch, "train.accumulate", train.accumulate)
  if train.context_noise > 1000:
    raise ValueError(f"train.context_noise={train.context_noise} must be at most 1000 (a timestep)")
  if train.stage != "ar" and train.accumulate > 1:
    raise ValueError("train.accumulate is for train.stage=ar; use train.accumulate=1")
  if train.stage == "dmd":
    check_distillation(experiment)


def check_distillation(experiment: Experiment) -> None:
  """What stage "dmd" asks of the other settings."""
  train, distill = experiment.train, experiment.distill
  for name, value in (
    ("context_noise", train.context_noise),
    ("prompt_dropout_share", train.prompt_dropout_share),
  ):
    if value:
      raise ValueError(f"train.{name}={value} is for train.stage=ar; use 0")
  if train.recycling.enabled:
    raise ValueError("train.recycling.enabled is for train.stage=ar; use False")
  if experiment.sample.guidance != 1.0:
    raise ValueError(
      f"sample.guidance={experiment.sample.guidance} is of a student, which has none: use 1;"
      " the teacher's is distill.guidance"
    )
  if experiment.data.pad or experiment.data.far_share:
    name = "pad" if experiment.data.pad else "far_share"
    raise ValueError(f"data.{name}={getattr(experiment.data, name)} is for train.stage=ar")
  if experiment.quant.cache != "none":
    raise ValueError("train.stage=dmd keeps its keys and values as they are: use quant.cache=none")
  if experiment.quant.linears == "fp8":
    raise ValueError("quant.linears=fp8 has no gradients: with train.stage=dmd use nvfp4 or none")
  if distill.rank > experiment.model.width:
    raise ValueError(
      f"distill.rank={distill.rank} must be at most model.width={experiment.model.width}"
    )
  if distill.trained_blocks > experiment.data.blocks:
    raise ValueError(
      f"distill.trained_blocks={distill.trained_blocks} must be at most data.blocks="
      f"{experiment.data.blocks}"
    )
  check_long_rollout(experiment)
  check_roles(distill)


def check_long_rollout(experiment: Experiment) -> None:
  """Of a rollout longer than the window only blocks are trained that the window shows for sure."""
  sample, size = experiment.sample, experiment.model.block_latents
  window, trained = sample.window_latents // size, experiment.distill.trained_blocks
  newest = window - sample.sink_latents // size - sample.pin_shots
  if experiment.data.blocks > window and not 1 <= trained <= newest:
    raise ValueError(
      f"distill.trained_blocks={trained} with data.blocks={experiment.data.blocks}: of a rollout"
      f" longer than the window of {window} blocks at least 1 and at most {newest} can be trained,"
      " the newest that it shows beside sink and pin"
    )


def check_roles(distill: Distill) -> None:
  """Which networks are quantised, and which layers are adapted."""
  for role in distill.quantised:
    check_choice("distill.quantised", role, ROLES)
  if not distill.layers:
    raise ValueError("distill.layers=() adapts nothing")
  for pattern in distill.layers:
    try:
      hits = [path for path in LINEARS if re.fullmatch(pattern, path)]
    except re.error as error:
      raise ValueError(
        f"distill.layers has {pattern!r}, which is no regular expression: {error}"
      ) from error
    if not hits:
      raise ValueError(
        f"distill.layers has {pattern!r}, which matches no layer; the layers are"
        f" {', '.join(sorted(LINEARS))}"
      )


def check_data(experiment: Experiment) -> None:
  """The training clips."""
  data, train = experiment.data, experiment.train
  check_choice("data.source", data.source, SOURCES)
  check_choice("data.fit", data.fit, FITS)
  if data.source == "shapes":
    check_shapes(experiment)
    return
  if data.source == "scripts" and train.stage != "dmd":
    raise ValueError(f"data.source=scripts is for train.stage=dmd, not {train.stage}")
  if not data.path:
    raise ValueError(f"data.source={data.source} needs data.path, the folder of the {data.source}")
  if train.stage == "vae":
    raise ValueError(f"train.stage=vae takes data.source=shapes, not {data.source}")
  if data.far_share > 0:
    raise ValueError(f"data.far_share={data.far_share} is for data.source=shapes; use 0")
  if experiment.io.evaluate_every_steps and not experiment.io.evaluate_scripts:
    raise ValueError(
      f"io.evaluate_every_steps={experiment.io.evaluate_every_steps} with data.source="
      f"{data.source} needs io.evaluate_scripts, a script file or a folder of them"
    )
  if data.min_blocks > data.blocks:
    raise ValueError(f"data.min_blocks={data.min_blocks} must be at most data.blocks={data.blocks}")


def check_shapes(experiment: Experiment) -> None:
  """Clips of the shapes world."""
  data: Data = experiment.data
  if data.max_shots > data.clip_blocks:
    raise ValueError(
      f"data.max_shots={data.max_shots} must be at most data.clip_blocks={data.clip_blocks}:"
      " a shot takes at least one block"
    )
  if data.blocks > data.clip_blocks:
    raise ValueError(
      f"data.blocks={data.blocks} must be at most data.clip_blocks={data.clip_blocks}"
    )
  window = experiment.sample.window_latents // experiment.model.block_latents
  if data.far_share > 0 and not window == data.blocks < data.clip_blocks:
    raise ValueError(
      f"data.far_share={data.far_share} takes what a full window sees of a longer clip:"
      f" data.blocks={data.blocks} must equal the window's {window} blocks and be less than"
      f" data.clip_blocks={data.clip_blocks}; or use data.far_share=0"
    )


def check_parallel(experiment: Experiment) -> None:
  """A clip or a block can be shared by so many devices, and a batch by so many groups of them."""
  parallel, train = experiment.parallel, experiment.train
  check_choice("parallel.layout", parallel.layout, LAYOUTS)
  check_choice("parallel.exchange", parallel.exchange, EXCHANGES)
  seq = parallel.seq
  if seq not in block_seq(experiment):  # else it is right in sampling
    check_shared_clip(experiment)
  part = train.batch // train.accumulate
  check_divides("train.batch / train.accumulate", part, "parallel.fsdp", parallel.fsdp)
  alone = {"fsdp": parallel.fsdp} if train.stage == "dmd" else {"seq": seq, "fsdp": parallel.fsdp}
  for name, value in alone.items():
    if train.stage != "ar" and value > 1:
      raise ValueError(f"parallel.{name}={value} is for train.stage=ar; use parallel.{name}=1")


def check_shared_rollout(experiment: Experiment) -> None:
  """Raises ValueError unless `parallel.seq` devices can share the blocks of stage "dmd"."""
  seq, model, sample = experiment.parallel.seq, experiment.model, experiment.sample
  if seq > 1 and experiment.parallel.layout != "balanced":
    raise ValueError("train.stage=dmd takes parallel.layout=balanced")
  judged = min(experiment.data.blocks, sample.window_latents // model.block_latents)
  common = math.gcd(model.heads, model.block_latents, judged)
  works = [n for n in range(1, common + 1) if common % n == 0]
  if seq not in works:
    raise ValueError(
      f"parallel.seq={seq} must divide model.heads={model.heads}, model.block_latents="
      f"{model.block_latents} and the {judged} blocks that are judged; use one of"
      f" {', '.join(map(str, works))}"
    )


def check_shared_clip(experiment: Experiment) -> None:
  """Raises ValueError unless `parallel.seq` devices can share a training clip."""
  if experiment.train.stage == "dmd":
    return check_shared_rollout(experiment)
  parallel, works = experiment.parallel, legal_seq(experiment)
  if parallel.seq not in works:
    raise ValueError(
      f"parallel.seq={parallel.seq} must divide model.heads={experiment.model.heads} and"
      f" data.blocks={experiment.data.blocks}"
      + (", and be even with parallel.layout=plain" if parallel.layout == "plain" else "")
      + f"; use one of {', '.join(map(str, works))} (in sampling, with model.block_latents="
      f"{experiment.model.block_latents}: {', '.join(map(str, block_seq(experiment)))})"
    )


def check_shared_block(experiment: Experiment) -> None:
  """Raises ValueError unless `parallel.seq` devices can share the blocks of a sampler."""
  seq, model = experiment.parallel.seq, experiment.model
  works = block_seq(experiment)
  if seq not in works:
    raise ValueError(
      f"parallel.seq={seq} must divide model.heads={model.heads} and"
      f" model.block_latents={model.block_latents} in sampling;"
      f" use one of {', '.join(map(str, works))}"
    )


def block_seq(experiment: Experiment) -> list[int]:
  """Values of `parallel.seq` that divide heads and the latents of a block (sampling)."""
  common = math.gcd(experiment.model.heads, experiment.model.block_latents)
  return [seq for seq in range(1, common + 1) if common % seq == 0]


def legal_seq(experiment: Experiment) -> list[int]:
  """Values of `parallel.seq` that divide heads and blocks (training)."""
  heads, blocks = experiment.model.heads, experiment.data.blocks
  plain = experiment.parallel.layout == "plain"

  def fits(seq: int) -> bool:
    if not plain or seq == 1:
      return heads % seq == 0 and blocks % seq == 0
    return seq % 2 == 0 and heads % seq == 0 and blocks % (seq // 2) == 0

  return [seq for seq in range(1, heads + 1) if fits(seq)]
