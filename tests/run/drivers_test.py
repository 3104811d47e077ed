# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import leaves, lifting, lineage, model, needs, paths, step
from treesurgeon.run import activations, collect, drivers, dry, replay, statistics

SPEC = models.Spec(vocab_size=19, d_model=8, num_layers=3, num_heads=2, d_ff=16, max_positions=16)
TIED = dataclasses.replace(SPEC, tied=True)
TEXT = [np.random.default_rng(i).integers(0, 19, (2, 6)) for i in range(2)]
GPTQ = "compress.quantize.gptq(bits=3, group_size=8)"


def make(spec=SPEC, seed=0):
  return model.Model(spec, models.init(spec, jax.random.key(seed)))


def materials(**more):
  return collect.Materials(**{"batches": TEXT, "donors": [make(seed=1), make(seed=2)], **more})


class Memory:
  """A sink that keeps leaves, and may break off."""

  def __init__(self, limit=10**9):
    self.flat, self.limit = {}, limit

  def done(self, address):
    return address in self.flat

  def write(self, address, leaf):
    if len(self.flat) == self.limit:
      raise KeyboardInterrupt
    self.flat[address] = leaf

  def model(self, spec):
    return model.Model(spec, paths.unflatten(self.flat))


def noise(w, key):
  return (leaves.dense(w) + 0.1 * jax.random.normal(key, w.shape)).astype(w.dtype)


def damaged(w):
  return jnp.where(jnp.arange(w.size).reshape(w.shape) < 2, jnp.nan, w)


def scaled(w, inputs):
  return w * (inputs.value / inputs.count).sum()


@step.method("test.noisy")
def noisy(*, select: str | None = None) -> step.Step:
  """Add noise."""
  return lifting.over_leaves(
    noise, hyper={}, select=select, default=".*", domain=".*", random=True, raw=True
  )


@step.method("test.damage")
def damage(*, select: str) -> step.Step:
  """Break weights."""
  return lifting.over_leaves(damaged, hyper={}, select=select)


@step.method("test.scale")
def scale(*, select: str | None = None) -> step.Step:
  """Scale by the inputs."""
  wants = {"inputs": needs.Statistic("sum_squares")}
  return lifting.over_leaves(scaled, hyper={}, select=select, wants=wants, scope="block")


def told(w, inputs, targets, forward, inputs_squared, key, rate):
  """Makes every number it was given show in the result."""
  own = forward({}, inputs)
  changed = forward({a: x + rate for a, x in w.items()}, inputs[:1])
  told = inputs.mean() + 2 * targets.mean() + 3 * own.mean() + 4 * changed.mean()
  noise = jax.random.uniform(key)
  return {a: x * (told + noise + inputs_squared[a].value.sum()) for a, x in w.items()}


@step.method("test.tell")
def tell(*, select: str | None = None, rate: float = 0.5) -> step.Step:
  """Scale by all there is to know of a block."""
  wants = {"inputs_squared": needs.Statistic("sum_squares")}
  hyper = {"rate": rate}
  return lifting.over_blocks(told, hyper=hyper, wants=wants, select=select, random=True)


def test_every_driver_gives_a_leaf_step_the_same_bits():
  quantize = registry.parse("compress.quantize.rtn(bits=4, group_size=8, select='layers/1/.*')")
  mixed = step.by_path([("layers/[02]/mlp/.*", noisy()), ("(embed|lm_head)/.*", noisy() + noisy())])
  merge = registry.parse("merge.linear()")
  transform = merge + noisy() + quantize + mixed
  m = make()
  whole = drivers.run(transform, m, materials(), seed=4)
  blocks = drivers.run_blockwise(transform, m, materials(), seed=4)
  sink = Memory()
  records = drivers.stream(transform, m, sink, materials(), seed=4)
  assert replay.differing(whole, blocks) == []
  assert replay.differing(whole, sink.model(SPEC)) == []
  assert replay.differing(whole, drivers.run(transform, m, materials(), seed=5)) != []
  assert [(r.expression, r.index, r.seed) for r in records] == [
    (r.expression, r.index, r.seed) for r in whole.lineage
  ]
  assert {r.driver for r in records} == {"stream"}
  assert m.lineage == () and len(whole.lineage) == 4


