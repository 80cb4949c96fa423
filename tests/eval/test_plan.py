"""The dry run: what it says agrees with what a run has, and it allocates nothing."""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config.load import load_config
from longlive_jax.eval import plan_trace
from longlive_jax.eval.plan import REACHED, make_plan, sizes
from longlive_jax.eval.plan_bytes import Whole, bank_bytes, bank_growth
from longlive_jax.eval.plan_text import format_plan
from longlive_jax.eval.trace import kept_bytes, kernel_attention, linearise, work
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.ops import dense_attention
from longlive_jax.parallel.halo import windows_of
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.parallel.rules import DIT_RULES, shardings_of
from longlive_jax.train.error_bank import Recycler
from longlive_jax.train.state import init_state, make_optimizer
from tests.launch.tiny import OVERRIDES

WAN = "configs/wan5b_train.py"
GIB = 2**30


def tiny(**settings):
  values = {**OVERRIDES, "data.blocks": 2, "train.batch": 2, "io.checkpoint": ""}
  return load_config("configs/tiny.py", {**values, **settings})


def wan(**settings):
  values = {"parallel.seq": 2, "train.batch": 1, "train.remat": "attention"}
  return load_config(WAN, {**values, **settings})


@pytest.fixture(scope="module")
def plan():
  return make_plan(wan(), 2, "NVIDIA H200")


def test_the_5b_run_is_planned_fast_and_without_arrays():
  before, start = sum(a.nbytes for a in jax.live_arrays()), time.process_time()
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  plan = make_plan(wan(**{"train.remat": "full"}), 2, "H200")
  assert time.process_time() - start < 20
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 2**20 < 0.5  # GiB
  assert sum(a.nbytes for a in jax.live_arrays()) - before < 2**20
  assert plan.parameters["dit"] == pytest.approx(5.0e9, rel=1e-3)
  assert plan.parameters["text"] == pytest.approx(5.68e9, rel=1e-3)
  assert plan.device_bytes["parameters"] == pytest.approx(5.0e9 * 4 / 2, rel=1e-3)
  assert plan.device_bytes["optimiser"] == plan.device_bytes["parameters"]
  assert plan.layer_sent == 4 * 2 * 42240 * 3072 * 2 / 2  # q, k, v, out: half of each leaves
  assert plan.sent["all-to-all backward"] == 2 * plan.sent["all-to-all forward"]
  assert plan.sizes["tokens"] == 84480
  assert plan.legal_seq == (1, 2, 3, 4, 6, 12)
  assert plan.flops["forward"] + plan.flops["backward"] < plan.model_flops / 2
  assert plan.seconds == pytest.approx(sum(plan.flops.values()) / (REACHED * 989e12))


def test_what_is_kept_is_the_carry_and_self_attention(plan):
  carry, sums = 30 * 2 * 84480 * 3072 * 2 / 2, 30 * 2 * 84480 * 24 * 4 / 2
  least = 2 * carry + sums
  assert least < plan.device_bytes["kept by the forward"] < 1.2 * least


def test_parameters_lie_as_the_rules_say():
  """Bytes and whole leaves are those of arrays placed on a real mesh."""
  experiment = tiny(**{"parallel.fsdp": 2, "model.layers": 1})
  plan = make_plan(experiment, 2)
  params = declare_dit(experiment.model).init(0)
  mesh = make_mesh(2, fsdp=2)
  placed = jax.device_put(params, shardings_of(params, DIT_RULES, mesh))
  first = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(placed)]
  assert plan.device_bytes["parameters"] == sum(a.nbytes for a in first)
  state = init_state(params, make_optimizer(experiment.train))
  moments = sum(a.nbytes for a in jax.tree.leaves(state.opt_state) if a.ndim)
  copies = 1 if experiment.train.beta1 == 0.0 else 2
  assert moments == copies * sum(a.nbytes for a in jax.tree.leaves(params))
  assert plan.device_bytes["optimiser"] == copies * plan.device_bytes["parameters"]


def test_leaves_that_do_not_divide_are_listed():
  experiment = tiny(**{"model.width": 24, "model.ffn_width": 33, "parallel.fsdp": 2})
  plan = make_plan(experiment, 2)
  (row,) = plan.whole
  assert row == Whole("layers/ffn/down/kernel", (2, 33, 24), 2 * 33 * 24 * 4)
  assert "their axis does not divide" in format_plan(plan)
  assert not make_plan(tiny(**{"parallel.fsdp": 2}), 2).whole


@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_is_near_that_of_the_compiler(remat):
  """Temporaries of the compiled gradient, on one CPU with plain attention.

  It holds one layer's gradients besides; what it shares or fuses is not in the estimate.
  """
  shape = {"model.width": 64, "model.ffn_width": 128, "model.layers": 12, "video.height": 128}
  experiment = tiny(**shape, **{"train.remat": remat, "video.width": 128, "model.dtype": "float32"})
  network, mesh = declare_dit(experiment.model), plan_trace.abstract_mesh(experiment, 1)
  traced = plan_trace.trace(experiment, network, mesh)
  total, arguments = plan_trace.traced_function(experiment, network, mesh, remat)
  memory = jax.jit(jax.grad(total)).lower(*arguments).compile().memory_analysis()
  assert 0.7 < memory.temp_size_in_bytes / (traced.kept + traced.layer) < 1.4


def test_attention_of_traces_is_attention():
  keys = jax.random.split(jax.random.key(0), 4)
  q, g = (jax.random.normal(k, (2, 6, 2, 8)) for k in keys[:2])
  k, v = (jax.random.normal(k, (2, 10, 2, 8)) for k in keys[2:])
  for a, b in zip(
    *(
      (f(q, k, v), *jax.vjp(lambda *x, f=f: f(*x), q, k, v)[1](g))
      for f in (kernel_attention, dense_attention)
    ),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=2e-5)
  with pytest.raises(ValueError, match="without lengths"):
    kernel_attention(q, k, v, jnp.ones(2, jnp.int32))


