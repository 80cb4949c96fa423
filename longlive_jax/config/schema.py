"""The one configuration schema.

Plain dataclasses, because the flag parser needs them; `seal()` turns a checked experiment into
its frozen, hashable form. Sizes that follow from others are properties, so that no number is
stated twice.
"""

import dataclasses
from collections.abc import Iterator

from longlive_jax.checks import suggest


class Section:
  """Base of all sections: unknown names are errors, and nothing can be written once sealed."""

  def __setattr__(self, name: str, value: object) -> None:
    if self.__dict__.get("_sealed", False):
      raise dataclasses.FrozenInstanceError(f"the configuration is sealed: cannot set {name}")
    known = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
    if name not in known:
      raise AttributeError(f"{type(self).__name__} has no field '{name}'{suggest(name, known)}")
    object.__setattr__(self, name, value)

  def sections(self) -> Iterator["Section"]:
    """Yields the sections directly below this one."""
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      value = getattr(self, field.name)
      if isinstance(value, Section):
        yield value

  def seal(self) -> None:
    """Makes this section and all below it read-only."""
    for section in self.sections():
      section.seal()
    object.__setattr__(self, "_sealed", True)


@dataclasses.dataclass(unsafe_hash=True)
class Text(Section):
  """UMT5 encoder and its tokenizer."""

  vocabulary: int = 256384
  width: int = 4096
  attention_width: int = 4096
  ffn_width: int = 10240
  heads: int = 64
  layers: int = 24
  buckets: int = 32
  max_distance: int = 128
  length: int = 512  # tokens a prompt is padded to
  tokenizer: str = ""  # path of a tokenizer.json, or "bytes"
  dtype: str = "float32"  # of the activations
  parked: bool = False  # its parameters wait in host memory until a prompt comes
  frozen_seed: int = -1  # >= 0: a random encoder that is never trained (the tiny preset)


@dataclasses.dataclass(unsafe_hash=True)
class Vae(Section):
  """Wan 2.2 VAE; the Light VAE is the same with narrower widths."""

  encoder_width: int = 160
  decoder_width: int = 256
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  residual_blocks: int = 2  # per encoder stage; a decoder stage has one more
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  latent_channels: int = 48
  dtype: str = "float32"  # of the activations
  convolution: str = "auto"  # auto (by device) | conv3d | conv2d: the same sums, other speeds


@dataclasses.dataclass(unsafe_hash=True)
class Model(Section):
  """The diffusion transformer."""

  width: int = 3072
  ffn_width: int = 14336
  heads: int = 24
  layers: int = 30
  frequency_width: int = 256  # sinusoid of the timestep
  patch: int = 2  # height and width of a token, in latents; one latent in time
  block_latents: int = 8  # denoising unit
  shift: float = 5.0  # of the noise schedule
  eps: float = 1e-6
  rope_theta: float = 10000.0
  dtype: str = "bfloat16"  # of the matrix products
  attention: str = "auto"  # auto (by capability) | cudnn | jnp | fp8 (sampling, one video)
  text: Text = dataclasses.field(default_factory=Text)
  vae: Vae = dataclasses.field(default_factory=Vae)

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(unsafe_hash=True)
class Video(Section):
  """Size of the videos, in pixels and frames a second."""

  height: int = 704
  width: int = 1280
  fps: int = 24


@dataclasses.dataclass(unsafe_hash=True)
class Quant(Section):
  """Low precision of the transformer's linear layers and of its cache."""

  linears: str = "none"  # none | nvfp4 | fp8 (sampling only)
  layers: tuple[
    str, ...
  ] = (  # regular expressions of whole paths; a path is quantised by the first
    "layers/(self_attn|cross_attn)/(q|k|v|o)",
    "layers/ffn/(up|down)",
  )
  weights: str = "mse"  # scale rules: static_6 | static_4 | mse | mae | abs_max
  activations: str = "mse"
  gradients: str = "mse"
  weight_blocks: str = "1x16"  # 1x16 | 16x16: fprop and dgrad then see the same weight
  gradient_rounding: str = "stochastic"  # stochastic | nearest
  cache: str = "none"  # none | nvfp4 | fp8: keys and values of earlier blocks
  cache_rule: str = "mse"
  cache_smoothing: str = "none"  # none | tokens | original: what is taken off the keys
  # of samplers and of NVFP4: auto (one Hopper GPU, or several that share blocks) | on | off
  kernels: str = "auto"