def test_a_broken_off_stream_goes_on_where_it_was():
  transform, m = noisy(), make()
  whole, sink = Memory(), Memory(limit=5)
  drivers.stream(transform, m, whole)
  with pytest.raises(KeyboardInterrupt):
    drivers.stream(transform, m, sink)
  sink.limit, before = 10**9, dict(sink.flat)
  drivers.stream(transform, m, sink)
  assert replay.differing(sink.model(SPEC), whole.model(SPEC)) == []
  assert all(sink.flat[a] is x for a, x in before.items())


@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["untied", "tied"])
def test_blockwise_is_the_loop_one_would_write(spec):
  select = "(layers|lm_head)/.*" if not spec.tied else "layers/.*"
  (one,) = scale(select=select)
  m = make(spec)
  done = drivers.run_blockwise((one,), m, materials())
  flat = paths.flatten(m.params)
  hidden = [models.embed(spec, m.params, b) for b in TEXT]

  def change(kernels, taps):
    for address in kernels:
      x = np.concatenate([np.asarray(t[models.tap_of(address)], np.float64) for t in taps])
      flat[address] = flat[address] * float((x.reshape(-1, x.shape[-1]) ** 2).mean(0).sum())

  for i in range(spec.num_layers):
    names = [a for a in flat if a.startswith(f"layers/{i}/")]

    def nested(i=i, names=names):
      return paths.nest({a.split("/", 2)[2]: flat[a] for a in names})

    see = [models.block(spec, nested(), h, layer=i, observe=lambda n, x: x)[1] for h in hidden]
    change([a for a in names if a.endswith("kernel")], see)
    hidden = [models.block(spec, nested(), h, layer=i)[0] for h in hidden]
  if not spec.tied:
    see = []
    for h in hidden:
      models.head(spec, m.params, h, observe=lambda n, x: see.append({n: x}))
    change(["lm_head/kernel"], see)
  for address, want in flat.items():
    np.testing.assert_allclose(done.leaf(address), want, rtol=2e-4, err_msg=address)


@pytest.mark.parametrize("driver", [drivers.run, drivers.run_blockwise])
def test_a_block_is_tuned_on_what_the_changed_model_feeds_it_and_the_old_one_gives(driver):
  m, taps = make(), {"attn/q/kernel": "attn/in", "mlp/down/kernel": "mlp/down/in"}
  done = driver(tell(select="layers/[02]/(attn/q|mlp/down)/kernel"), m, materials(), seed=2)
  flat = paths.flatten(m.params)
  old = new = jnp.concatenate([models.embed(SPEC, m.params, b) for b in TEXT])
  for i in range(SPEC.num_layers):
    start = f"layers/{i}/"
    params = {a[len(start) :]: x for a, x in flat.items() if a.startswith(start)}

    def forward(h, i=i, params=params, **changes):
      return models.block(
        SPEC, paths.nest({**params, **changes}), h, layer=i, observe=lambda n, v: v
      )

    inputs = old if driver is drivers.run else new
    (old, _), (own, seen) = forward(old), forward(inputs)
    changes = {}
    if i in (0, 2):
      moved, _ = forward(inputs[:1], **{a: params[a] + 0.5 for a in taps})
      told = inputs.mean() + 2 * old.mean() + 3 * own.mean() + 4 * moved.mean()
      key = step.leaf_key(jax.random.fold_in(jax.random.key(2), 0), f"layers/{i}")
      told += jax.random.uniform(key)
      changes = {a: params[a] * (told + (seen[t] ** 2).sum()) for a, t in taps.items()}
    for a, want in changes.items():
      np.testing.assert_allclose(done.leaf(start + a), want, rtol=1e-4, err_msg=start + a)
    new, _ = forward(new, **changes)
  for a in ("layers/1/attn/q/kernel", "layers/0/mlp/up/kernel", "lm_head/kernel"):
    np.testing.assert_array_equal(done.leaf(a), flat[a])


