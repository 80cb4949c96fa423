"""Configurations: rules, names, JSON, and the command line."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from longlive_jax.config import Experiment, Model
from longlive_jax.config.load import check, from_flags, from_json, load_config, override, to_json
from longlive_jax.config.rules import SOLVERS
from longlive_jax.config.rules_train import LINEARS
from longlive_jax.config.walk import check_setting_name, settings

CONFIGS = (
  "configs/tiny.py",
  "configs/tiny.py:i2v",
  "configs/tiny.py:nvfp4",
  "configs/tiny.py:teacher",
  "configs/tiny.py:vae",
  "configs/tiny.py:ar,nvfp4_training,i2v",
  "configs/tiny.py:dmd,2steps,nvfp4_training",
  "configs/wan5b_distill.py",
  "configs/wan5b_distill.py:2steps,nvfp4_training,i2v",
  "configs/wan5b_sample.py",
  "configs/wan5b_sample.py:base",
  "configs/wan5b_sample.py:2steps,fp8",
  "configs/wan5b_sample.py:2steps,nvfp4",
  "configs/wan5b_sample.py:low_memory",
  "configs/wan5b_train.py",
  "configs/wan5b_train.py:nvfp4_training,i2v",
)


@pytest.fixture(autouse=True)
def at_root(root: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(root)


BASE: dict[str, object] = {  # what the lines below speak of
  "video.height": 96,
  "model.width": 256,
  "model.heads": 4,
  "model.block_latents": 8,
  "model.text.attention_width": 128,
  "model.text.heads": 8,
  "sample.window_latents": 32,
  "sample.sink_latents": 8,
  "sample.pin_shots": True,
  "data.clip_blocks": 8,
  "data.blocks": 4,
  "data.max_shots": 3,
  "data.far_share": 0.0,
}


def tiny(**overrides: object) -> Experiment:
  dotted = {name.replace("__", "."): value for name, value in overrides.items()}
  config = Experiment()
  for name, value in (BASE | dotted).items():
    override(config, name, value)
  return from_flags(config)


@pytest.mark.parametrize("source", CONFIGS)
def test_shipped_configurations_are_sound(source):
  config = load_config(source)
  assert from_json(to_json(config)) == config
  assert hash(config) == hash(from_json(to_json(config)))
  assert config.train.first_latent_share == float(source.endswith("i2v"))


def test_a_sealed_experiment_cannot_be_written():
  config = tiny()
  with pytest.raises(dataclasses.FrozenInstanceError, match="cannot set lr"):
    config.train.lr = 1.0


def test_sealing_leaves_the_argument_writable():
  config = Experiment()
  sealed = from_flags(config)
  config.train.lr = 1.0
  assert sealed.train.lr != 1.0


def test_linear_layers_are_those_of_the_transformer():
  from longlive_jax.model.dit import declare_dit
  from longlive_jax.model.lora import linear_shapes

  assert sorted(LINEARS) == sorted(linear_shapes(declare_dit(Model()).abstract))


def test_only_an_experiment_will_do():
  with pytest.raises(ValueError, match="must return an Experiment, not dict"):
    from_flags({})  # type: ignore[arg-type]


def test_solvers_are_those_of_the_sampler():
  from longlive_jax.model import solvers

  assert sorted(SOLVERS) == sorted(solvers.SOLVERS)


WRONG = {
  "video__height": (100, "video.height=100 must be a positive multiple of 16.*use 96 or 128"),
  "video__width": (0, "video.width=0 must be at least 1"),
  "video__fps": (0, "video.fps=0 must be at least 1"),
  "model__heads": (3, "model.width=256 must be a positive multiple of model.heads=3"),
  "model__layers": (0, "model.layers=0 must be at least 1"),
  "model__frequency_width": (33, "model.frequency_width=33 must be .* multiple of 2"),
  "model__dtype": ("float16", "model.dtype='float16' must be one of bfloat16, float32"),
  "model__shift": (0.0, "model.shift=0.0 must be more than 0"),
  "model__text__length": (0, "model.text.length=0 must be at least 1"),
  "model__text__heads": (3, "model.text.attention_width=128 .*model.text.heads=3"),
  "model__text__buckets": (31, "model.text.buckets=31 must be"),
  "model__text__max_distance": (8, "model.text.max_distance=8 must be more than a quarter"),
  "model__text__frozen_seed": (-2, "model.text.frozen_seed=-2 must be at least -1"),
  "model__vae__multipliers": ((1, 2), "model.vae.multipliers=.* must have 4 entries"),
  "model__vae__temporal_downsample": ((True,) * 3, "temporal_downsample=.* two of them True"),
  "sample__steps": (0, "sample.steps=0 must be at least 1"),
  "sample__solver": ("unipcc", r"sample.solver='unipcc' .*did you mean 'unipc'\?"),
  "sample__guidance": (-1.0, "sample.guidance=-1.0 must be at least 0"),
  "sample__window_latents": (20, "window_latents=20 must be .*block_latents=8; use 16 or 24"),
  "sample__sink_latents": (4, "sample.sink_latents=4 must be .* model.block_latents=8"),
  "sample__decode_latents": (3, "=3 must divide model.block_latents=8; use 0 .* 1, 2, 4, 8"),
  "sample__decode_tiles": (4, "=4 must divide .*, video.height / 16 = 6; use one of 1, 2, 3, 6"),
  "sample__seed": (-1, "sample.seed=-1 must be at least 0"),
  "sample__t_scale": (0.0, "sample.t_scale=0.0 must be more than 0"),
  "sample__pin_shots": (1, "sample.pin_shots=1 must be of type bool, not int"),
  "train__stage": ("dmd2", "train.stage='dmd2' must be one of"),
  "train__lr": (math.nan, "train.lr=nan must be a finite number"),
  "train__beta2": (1.0, "train.beta2=1.0 must be at least 0 and below 1"),
  "train__final_lr_fraction": (1.5, "train.final_lr_fraction=1.5 must be at least 0 and at most 1"),
  "train__steps": (1.5, "train.steps=1.5 must be of type int, not float"),
  "train__weight_decay": (-0.1, "train.weight_decay=-0.1 must be at least 0"),
  "data__max_shots": (9, "data.max_shots=9 must be at most data.clip_blocks=8"),
  "data__change_share": (1.1, "data.change_share=1.1 must be at least 0 and at most 1"),
  "data__blocks": (9, "data.blocks=9 must be at most data.clip_blocks=8"),
  "sample__unroll_layers": ("yes", "sample.unroll_layers='yes' must be one of auto, off, on"),
  "train__remat": ("some", "train.remat='some' must be one of attention, dots, full, inputs, none"),
  "parallel__seq": (3, "parallel.seq=3 must divide model.heads=.* data.blocks=4; use one of 1, 2"),
  "parallel__fsdp": (3, "train.batch / train.accumulate=8 must be .* parallel.fsdp=3; use 6 or 9"),
  "parallel__layout": ("round", "parallel.layout='round' must be one of balanced, plain"),
  "parallel__halo_latents": (-1, "parallel.halo_latents=-1 must be at least 0"),
  "data__source": ("tapes", "data.source='tapes' must be one of latents, scripts, shapes, videos"),
  "train__accumulate": (3, "train.batch=8 must be .* train.accumulate=3; use 6 or 9"),
  "train__context_noise": (1001.0, "train.context_noise=1001.0 must be at most 1000"),
  "train__recycling__replacement": ("l2", "replacement='l2' must be one of oldest, random"),
  "train__recycling__buckets": (0, "train.recycling.buckets=0 must be at least 1"),
  "io__keep_checkpoints": (0, "io.keep_checkpoints=0 must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_with_what_works(name):
  value, line = WRONG[name]
  with pytest.raises(ValueError, match=line) as caught:
    tiny(**{name: value})
  assert "\n" not in str(caught.value)


def test_heads_too_narrow_for_rotary_embedding():
  with pytest.raises(ValueError, match=r"heads of 2 channels.*use model.heads=32"):
    tiny(model__heads=128)
  with pytest.raises(ValueError, match=r"heads of 7 channels.*even"):
    tiny(model__width=28, model__heads=4)


def test_window_smaller_than_sink_pin_and_block():
  with pytest.raises(ValueError, match=r"window_latents=16 must hold.*use at least 24"):
    tiny(sample__window_latents=16)
  assert tiny(sample__window_latents=16, sample__pin_shots=False).sample.window_latents == 16
  assert tiny(sample__window_latents=16, sample__sink_latents=0).sample.sink_latents == 0


@pytest.mark.parametrize("size", [(32, 32), (704, 1280), (96, 416)])
def test_any_multiple_of_32_is_a_size(size):
  config = tiny(video__height=size[0], video__width=size[1])
  assert config.latent_tokens == size[0] * size[1] // 1024


@pytest.mark.parametrize(
  ("name", "line"),
  [
    ("train.lrr", r"unknown setting 'train.lrr' \(did you mean 'train.lr'\?\)"),
    ("lr", r"did you mean 'train.lr'\?"),
    ("train.heads", r"did you mean 'model.heads'\?"),
    ("model.text.lenght", r"did you mean 'model.text.length'\?"),
    ("train.lr.x", "unknown setting 'train.lr.x'"),
    ("train", "'train' is a section; set one of stage, steps"),
  ],
)
def test_unknown_settings_get_a_suggestion(name, line):
  with pytest.raises(ValueError, match=line):
    check_setting_name(name)
  with pytest.raises(ValueError, match=line):
    load_config("configs/tiny.py", {name: 1})


def test_every_setting_has_a_name_and_a_sound_default():
  names = [name for name, _, _ in settings(Experiment())]
  assert len(names) == len(set(names)) > 50
  for name in names:
    check_setting_name(name)
  check(Experiment())


def test_json_keeps_tuples_and_refuses_unknown_or_wrong_values():
  config = from_json('{"model": {"vae": {"multipliers": [1, 2, 2, 2]}}}')
  assert config.model.vae.multipliers == (1, 2, 2, 2)
  with pytest.raises(ValueError, match=r"unknown setting 'model.vae.multiplier' \(did you mean"):
    from_json('{"model": {"vae": {"multiplier": []}}}')
  with pytest.raises(ValueError, match=r"not JSON: .*\(line 2\)"):
    from_json('{"model":\n}')
  with pytest.raises(ValueError, match="section 'train' must be a JSON object"):
    from_json('{"train": 3}')
  with pytest.raises(ValueError, match="train.lr='x' must be of type float, not str"):
    from_json('{"train": {"lr": "x"}}')


def test_json_beside_an_artefact_is_a_configuration_file(tmp_path):
  config = tiny(train__lr=2e-4)
  (tmp_path / "config.json").write_text(to_json(config))
  assert load_config(tmp_path / "config.json") == config
  assert json.loads(to_json(config))["train"]["lr"] == 2e-4


def test_the_json_of_a_checkpoint_means_this_checkpoint(tmp_path):
  (tmp_path / "config.json").write_text(to_json(tiny(io__checkpoint="before")))
  assert load_config(tmp_path / "config.json").io.checkpoint == "before"
  (tmp_path / "metadata.json").write_text("{}")
  assert load_config(tmp_path / "config.json").io.checkpoint == str(tmp_path)


def test_wrong_files_and_variants(tmp_path):
  (tmp_path / "config.json").write_text('{"train": {"lrr": 1}}')
  with pytest.raises(ValueError, match=r"config.json': unknown setting 'train.lrr' \(did you mean"):
    load_config(tmp_path / "config.json")
  with pytest.raises(ValueError, match=r"config.json' has no variants, so no 'i2v'"):
    load_config(f"{tmp_path / 'config.json'}:i2v")
  with pytest.raises(FileNotFoundError, match=r"'configs/tinny.py' does not exist \(did you mean"):
    load_config("configs/tinny.py")
  with pytest.raises(ValueError, match=r"'i2w' must be one of .*did you mean 'i2v'"):
    load_config("configs/tiny.py:i2w")
  with pytest.raises(ValueError, match="must be a .py or .json file"):
    load_config("LICENSE")


def test_installed_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load_config("configs/tiny.py").name == "tiny"


PROGRAM = """
import asyncio
import atexit
import sys
from absl import flags
from longlive_jax.config.load import define_config_flag, from_flags, run_main
CONFIG = define_config_flag()
assert define_config_flag().name == CONFIG.name
FAIL = flags.DEFINE_string("fail", "", "how to fail")
KEPT = []
def forget_a_failed_task():  # it complains when it is collected, at the very end
  async def fail():
    raise RuntimeError("of a task")
  loop = asyncio.new_event_loop()
  KEPT.append(loop.create_task(fail()))
  loop.run_until_complete(asyncio.sleep(0))
  atexit.register(KEPT.clear)
