# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.train import data, feed, flops, loop, metrics, objectives, optimizers, partition
from treesurgeon.train import step as step_lib

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, tied=True)
CONSTANT = {"schedule": "constant"}  # one program for most tests, whatever their length
PER_STEP = flops.train_flops(SPEC, 4 * 6, 6)


@pytest.fixture(scope="module")
def model():
  return model_lib.Model(SPEC, models.init(SPEC, jax.random.key(0)))


def stream(batch=4, seed=0):
  # A pattern that can be learned: each token follows from the one before.
  rows = (np.arange(30)[:, None] + 3 * np.arange(7)[None, :]) % 11
  return data.batches(rows.astype(np.int32), batch=batch, seed=seed)


def losses(workdir):
  return {r["step"]: r["loss"] for r in metrics.read(workdir) if "loss" in r}


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_learns_and_leaves_its_input_alone(model, tmp_path):
  before = jax.tree.map(np.asarray, model.params)
  out = loop.fit(model, stream(), steps=40, optimizer={"lr": 0.03}, workdir=tmp_path)
  got = losses(tmp_path)
  assert got[10] > got[40] and got[40] < 1.5 < np.log(11)
  equal(jax.tree.map(np.asarray, model.params), before)
  records = [r for r in metrics.read(tmp_path) if "loss" in r]
  assert [r["step"] for r in records] == [10, 20, 30, 40]
  last = records[-1]
  assert last["tokens"] == 40 * 24 and last["flops"] == pytest.approx(40 * PER_STEP)
  assert last["tokens_per_second"] > 0 and last["flops_per_second"] > 0
  assert metrics.read(tmp_path)[0].keys() == {"step", "compile_seconds"}
  assert out.aux["flops"] == pytest.approx(40 * PER_STEP)
  assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_accumulation_equals_the_big_batch(model, weighted):
  tokens = jnp.asarray(next(iter(stream(batch=6))))
  weights = jax.random.uniform(jax.random.key(3), (6, 6)) * (jnp.arange(6) > 1)[:, None]
  batch = {"tokens": tokens, "weights": weights} if weighted else tokens
  objective = objectives.next_token()
  keys = jax.random.split(jax.random.key(0), 6)

  def loss(train, frozen, batch, keys):
    return objective(SPEC, train, batch, keys)

  found = [
    jax.jit(lambda p, n=n: step_lib.gradients(loss, p, None, batch, keys, accumulate=n))(
      model.params
    )
    for n in (1, 3)
  ]
  (one, a), (three, b) = found
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7)
  for name in ("loss", "accuracy", "weight"):
    assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5)


def test_frozen_leaves_are_bit_identical_and_have_no_moments(model):
  out = loop.fit(
    model,
    stream(),
    steps=3,
    select="layers/1/mlp/.*",
    optimizer={"lr": 0.1, "weight_decay": 0.5},
  )
  for name in model.addresses():
    same = np.array_equal(np.asarray(model.leaf(name)), np.asarray(out.leaf(name)))
    assert same == (not name.startswith("layers/1/mlp/")), name
  held = sum(x.size for x in jax.tree.leaves(out.aux["optimizer"]) if x.ndim)
  assert held == 2 * 3 * 8 * 12  # first and second moments of gate, up, down in one layer


def test_adapters_train_over_a_frozen_base(model):
  name = "layers/0/mlp/up/kernel"
  names = [name, "layers/1/mlp/up/kernel"]
  low = leaves.LowRank(jnp.ones((8, 2), jnp.bfloat16), jnp.zeros((2, 12), jnp.bfloat16))
  adapted = model.update({n: leaves.Sum((model.leaf(n), low)) for n in names})
  out = loop.fit(adapted, stream(), steps=2, types=("LowRank",), optimizer={"lr": 0.1})
  for address in adapted.addresses():
    old, new = adapted.leaf(address), out.leaf(address)
    if address in names:
      equal(old.parts[0], new.parts[0])
      assert new.parts[1].b.dtype == jnp.bfloat16 and float(jnp.abs(new.parts[1].b).max()) > 0
    else:
      equal(old, new)


def test_masters_are_float32_below_a_bfloat16_model(model):
  half = model.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
  out = loop.fit(
    half, stream(), steps=2, objective=objectives.next_token(dtype="bfloat16", remat=True)
  )
  assert {x.dtype.name for x in jax.tree.leaves(out.params)} == {"bfloat16"}
  moments = [x for x in jax.tree.leaves(out.aux["optimizer"]) if x.ndim]
  assert {x.dtype.name for x in moments} == {"float32"}