def test_blocks_of_equal_structure_share_a_program():
  (one,) = tell()
  m = make(dataclasses.replace(SPEC, num_layers=4))
  evidence = collect.evidence(one, m, materials())
  traces = []

  def counting(w, **given):
    traces.append(sorted(w))
    return told(w, **given)

  wants = {"inputs_squared": needs.Statistic("sum_squares")}
  again = lifting.over_blocks(counting, hyper={"rate": 0.5}, wants=wants, random=True)
  again.apply(m, evidence, jax.random.key(0))
  assert len(traces) == 1 and len(traces[0]) == 7


def test_a_step_on_blocks_obeys_the_laws():
  (one,) = tell(select="layers/[01]/mlp/.*")
  m, key = make(), jax.random.key(0)
  evidence = collect.evidence(one, m, materials())
  changed = one.apply(m, evidence, key)

  def dry_apply(params):
    return one.apply(m.replace(params=params), evidence, key).params

  shapes = jax.eval_shape(dry_apply, m.params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), changed.params
  )
  dried = dry.dry_run((one,), m)
  assert jax.tree.structure(dried.params) == jax.tree.structure(changed.params)
  units = one.units(m.addresses())
  assert [{statistics.layer_of(a) for a in u} for u in units] == [{0}, {1}]
  for unit in units:
    part = one.apply(model.Part(m.spec, {a: m.leaf(a) for a in unit}), evidence, key)
    for a in unit:
      np.testing.assert_array_equal(part.leaf(a), changed.leaf(a))
  (aimed,) = step.by_path([("layers/1/.*", tell()), (".*", registry.parse("merge.passthrough()"))])
  assert aimed.needs["0.block"].select == aimed.needs["0.inputs_squared"].select
  assert list(collect.evidence(aimed, m, materials())["0.block"]) == ["layers/1"]
  drivers.run_blockwise((aimed,), m, materials())


def test_what_a_step_on_blocks_lacks_is_named():
  with pytest.raises(ValueError, match="needs calibration text and none was given"):
    drivers.run_blockwise(tell(), make())
  uneven = [TEXT[0], TEXT[1][:, :4]]
  for driver in (drivers.run, drivers.run_blockwise):
    with pytest.raises(ValueError, match="batches must have one length; there are 4 and 6"):
      driver(tell(), make(), materials(batches=uneven))
  with pytest.raises(ValueError, match="no address matches 'lm_head/kernel'"):
    drivers.run_blockwise(tell(select="lm_head/kernel"), make(), materials())

  def wrong(w, inputs, targets, forward):
    return {"w": forward({"mlp/middle/kernel": 1}, inputs)}

  (one,) = tell()
  one = lifting.over_blocks(wrong, hyper={})._replace(info=one.info)
  with pytest.raises(ValueError, match="layers/0: 'mlp/middle/kernel' is not in the block, which"):
    drivers.run((one,), make(), materials())


def test_blockwise_embeds_with_the_changed_embeddings():
  transform = noisy(select="embed/tokens/embedding") + scale()
  m = make(TIED)
  both = drivers.run_blockwise(transform, m, materials(), seed=1)
  (record,) = both.lineage[1:]
  first = drivers.run(transform[:1], m, materials(), seed=1)
  then = drivers.run_blockwise(transform[1:], first, materials(), seed=1, first=1)
  assert replay.differing(both, then) == []
  assert record == then.lineage[-1]