@dataclasses.dataclass(unsafe_hash=True)
class Sample(Section):
  """The autoregressive sampler."""

  steps: int = 4
  solver: str = "unipc"  # unipc | dpmpp | euler
  guidance: float = 1.0  # 1 = off
  negative_prompt: str = ""
  window_latents: int = 32  # all that is attended: sink, pin and own block included
  sink_latents: int = 8  # kept for good
  pin_shots: bool = True  # keep the first block of the newest shot
  shot_offset_latents: float = 8.0  # extra temporal distance opened by a cut
  recache_cuts: bool = False  # after a cut, forget all but the sink
  relative_rope: bool = False
  t_scale: float = 1.0
  unroll_layers: str = (
    "auto"  # auto (plain weights on a GPU) | on | off: no copies, slow to compile
  )
  decode_latents: int = 0  # of a block, decoded at a time; fewer take less memory; 0 = all
  decode_tiles: int = 1  # strips of rows, decoded one after the other; more take less memory
  cut_prefix: str = "The scene transitions. "  # text put before the first prompt of a new shot
  seed: int = 0


@dataclasses.dataclass(unsafe_hash=True)
class Data(Section):
  """Training clips: of the shapes world, drawn as they are needed, or of files."""

  source: str = "shapes"  # shapes | videos | latents | scripts (stage "dmd"), see docs/data.md
  path: str = ""  # folder of the videos, latents or scripts
  blocks: int = 4  # blocks of a training sample
  seed: int = 1  # of the clips, of where samples start in them, and of their order
  # shapes
  clips: int = 4096  # clips made ahead and kept as latents
  clip_blocks: int = 8  # length of those
  far_share: float = 0.0  # share of samples that see the blocks a late block of a rollout sees
  max_shots: int = 3
  change_share: float = 0.0  # of shots that follow the one before without a cut; not of stage "vae"
  vae_latents: int = 6  # length of the clips of stage "vae"
  # videos
  fit: str = "crop"  # crop | stretch: how a picture of another shape is made to fit
  max_shot_blocks: int = 0  # longest shot; the rest of a file goes on as another one; 0 = no limit
  pad: bool = False  # take clips that are too short; what is missing carries no loss
  min_blocks: int = 1  # with pad: blocks a clip must have
  # files
  readers: int = 4  # threads that read samples ahead
  ahead: int = 2  # batches read ahead


@dataclasses.dataclass(unsafe_hash=True)
class Recycling(Section):
  """Error recycling: the model's own errors are kept, and added to later training inputs."""

  enabled: bool = False
  start_step: int = 0  # updates done before anything is added
  buckets: int = 50  # of noise levels
  bucket_size: int = 500  # errors a bucket keeps
  replacement: str = "random"  # what a full bucket gives up: random | oldest
  modulation: float = 0.3  # m: an error is multiplied by a number of [1 - m, 1 + m] when used
  context_share: float = 0.9  # of steps that add an error to the context
  latent_share: float = 0.9  # to the latents before they are noised
  noise_share: float = 0.01  # to the noise
  clean_share: float = 0.2  # of steps that add none at all
  clean_update_share: float = 0.1  # of those, steps whose errors are kept


@dataclasses.dataclass(unsafe_hash=True)
class Train(Section):
  """The training loop: "vae" trains the VAE, "ar" the transformer, "dmd" its few-step student."""

  stage: str = "ar"
  steps: int = 1000
  batch: int = 8  # samples an update
  accumulate: int = 1  # parts of a batch that are computed one after the other
  lr: float = 1e-4
  final_lr_fraction: float = 1.0  # of a cosine decay that ends at the last step
  warmup_steps: int = 100
  beta1: float = 0.0
  beta2: float = 0.999
  weight_decay: float = 0.0
  clip_norm: float = 10.0
  ema: float = 0.99
  ema_start_step: int = 0
  prompt_dropout_share: float = 0.0  # of samples that see the negative prompt, for guidance
  first_latent_share: float = 0.0  # of samples whose first latent is given (image to video)
  context_noise: float = 0.0  # highest timestep of noise on the context; 0 = clean
  loss_weighting: str = "bell"  # over noise levels: bell (0 at pure noise) | uniform
  remat: str = "none"  # the backward pass recomputes: none | dots | inputs | attention | full
  kl_weight: float = 1e-4  # stage "vae"
  motion_weight: float = 0.0  # stage "vae": how much more moving pixels count
  seed: int = 0
  recycling: Recycling = dataclasses.field(default_factory=Recycling)