def main(argv):
  config = from_flags(CONFIG.value)
  if FAIL.value == "late":
    forget_a_failed_task()
    raise ValueError("the only line")
  if FAIL.value == "missing":
    open("/none/such")
  if FAIL.value == "diverged":
    raise FloatingPointError("the loss is nan")
  if FAIL.value == "interrupt":
    raise KeyboardInterrupt
  if FAIL.value == "value":
    raise ValueError("two\\nlines")
  print(config.name, config.train.lr, config.sample.pin_shots, config.model.vae.multipliers)
run_main(main, default_config="configs/tiny.py")
"""


def run_program(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, *arguments],
    capture_output=True,
    text=True,
    cwd=root,
    check=False,
  )


def test_a_json_file_is_a_configuration_that_flags_change(root, tmp_path):
  (tmp_path / "run.json").write_text(to_json(tiny(train__lr=3e-4)))
  done = run_program(root, f"--config={tmp_path / 'run.json'}", "--noconfig.sample.pin_shots")
  assert (done.returncode, done.stdout) == (0, "wan5b 0.0003 False (1, 2, 4, 4)\n"), done.stderr


@pytest.mark.parametrize(
  ("name", "text", "line"),
  [
    ("a.json", '{"train": {"lr": }}', "a.json': the configuration is not JSON"),
    ("a.py", "x = 1", "has no attribute 'get_config'"),
    (
      "a.py",
      "from longlive_jax.config import *\ndef get_config(v=''):\n  c = Model()\n  c.widht = 3",
      "Model has no field 'widht' (did you mean 'width'?)",
    ),
    ("a.py", "def get_config(:", "invalid syntax"),
    ("a.txt", "", "a.txt' must be a .py or .json file"),
  ],
)
def test_a_configuration_file_that_is_wrong_is_one_line(root, tmp_path, name, text, line):
  (tmp_path / name).write_text(text)
  done = run_program(root, f"--config={tmp_path / name}")
  assert done.returncode == 2
  assert line in done.stderr and done.stderr.count("\n") == 1


def test_flags_override_the_file(root):
  done = run_program(
    root,
    "--config=configs/tiny.py:i2v",
    "--config.train.lr=2e-5",
    "--noconfig.sample.pin_shots",
    "--config.model.vae.multipliers=(1,2,4,2)",
  )
  assert (done.returncode, done.stdout) == (0, "tiny 2e-05 False (1, 2, 4, 2)\n"), done.stderr


@pytest.mark.parametrize(
  ("arguments", "line", "code"),
  [
    (["--config=configs/tiny.py:iv2"], "did you mean 'i2v'?", 2),
    (["--config=configs/tin.py"], "'configs/tin.py' does not exist (did you mean", 2),
    (["--config.train.lrr=1"], "did you mean 'train.lr'?", 2),
    (["--config.train.lr=fast"], "--config.train.lr=fast: could not convert", 2),
    (["--config.video.height=100"], "video.height=100 must be", 2),
    (["--config.train=1"], "is a section", 2),
    (["--config"], "--config needs a file", 2),
    (["--fial=x"], "Unknown command line flag 'fial'. Did you mean: fail ?", 2),
    (["stray"], "unexpected argument 'stray'", 2),
    (["--fail=late"], "the only line", 2),
    (["--fail=diverged"], "the loss is nan", 2),
    (["--fail=missing"], "/none/such: No such file or directory", 2),
    (["--fail=value"], "two lines", 2),
    (["--fail=interrupt"], "interrupted", 130),
  ],
)
def test_an_error_of_the_user_is_one_line(arguments, line, code, root):
  done = run_program(root, *arguments)
  assert done.returncode == code
  assert line in done.stderr
  assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(root):
  done = run_program(root, "--fail=value", "--debug")
  assert done.returncode != 0
  assert "Traceback" in done.stderr


def test_quantising_no_layer_at_all_is_an_error():
  with pytest.raises(ValueError, match=r"quant.linears=nvfp4 with quant.layers=\(\)"):
    load_config("configs/tiny.py", {"quant.linears": "nvfp4", "quant.layers": ()})


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"data.path": ""}, "data.source=videos needs data.path"),
    ({"train.stage": "vae"}, "train.stage=vae takes data.source=shapes, not videos"),
    ({"data.far_share": 0.5}, "data.far_share=0.5 is for data.source=shapes"),
    ({"data.min_blocks": 5}, "data.min_blocks=5 must be at most data.blocks=4"),
    ({"io.evaluate_every_steps": 5}, "data.source=videos needs io.evaluate_scripts"),
  ],
)
def test_settings_of_files_that_do_not_go_together(changes, line):
  with pytest.raises(ValueError, match=line):
    load_config("configs/tiny.py", {"data.source": "videos", "data.path": "clips", **changes})