@pytest.mark.slow
def test_blockwise_compiles_as_much_for_six_layers_as_for_three():
  sizes = []
  for layers in (3, 6):
    m = make(dataclasses.replace(SPEC, num_layers=layers, d_ff=24))
    statistics._through.clear_cache()
    drivers.run_blockwise(scale(), m, materials())
    sizes.append(statistics._through._cache_size())
  # With statistics, empty and not, and without; no input of a last block is computed in vain.
  assert sizes == [3, 3]


class Journal(Memory):
  """A sink that tells blocks that are complete from those that are not, and may break off."""

  def __init__(self, limit=10**9):
    super().__init__(limit)
    self.state, self.kept = {}, set()

  def done(self, address):
    return address in self.kept

  def write(self, address, leaf):
    if not self.done(address):
      super().write(address, leaf)

  def leaf(self, address):
    return jax.tree.map(np.asarray, self.flat[address])

  def flush(self, state):
    self.state, self.kept = json.loads(json.dumps(state)), set(self.flat)

  def killed(self):
    """What a process finds that comes after this one was killed."""
    again = Journal()
    again.state, again.kept = self.state, set(self.kept)
    again.flat = {a: self.flat[a] for a in self.kept}
    return again


MERGE = "merge.linear(weights=(0.5, 0.25, 0.25), select='layers/.*/mlp/.*')"
CHAINS = {
  "statistics": lambda: scale(select="(layers|lm_head)/.*"),
  "blocks": tell,
  "embeddings first": lambda: noisy(select="embed/.*") + scale(select="layers/.*/mlp/.*"),
  "three levels": lambda: registry.parse(MERGE) + tell(select="layers/[12]/.*") + scale(),
  "donors' statistics": lambda: registry.parse("merge.regmean_pp()"),
}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=() if n in ("blocks", "three levels") else pytest.mark.slow)
    for n in CHAINS
  ],
)
def test_blocks_are_streamed_to_the_same_bits(name, tmp_path):
  transform, m = CHAINS[name](), make()
  whole = drivers.run_blockwise(transform, m, materials(), seed=4)
  assert drivers.block_streamable(transform, m)
  cut = Journal(limit=22)  # embeddings, two blocks, and some of the third
  with pytest.raises(KeyboardInterrupt):
    drivers.stream_blocks(transform, m, cut, materials(), seed=4)
  again = cut.killed()
  # The second run also keeps its hidden states in a file.
  small = materials(room=activations.Room(nbytes=64, folder=str(tmp_path)))
  records = drivers.stream_blocks(transform, m, again, small, seed=4)
  assert replay.differing(whole, again.model(SPEC)) == []
  assert records == whole.lineage
  assert list(tmp_path.iterdir()) == []


def test_a_finished_block_is_not_computed_again():
  changed = []

  def apply(m, evidence, key):
    changed.extend({statistics.layer_of(a) for a in m.addresses()})
    return one.apply(m, evidence, key)

  (one,) = scale()
  watched = (one._replace(apply=apply),)
  cut = Journal(limit=22)
  with pytest.raises(KeyboardInterrupt):
    drivers.stream_blocks(watched, make(), cut, materials())
  assert changed == [0, 1, 2]
  drivers.stream_blocks(watched, make(), cut.killed(), materials())
  assert changed == [0, 1, 2, 2]


def test_what_cannot_be_streamed_by_blocks_is_told():
  m = make()
  (scaled,) = scale()
  units = [("layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel")]
  torn = (scaled._replace(units=lambda names: units),)
  assert not drivers.block_streamable(torn, m)
  for text, message in (
    ("grow.g_stack()", "works on a whole model, so it cannot be streamed"),
    ("merge.fisher()", "needs fisher of the whole model, so it cannot be streamed"),
  ):
    transform = registry.parse(text)
    assert not drivers.block_streamable(transform, m)
    with pytest.raises(ValueError, match=message):
      drivers.stream_blocks(transform, m, Memory(), materials())


