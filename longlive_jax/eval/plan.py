"""What a training run would need, before anything is allocated: the dry run of `launch.train`.

    bytes a device = parameters + gradients + optimiser + average    (split over fsdp, half, seq)
                   + VAE + text encoder (see its rules) + bank of clips      (whole everywhere)
                   + what the forward keeps + one layer              (split over samples and clip)

Shapes come from the declared networks, and what the backward pass keeps, repeats and exchanges from
the trace of the network itself over a mesh without devices. The compiler decides the rest: which
copies live at a time, and how parameters travel.

Source: spec/training.md sections 4.2, 5.5, 6 and 8.
"""

import dataclasses
import math

from jax.sharding import AbstractMesh

from longlive_jax.config import Experiment
from longlive_jax.config.rules_train import legal_seq
from longlive_jax.eval import flops
from longlive_jax.eval.plan_bytes import (
  Whole,
  bank_bytes,
  bank_growth,
  device_bytes,
  parameter_traffic,
  whole_leaves,
)
from longlive_jax.eval.plan_trace import Traced, abstract_mesh, clip_latents, ranks, trace
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.module import count_parameters
from longlive_jax.model.text import declare_text
from longlive_jax.model.vae import declare_vae
from longlive_jax.parallel.halo import Windows, windows_of
from longlive_jax.types import CLIP, SAMPLES, SEQ

REACHED = 0.8  # of the peak: what large bfloat16 products reach on a Hopper GPU


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training run as it would be on each device, for one update.

  Attributes:
    axes: sizes of the mesh.
    devices: that there are; the mesh may use fewer.
    parameters: of each network.
    device_bytes: what a device holds at the peak, by kind.
    host_bytes: what the host holds.
    host_growth: bytes an update adds there, on average, until it is full.
    flops: operations of a device, by part.
    model_flops: of the update on all devices, nothing counted twice: for `flops.mfu`.
    sent: bytes that a device sends, by kind; all but all-to-alls as rings would send them.
    layer_sent: of all-to-alls, in the forward of one layer.
    sizes: numbers of things a device handles.
    legal_seq: values that `parallel.seq` could have.
    whole: parameters that are not split.
    device_kind: of the bound; empty = not given.
    seconds: lower bound of an update: all products at `REACHED` of the peak; None = unknown.
  """

  axes: dict[str, int]
  devices: int
  parameters: dict[str, int]
  device_bytes: dict[str, int]
  host_bytes: int
  host_growth: float
  flops: dict[str, float]
  model_flops: int
  sent: dict[str, float]
  layer_sent: float
  sizes: dict[str, int]
  legal_seq: tuple[int, ...]
  whole: tuple[Whole, ...]
  device_kind: str = ""
  seconds: float | None = None

  @property
  def used(self) -> int:
    """Devices of the mesh."""
    return math.prod(self.axes.values())


def make_plan(experiment: Experiment, devices: int, device_kind: str = "") -> Plan:
  """Plans a run of stage "ar".

  Args:
    experiment: checked experiment.
    devices: that there would be.
    device_kind: of them, such as "H200"; gives a lower bound of the time.

  Raises:
    ValueError: another stage, a mesh that cannot be made of so many devices, or a device that is
      not known.
  """
  if experiment.train.stage != "ar":
    raise ValueError(f"--dry_run is for train.stage=ar, not {experiment.train.stage}")
  peak = flops.peak_flops(device_kind)
  if device_kind and peak is None:
    known = ", ".join(flops.PEAK_BF16)
    raise ValueError(f"the peak of device_kind={device_kind!r} is not known; known are {known}")
  mesh, cfg = abstract_mesh(experiment, devices), experiment.model
  networks = {"dit": declare_dit(cfg), "vae": declare_vae(cfg.vae), "text": declare_text(cfg.text)}
  traced, windows = (
    trace(experiment, networks["dit"], mesh),
    windows_of(experiment, mesh.shape[SEQ])[0],
  )
  work = device_flops(experiment, mesh, traced, windows)
  sent = {"all-to-all forward": traced.forward.sent, "all-to-all backward": traced.backward_sent}
  sent = {name: float(n * experiment.train.accumulate) for name, n in sent.items()}
  return Plan(
    axes={name: int(size) for name, size in mesh.shape.items()},
    devices=devices,
    parameters={name: count_parameters(net.abstract) for name, net in networks.items()},
    device_bytes=device_bytes(experiment, networks, mesh, traced),
    host_bytes=bank_bytes(experiment),
    host_growth=bank_growth(experiment),
    flops=work,
    model_flops=flops.step_flops(experiment),
    sent=sent | parameter_traffic(experiment, networks["dit"].abstract, mesh),
    layer_sent=traced.forward.sent / cfg.layers,
    sizes=sizes(experiment, mesh, windows),
    legal_seq=tuple(legal_seq(experiment)),
    whole=whole_leaves(networks["dit"].abstract, mesh),
    device_kind=device_kind,
    seconds=None if peak is None else sum(work.values()) / (REACHED * peak),
  )


def device_flops(
  experiment: Experiment, mesh: AbstractMesh, traced: Traced, windows: Windows
) -> dict[str, float]:
  """Operations of a device in an update, by part.

  Work is split evenly; text is encoded where its block is. What the trace has beyond forward and
  backward is done twice: by rematerialisation, and the logits in the backward of attention.
  """
  cfg, train, video = experiment.model, experiment.train, experiment.video
  clip = flops.teacher_forcing_flops(cfg, clip_latents(experiment), experiment.latent_tokens)
  part = train.batch // train.accumulate
  again = traced.step.flops - part * (clip.forward + clip.backward)
  prompts = train.batch * experiment.data.blocks
  parts = {
    "forward": train.batch * clip.forward / mesh.size,
    "backward": train.batch * clip.backward / mesh.size,
    "computed again": train.accumulate * again / mesh.size,
    "text encoder": flops.text_flops(cfg.text, prompts) / (ranks(mesh, SAMPLES) * mesh.shape[SEQ]),
  }
  if experiment.data.source == "videos":
    each = flops.encode_flops(cfg.vae, windows.encoded, video.height, video.width)
    parts["VAE encoder"] = each * train.batch / ranks(mesh, SAMPLES)
  return parts


def sizes(experiment: Experiment, mesh: AbstractMesh, windows: Windows) -> dict[str, int]:
  """What a device handles in an update."""
  train, video = experiment.train, experiment.video
  samples = train.batch // ranks(mesh, SAMPLES)
  tokens = 2 * clip_latents(experiment) * experiment.latent_tokens
  found = {"samples": samples, "tokens": samples * tokens // ranks(mesh, CLIP)}
  if experiment.data.source == "videos":
    frames = samples * windows.frames
    found["latents encoded"] = samples * windows.encoded
    found["of them halo"] = samples * (windows.encoded - windows.latents)
    found["pixels uploaded"] = frames * video.height * video.width
  return found