def test_a_finished_run_is_read_back_and_an_extended_one_continues(model, tmp_path):
  def options(n):
    return {"steps": n, "optimizer": CONSTANT, "log_every": 1}

  whole = loop.fit(model, stream(), workdir=tmp_path / "whole", **options(6))
  loop.fit(model, stream(), workdir=tmp_path / "parts", **options(4))
  parts = loop.fit(model, stream(), workdir=tmp_path / "parts", **options(6))
  equal(whole.params, parts.params)
  equal(whole.aux["optimizer"], parts.aux["optimizer"])
  assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
  again = loop.fit(model, stream(), workdir=tmp_path / "whole", **options(6))
  equal(whole.params, again.params)
  with pytest.raises(ValueError, match="holds a run of other settings"):
    loop.fit(model, stream(), steps=6, workdir=tmp_path / "whole", seed=1)
  with pytest.raises(ValueError, match="is of another run: .* give an empty work directory"):
    loop.fit(model, stream(), workdir=tmp_path / "whole", select="embed/.*", **options(6))


def test_plain_iterables_resume_by_skipping(model, tmp_path):
  batches = [b for b, _ in zip(stream(), range(6), strict=False)]
  options = {"optimizer": CONSTANT}
  whole = loop.fit(model, batches, steps=6, **options)
  loop.fit(model, batches, steps=4, workdir=tmp_path, **options)
  equal(whole.params, loop.fit(model, batches, steps=6, workdir=tmp_path, **options).params)


PROGRAM = """
import os, signal, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
from treesurgeon import models
from treesurgeon.core import model
from treesurgeon.train import data, loop
spec = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=12, tied=True)
rows = ((np.arange(30)[:, None] + 3 * np.arange(7)[None, :]) % 11).astype(np.int32)
start = model.Model(spec, models.init(spec, jax.random.key(0)))
kill = int(sys.argv[2])
def look(m):
  look.calls += 1
  if look.calls == kill:  # between two checkpoints, with records beyond the last one
    os.kill(os.getpid(), signal.SIGKILL)
  return {"looked": 1.0}
look.calls = 0
loop.fit(start, data.batches(rows, batch=4), steps=9, workdir=sys.argv[1], checkpoint_every=3,
         log_every=1, evaluate=look, evaluate_every=1, accumulate=2)
"""


def test_a_killed_run_continues_to_the_same_losses(model, tmp_path):
  cache = jax.config.jax_compilation_cache_dir
  killed = subprocess.run(
    [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "run"), "8"],
    env={**os.environ, **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  partial = losses(tmp_path / "run")
  assert list(partial) == list(range(1, 9))
  options = {"steps": 9, "log_every": 1, "accumulate": 2}
  whole = loop.fit(model, stream(), workdir=tmp_path / "whole", **options)
  resumed = loop.fit(model, stream(), workdir=tmp_path / "run", checkpoint_every=3, **options)
  equal(whole.params, resumed.params)
  assert losses(tmp_path / "run") == losses(tmp_path / "whole")
  assert all(partial[s] == losses(tmp_path / "whole")[s] for s in partial)
  steps = [r["step"] for r in metrics.read(tmp_path / "run") if "loss" in r]
  assert steps == list(range(1, 10))


def test_half_written_records_are_dropped(tmp_path):
  good = "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 6))
  pathlib.Path(tmp_path, metrics.FILE).write_text(good + '{"step": 6, "lo')
  writer = metrics.Writer(tmp_path, step=3)
  writer.write({"step": 4, "loss": 2.0})
  writer.close()
  assert losses(tmp_path) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}


def test_nothing_compiles_after_the_first_step(model):
  def compilations(steps):
    events = []

    def listen(name, seconds, **details):
      if name.endswith(("backend_compile_duration", "jaxpr_trace_duration")):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      loop.fit(model, stream(), steps=steps, log_every=2, optimizer=CONSTANT)
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
    return len(events)

  compilations(2)  # what the first run of the process needs once
  few = compilations(4)
  assert few == compilations(12) and few > 0


def test_stops_within_a_budget_of_operations(model):
  out = loop.fit(model, stream(), max_flops=3.5 * PER_STEP, optimizer=CONSTANT)
  assert out.aux["flops"] == pytest.approx(3 * PER_STEP)
  budget = {"steps": 99, "max_flops": 5.5 * PER_STEP, "flops_before": 3 * PER_STEP}
  more = loop.fit(out, stream(), optimizer=CONSTANT, **budget)
  assert more.aux["flops"] == pytest.approx(5 * PER_STEP)


def test_moments_are_carried_over(model):
  options = {"optimizer": CONSTANT}
  whole = loop.fit(model, stream(), steps=4, **options)
  batches = [b for b, _ in zip(stream(), range(4), strict=False)]
  half = loop.fit(model, batches[:2], steps=2, **options)
  carried = loop.fit(half, batches[2:], steps=2, carry=True, **options)
  equal(whole.params, carried.params)
  fresh = loop.fit(half, batches[2:], steps=2, **options)
  assert not np.array_equal(
    fresh.params["embed"]["tokens"]["embedding"], whole.params["embed"]["tokens"]["embedding"]
  )
  with pytest.raises(ValueError, match="does not fit the parameters that train"):
    loop.fit(half, batches, steps=1, carry=True, select="embed/.*")
  with pytest.raises(ValueError, match="has no 'optimizer'"):
    loop.fit(model, batches, steps=1, carry=True)