@pytest.mark.parametrize(
  ("driver", "spec"),
  [
    (drivers.run_blockwise, SPEC),
    (drivers.run, dataclasses.replace(SPEC, kind="encoder", num_layers=2)),
  ],
  ids=["decoder", "encoder"],
)
def test_padding_is_not_seen(driver, spec):
  rng = np.random.default_rng(5)
  tokens, lengths = rng.integers(0, 19, (2, 6)), (6, 3)
  mask = np.array([[i < n for i in range(6)] for n in lengths], np.int32)
  padded = [{"tokens": tokens, "mask": mask}]
  apart = [tokens[i : i + 1, :n] for i, n in enumerate(lengths)]
  a, b = (driver(scale(), make(spec), materials(batches=x)) for x in (padded, apart))
  for address in a.addresses():
    np.testing.assert_allclose(a.leaf(address), b.leaf(address), rtol=1e-5, err_msg=address)
  with pytest.raises(ValueError, match="rows must have no padding; pack the documents"):
    driver(tell(), make(), materials(batches=padded))


@pytest.mark.parametrize("driver", [drivers.run, drivers.run_blockwise])
def test_dead_inputs_and_want_of_tokens_are_noted(driver):
  m = make()
  dead = m.leaf("layers/1/mlp/up/kernel").at[:, :3].set(0)
  m = m.update({"layers/1/mlp/up/kernel": dead})

  def same(w, hessian):
    return w + 0 * hessian.moment.sum()

  one = lifting.over_leaves(same, hyper={}, wants={"hessian": needs.Statistic("second_moment")})
  one = one._replace(info={"name": "demo", "given": {}, "arguments": {}}, scope="block")
  few = materials(batches=[TEXT[0][:, :5]])
  with pytest.warns(UserWarning) as told:
    done = driver((one,), m, few)
  (told,) = told
  assert "layers/0/mlp/down/kernel: 10 calibration tokens for 16 input features" in str(
    told.message
  )
  assert "lacks at least 6 of its rank" in str(told.message)
  (record,) = done.lineage
  assert record.notes["dead_inputs"] == {"layers/1/mlp/down/kernel": 3}
  assert record.notes["rank_deficit"] == {f"layers/{i}/mlp/down/kernel": 6 for i in range(3)}
  assert drivers.run((one,), make(), materials()).lineage[0].notes == {}


def mixture():
  """Make a mixture of experts, of which the second of layer 1 is never chosen."""
  m = make(dataclasses.replace(SPEC, num_experts=3, experts_per_token=2))
  router = "layers/1/mlp/router/kernel"
  changes = {
    # Every token has this channel, which speaks against the expert.
    "embed/tokens/embedding": m.leaf("embed/tokens/embedding").at[:, 0].set(0.05),
    router: m.leaf(router).at[0, 1].set(-100.0),
  }
  return m.update(changes)


@pytest.mark.parametrize("driver", [drivers.run, drivers.run_blockwise])
def test_an_expert_that_never_fires_is_named_and_rounded_plainly(driver):
  m = mixture()
  text = materials(batches=[np.random.default_rng(0).integers(0, 19, (16, 16))])
  with pytest.warns(UserWarning) as told:
    done = driver(registry.parse(GPTQ), m, text)
  (told,) = [str(w.message) for w in told]
  assert told.startswith("layers/1/mlp/experts/1 never fired on the calibration set")
  assert done.lineage[-1].notes == {"idle_experts": {"layers/1/mlp/experts/1": 0}}
  plain = drivers.run(registry.parse("compress.quantize.rtn(bits=3, group_size=8)"), m, text)
  for address in m.addresses():
    got, rounded = (leaves.dense(x.leaf(address)) for x in (done, plain))
    assert np.isfinite(np.asarray(got)).all(), address
    if "/experts/1/" in address and address.startswith("layers/1/"):
      np.testing.assert_array_equal(got, rounded)
  assert not leaves.is_leaf(done.leaf("layers/1/mlp/router/kernel"))
  assert leaves.is_leaf(done.leaf("layers/1/mlp/experts/0/up/kernel"))