@dataclasses.dataclass(unsafe_hash=True)
class Distill(Section):
  """Stage "dmd": a student of `sample.steps` steps, matched to the model that it starts from."""

  rank: int = 128  # of the adapters of student and critic
  alpha: float = 128.0
  layers: tuple[str, ...] = ("layers/.*",)  # regular expressions of the paths that are adapted
  quantised: tuple[str, ...] = ("student", "teacher", "critic")  # whom quant.linears is for
  student_every: int = 5  # steps from one update of the student to the next; the critic's is each
  critic_lr: float = 2e-6
  guidance: float = 3.0  # w of the teacher, c + w (c - u)
  critic_guidance: float = 0.0
  trained_blocks: int = 0  # blocks at the end of a rollout that carry a gradient; 0 = all
  last_step_only: bool = False  # rollouts end at the last step; else at one that is drawn
  clean_history: bool = False  # teacher and critic see the student's clip as clean history
  attached_cache: bool = False  # gradients reach the keys of earlier blocks, as in the original
  original_levels: bool = False  # the original's levels of the clean pass and of the last one


@dataclasses.dataclass(unsafe_hash=True)
class Parallel(Section):
  """The mesh of training; what is left of the devices splits the batch. Sampling knows `seq`."""

  fsdp: int = 1  # devices that share parameters, each with its own samples
  seq: int = 1  # devices that share a clip; in sampling, and stage "dmd", each block of a video
  # balanced: each has context and target of the same blocks | plain: half of them have contexts
  layout: str = "balanced"
  chunk_vae: bool = True  # each of them encodes its own part of a clip; off = all encode all of it
  halo_latents: int = 27  # encoded to the left of a part for its sake; 27 is exact
  exchange: str = "none"  # none | fp8: how sampling sends queries, keys, values between devices


@dataclasses.dataclass(unsafe_hash=True)
class Io(Section):
  """Where things are read from and written to."""

  checkpoint: str = ""  # weights to start from; empty = fresh
  adapters: str = "auto"  # merged into them for sampling; auto = those they name; empty = none
  checkpoint_every_steps: int = 500
  keep_checkpoints: int = 3
  log_every_steps: int = 50
  evaluate_every_steps: int = 0  # updates between videos of the evaluation scripts; 0 = none
  evaluate_scripts: str = ""  # a script file or a folder of them; empty = two of the training data
  compile_cache: str = ""  # folder of the persistent compilation cache; empty = off


@dataclasses.dataclass(unsafe_hash=True)
class Experiment(Section):
  """Everything a run needs."""

  name: str = "wan5b"
  model: Model = dataclasses.field(default_factory=Model)
  video: Video = dataclasses.field(default_factory=Video)
  quant: Quant = dataclasses.field(default_factory=Quant)
  sample: Sample = dataclasses.field(default_factory=Sample)
  data: Data = dataclasses.field(default_factory=Data)
  train: Train = dataclasses.field(default_factory=Train)
  distill: Distill = dataclasses.field(default_factory=Distill)
  parallel: Parallel = dataclasses.field(default_factory=Parallel)
  io: Io = dataclasses.field(default_factory=Io)

  @property
  def latent_height(self) -> int:
    return self.video.height // 16

  @property
  def latent_width(self) -> int:
    return self.video.width // 16

  @property
  def latent_tokens(self) -> int:
    """Tokens of one latent."""
    return (self.latent_height // self.model.patch) * (self.latent_width // self.model.patch)

  @property
  def block_frames(self) -> int:
    """Frames of every block but the first, which has three fewer."""
    return 4 * self.model.block_latents