def test_trains_an_encoder_on_masked_tokens(tmp_path):
  spec = models.Spec(
    vocab_size=12, d_model=8, num_layers=1, num_heads=2, d_ff=12, kind="encoder", mlm_head=True
  )
  start = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
  objective = objectives.masked_token(mask_id=11, rate=0.5)
  runs = {}
  for n in (1, 2):
    out = loop.fit(
      start, stream(), steps=3, objective=objective, accumulate=n, workdir=tmp_path / str(n),
      log_every=1,
    )  # fmt: skip
    runs[n] = losses(tmp_path / str(n))
    assert out.addresses() == start.addresses()
  # The masks do not depend on how a batch is cut.
  assert runs[1] == pytest.approx(runs[2], rel=1e-4)


def test_evaluates_and_records(model, tmp_path):
  def evaluate(m):
    return {"size": float(m.size())}

  loop.fit(
    model,
    stream(),
    steps=5,
    optimizer=CONSTANT,
    workdir=tmp_path,
    evaluate=evaluate,
    evaluate_every=2,
  )
  seen = [r["step"] for r in metrics.read(tmp_path) if "size" in r]
  assert seen == [2, 4, 5]


def nan_objective(spec, params, batch, keys):
  loss, aux = objectives.next_token()(spec, params, batch, keys)
  return jnp.where(batch[0, 0] == 10, jnp.nan, loss), aux


def test_stops_at_the_first_loss_that_is_not_finite(model, tmp_path):
  batches = [np.full((2, 7), i, np.int32) for i in (1, 2, 10, 3, 4)]
  with pytest.raises(ValueError, match=r"step 3: loss is nan, with lr=0\.01"):
    loop.fit(
      model, batches, steps=5, objective=nan_objective, workdir=tmp_path, checkpoint_every=1,
      optimizer={"lr": 0.01, "schedule": "constant"},
    )  # fmt: skip
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [1, 2]


@pytest.mark.parametrize(
  ("batches", "options", "message"),
  [
    ([], {"steps": 1}, "the data is empty"),
    ([np.ones((2, 3), np.int32)], {}, "give steps, max_flops, or both"),
    ([np.ones((2, 3), np.int32)], {"steps": 0}, "steps=0 must be at least 1"),
    ([np.ones((2, 3), np.int32)], {"steps": 2}, "the data ended after 1 batches"),
    ([np.ones((2, 3), np.int32)], {"max_flops": 10.0}, "does not pay for one step"),
    ([np.ones((2, 3), np.float32)], {"steps": 1}, r"must be integer tokens .* float32\(2, 3\)"),
    ([np.ones(3, np.int32)], {"steps": 1}, r"must be integer tokens"),
    ([np.full((2, 3), 11, np.int32)], {"steps": 1}, r"batch 1 holds token id 11; .* 0 to 10"),
    ([np.full((2, 3), -1, np.int32)], {"steps": 1}, "batch 1 holds token id -1"),
    (
      [np.ones((2, 3), np.int32), np.ones((1, 3), np.int32)],
      {"steps": 2},
      r"batch 2 is int32\[1, 3\]; the first was int32\[2, 3\]",
    ),
    (
      [np.ones((6, 3), np.int32)],
      {"steps": 1, "accumulate": 4},
      "a batch of 6 is not divisible by accumulate=4; valid: 1, 2, 3, 6",
    ),
    (
      [np.ones((2, 3), np.int32)],
      {"steps": 1, "optimizer": {"name": "adma"}},
      "unknown optimizer 'adma'; did you mean 'adamw'",
    ),
  ],
)
def test_bad_input_is_named(model, batches, options, message):
  with pytest.raises(ValueError, match=message):
    loop.fit(model, batches, **options)


def test_feed_tells_where_it_stood():
  source = feed.Feed(stream(), vocab_size=11)
  drawn = [next(source) for _ in range(5)]
  again = feed.Feed(stream(), vocab_size=11)
  again.resume(3, json.loads(json.dumps(source.state(3))))
  np.testing.assert_array_equal(next(again), drawn[3])


def test_flops_count_what_is_multiplied():
  spec = models.Spec(
    vocab_size=10, d_model=4, num_layers=2, num_heads=2, d_ff=(6, 8), window=(0, 3), tied=True
  )
  params = models.init(spec, jax.random.key(0))
  kernels = sum(
    x.size for name, x in model_lib.paths.walk(params).items() if name.endswith("kernel")
  )
  attention = 12 * 2 * 2 * (5 + 3)
  want = 7 * (6 * (kernels + 10 * 4) + attention)
  assert flops.train_flops(spec, 7, 5) == want


def test_ready_made_optimizers_and_select_count(model):
  made = optimizers.build(name="sgd", lr=0.1, schedule="constant", steps=1, weight_decay=0.0)
  out = loop.fit(model, stream(), steps=1, optimizer=made)
  assert partition.count(out.params) == model.size()