@pytest.mark.parametrize(
  "transform",
  [
    "compress.prune.wanda(sparsity=0.5)",
    pytest.param("compress.prune.sparsegpt(sparsity=0.5)", marks=pytest.mark.slow),
    pytest.param("compress.quantize.awq(bits=4, group_size=8)", marks=pytest.mark.slow),
  ],
)
def test_an_expert_that_never_fires_leaves_weights_finite(transform):
  text = materials(batches=[np.random.default_rng(0).integers(0, 19, (16, 16))])
  with pytest.warns(UserWarning, match=r"layers/1/mlp/experts/1 never fired on the calibration"):
    done = drivers.run_blockwise(registry.parse(transform), mixture(), text)
  for address in done.addresses():
    assert np.isfinite(np.asarray(leaves.dense(done.leaf(address)))).all(), address


@pytest.mark.parametrize("need", [needs.Statistic("gradient"), needs.Blocks()])
def test_an_expert_that_never_fires_is_named_whatever_is_asked(need):
  one = step.Step({"x": need}, lambda m, e, k: m, "model", {}, lambda names: [tuple(names)])
  text = materials(batches=[np.random.default_rng(0).integers(0, 19, (16, 16))])
  with pytest.warns(UserWarning, match=r"^layers/1/mlp/experts/1 never fired on") as told:
    collect.evidence(one, mixture(), text)
  assert len(told) == 1


def test_blockwise_refuses_what_reaches_over_blocks():
  def same(w):
    return w

  one = lifting.over_groups(
    same, groups=r"layers/\d+/(?P<group>.*)/(?P<role>kernel)", hyper={}, scope="leaf"
  )
  units = [("layers/0/mlp/up/kernel", "layers/1/mlp/up/kernel")]
  one = one._replace(info={"name": "demo", "given": {}}, units=lambda names: units)
  with pytest.raises(ValueError, match="which lies in another block; use the driver 'run'"):
    drivers.run_blockwise((one,), make(), materials())


@pytest.mark.parametrize("driver", [drivers.run, drivers.run_blockwise])
def test_by_products_and_notes_of_every_part_are_kept(driver):
  (inner,) = noisy(select="layers/.*/kernel")

  def apply(m, evidence, key):
    names = [a for a in m.addresses() if a.endswith("kernel")]
    out = inner.apply(m, evidence, key)
    aux = {"masks": dict.fromkeys(names, 1), "notes": {a: len(a) for a in names}}
    return out.replace(aux={**out.aux, **aux})

  done = driver((inner._replace(apply=apply),), make(), materials())
  kernels = {a for a in make().addresses() if a.endswith("kernel")}
  layered = {a for a in kernels if a.startswith("layers/")}
  assert layered <= set(done.aux["masks"]) <= kernels
  assert layered <= set(done.lineage[0].notes)
  assert "notes" not in done.aux


def test_mistakes_are_found_before_any_work():
  calls = []

  def apply(m, evidence, key):
    calls.append(m)
    return m

  first = noisy()[0]._replace(apply=apply)
  for later, message in (
    (registry.parse("compress.quantize.rtn(select='nothing')"), "no address matches 'nothing'"),
    (registry.parse(GPTQ), "needs calibration text and none was given"),
    (registry.parse("merge.ties()"), "needs donor models and none was given"),
    (registry.parse("edit.rome()"), "needs edit requests and none were given"),
  ):
    for driver in (drivers.run, drivers.run_blockwise):
      with pytest.raises(ValueError, match=message):
        driver((first, *later), make())
  assert not calls


def test_selections_are_checked_again_when_layers_were_added():
  grow = registry.parse("grow.g_stack(growth=2)")
  done = drivers.run(grow + noisy(select="layers/5/mlp/up/kernel"), make())
  assert done.spec.num_layers == 6
  with pytest.raises(ValueError, match="no address matches 'layers/6/.*'"):
    drivers.run(grow + noisy(select="layers/6/.*"), make())