def test_work_of_loops_conditions_and_dead_code():
  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  one = 2 * 4**3

  def looped(x):
    return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0]

  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  def dead(x):
    _ = x @ x
    return x

  assert [work(f, x).flops for f in (looped, either, dead)] == [5 * one, 2 * one, 0]


def test_kept_bytes():
  w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 8), (4, 8)))

  def kept(function):
    return kept_bytes(linearise(function, w, x))

  assert kept(lambda w, x: jnp.sum(x @ w)) == 4  # the value itself
  assert kept(lambda w, x: jnp.sum(jnp.sin(x @ w))) == 4 + 4 * 32


def test_recomputation_is_that_of_the_policy():
  plans = {
    r: make_plan(tiny(**{"train.remat": r}), 1).flops["computed again"]
    for r in ("none", "attention", "full")
  }
  assert 0 < plans["none"] < plans["attention"] < plans["full"]


def test_plain_layout():
  plain = make_plan(tiny(**{"parallel.layout": "plain", "parallel.seq": 2, "train.batch": 1}), 2)
  balanced = make_plan(tiny(**{"parallel.seq": 2, "train.batch": 1}), 2)
  assert plain.axes == {"data": 1, "fsdp": 1, "half": 2, "seq": 1}
  assert balanced.axes == {"data": 1, "fsdp": 1, "half": 1, "seq": 2}
  assert plain.layer_sent == balanced.layer_sent > 0
  assert plain.flops["forward"] == balanced.flops["forward"]


def test_accumulation():
  parts = make_plan(tiny(**{"train.batch": 4, "train.accumulate": 2, "parallel.seq": 2}), 4)
  whole = make_plan(tiny(**{"train.batch": 4, "parallel.seq": 2}), 4)
  assert parts.axes["data"] == whole.axes["data"] == 2
  assert parts.device_bytes["gradients"] == 2 * whole.device_bytes["gradients"]
  kept = [p.device_bytes["kept by the forward"] for p in (parts, whole)]
  assert kept[1] == pytest.approx(2 * kept[0], rel=0.1)
  assert parts.flops["forward"] == whole.flops["forward"]
  assert parts.sent["all-to-all forward"] == whole.sent["all-to-all forward"] > 0
  assert parts.model_flops == whole.model_flops


def test_videos_are_encoded_in_windows():
  videos = {"data.source": "videos", "data.path": "clips", "parallel.seq": 4}
  experiment = wan(**videos)
  mesh = plan_trace.abstract_mesh(experiment, 4)
  found = sizes(experiment, mesh, windows_of(experiment, mesh.shape["seq"])[0])
  assert found["latents encoded"] == 24 + 27 + 1
  assert found["pixels uploaded"] == (4 * 51 + 1) * 704 * 1280
  every = wan(**videos, **{"parallel.chunk_vae": False})
  assert sizes(every, mesh, windows_of(every, mesh.shape["seq"])[0])["latents encoded"] == 96


def test_files_need_no_bank_and_a_split_text_encoder():
  shapes = make_plan(tiny(**{"parallel.fsdp": 2}), 2)
  files = make_plan(tiny(**{"parallel.fsdp": 2, "data.source": "videos", "data.path": "x"}), 2)
  assert "bank of clips" in shapes.device_bytes and "bank of clips" not in files.device_bytes
  assert files.device_bytes["text encoder"] < 0.6 * shapes.device_bytes["text encoder"]
  assert files.flops["VAE encoder"] > 0 and "VAE encoder" not in shapes.flops


def test_banks_of_errors_on_the_host():
  experiment = wan(**{"train.recycling.enabled": True})
  entry = 8 * 44 * 80 * 48 * 2
  assert bank_bytes(experiment) == 2 * 50 * 500 * entry
  assert bank_growth(experiment) == pytest.approx(2 * 12 * 0.82 * entry)
  assert bank_bytes(wan()) == bank_growth(wan()) == 0
  recycler = Recycler(experiment.train.recycling, 0, 8, jnp.bfloat16)
  assert entry == np.zeros((8, 44, 80, 48), recycler.dtype).nbytes


def test_nvfp4_keeps_less():
  wide = {"model.ffn_width": 512, "model.dtype": "bfloat16", "video.height": 128}

  def kept(**more):
    experiment = tiny(**wide, **{"video.width": 128}, **more)
    network, mesh = declare_dit(experiment.model), plan_trace.abstract_mesh(experiment, 1)
    total, arguments = plan_trace.traced_function(experiment, network, mesh, "inputs")
    return kept_bytes(linearise(total, *arguments))

  assert kept(**{"quant.linears": "nvfp4"}) < 0.8 * kept()


@pytest.mark.parametrize(
  ("settings", "devices", "kind", "message"),
  [
    ({"parallel.seq": 4}, 2, "", "parallel.seq=4 needs 4 devices; there are 2"),
    ({"parallel.seq": 1}, 2, "abacus", "device_kind='abacus' is not known"),
    ({"train.stage": "vae", "parallel.seq": 1, "data.source": "shapes"}, 1, "", "=ar, not vae"),
  ],
)
def test_what_cannot_be_planned_is_refused(settings, devices, kind, message):
  with pytest.raises(ValueError, match=message):
    make_plan(wan(**settings), devices, kind)


def test_the_table_is_aligned(plan):
  text = format_plan(plan)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 100
  ends = {line.index(" GiB") for line in lines if " GiB" in line}
  assert len(ends) == 1
  for words in ("memory of a device", "TFLOP", "all-to-all", "at least", "seq 2"):
    assert words in text