@pytest.mark.parametrize("driver", ["run", "blockwise", "stream"])
def test_weights_that_are_not_finite_are_named(driver):
  def go(transform, m):
    if driver == "stream":
      return drivers.stream(transform, m, Memory())
    return {"run": drivers.run, "blockwise": drivers.run_blockwise}[driver](transform, m)

  m = make()
  bad = m.update({"layers/2/mlp/up/kernel": m.leaf("layers/2/mlp/up/kernel").at[0, 0].set(jnp.inf)})
  where = "in the base model" if driver == "stream" else "in the model"
  with pytest.raises(ValueError, match=f"layers/2/mlp/up/kernel: 1 of 128 values .* {where}"):
    go(noisy(), bad)
  with pytest.raises(ValueError, match=r"layers/1/attn/q/kernel: 2 of 64 .* after test.damage\("):
    go(noisy() + damage(select="layers/1/attn/q/kernel"), m)
  bad = m.update({"final_norm/scale": jnp.full(8, jnp.nan)})
  with pytest.raises(ValueError, match="final_norm/scale: 8 of 8 values are NaN or infinite"):
    go(noisy(), bad)


def test_what_cannot_be_streamed_is_told():
  for text, message in (
    (GPTQ, "works on a whole block, so it cannot be streamed"),
    ("grow.g_stack()", "works on a whole model"),
  ):
    transform = registry.parse(text)
    assert not drivers.streamable(transform)
    with pytest.raises(ValueError, match=message):
      drivers.stream(transform, make(), Memory(), materials())
  assert drivers.streamable(registry.parse("merge.ties()"))


def test_a_record_is_enough_to_do_it_again():
  m = make()
  done = drivers.run(registry.parse("grow.g_stack(growth=2)") + noisy(), m, materials(), seed=3)
  done = drivers.run_blockwise(registry.parse(GPTQ) + noisy(), done, materials(), seed=8)
  records = lineage.from_json(lineage.to_json(done.lineage))
  assert records == done.lineage
  parse = {"test.noisy()": noisy()}
  again = replay.replay(
    records, m, [materials()], parse=lambda s: parse.get(s) or registry.parse(s)
  )
  assert replay.differing(done, again) == []
  assert again.lineage == done.lineage


def test_a_streamed_merge_with_casts_is_replayed():
  from treesurgeon.run import casting

  m, given = make(), materials(batches=(), recipe={"dtype": "bfloat16", "out_dtype": "float16"})
  sink = Memory()
  donors = dataclasses.replace(given, donors=[casting.Cast(d, "bfloat16") for d in given.donors])
  records = drivers.stream(
    registry.parse("merge.task_arithmetic(lam=0.5)"),
    casting.Cast(m, "bfloat16"),
    casting.CastSink(sink, "float16"),
    donors,
  )
  again = replay.replay(records, m, [given], parse=registry.parse)
  assert again.leaf("final_norm/scale").dtype == "float16"
  assert replay.differing(sink.model(SPEC), again) == []


def test_what_cannot_be_replayed_is_told():
  m = make()
  done = drivers.run(registry.parse(GPTQ), m, materials())
  (record,) = done.lineage

  def again(record, given=materials()):  # noqa: B008
    return replay.replay([record], m, [given], parse=registry.parse)

  with pytest.raises(ValueError, match="was made from another batches: sha256 "):
    again(record, materials(batches=TEXT[:1]))
  with pytest.raises(ValueError, match="'fit'; replay knows run, stream, run_blockwise"):
    again(dataclasses.replace(record, driver="fit"))
  with pytest.raises(ValueError, match="was made with jax 0.0.1, this is .* any_version=True"):
    again(dataclasses.replace(record, versions={**record.versions, "jax": "0.0.1"}))
