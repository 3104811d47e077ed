# SPDX-License-Identifier: Apache-2.0
"""Every registered transform obeys every law. The rows are in `contract_table.py`."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import leaves, model, paths, step
from treesurgeon.run import collect, drivers, dry

_SPEC = importlib.util.spec_from_file_location(
  "contract_table", pathlib.Path(__file__).with_name("contract_table.py")
)
table = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(table)

ALL = [*table.ROWS, *table.EXTRA]


def every_row(law):
  """Parametrizes a law over the rows; what `make test` leaves out is marked slow."""
  rows = [
    pytest.param(
      r, id=f"{r.name}-{i}", marks=[pytest.mark.slow] if table.slow(r, law.__name__) else []
    )
    for i, r in enumerate(ALL)
  ]
  return pytest.mark.parametrize("row", rows)(law)


@functools.cache
def case(index: int, dtype: str = "float32"):
  """Returns (model, step, evidence, changed model), computed once a row."""
  row = ALL[index]
  m = row.prepare(table.tiny(dtype=dtype))
  (one,) = row.build()
  evidence = collect.evidence(one, m, row.materials(m))
  return m, one, evidence, one.apply(m, evidence, KEY)


KEY = jax.random.key(7)


def of(row, dtype="float32"):
  return case(ALL.index(row), dtype)


def bits(leaf):
  """Returns a leaf's structure and the bytes of its arrays."""
  arrays, structure = jax.tree.flatten(leaf)
  return structure, [(np.asarray(a).dtype, np.asarray(a).tobytes()) for a in arrays]


def same(a, b):
  flat, twin = paths.flatten(a.params), paths.flatten(b.params)
  assert list(flat) == list(twin)
  for address in flat:
    assert bits(flat[address]) == bits(twin[address]), address


@contextlib.contextmanager
def compilations():
  """Counts the programs compiled inside."""
  seen = []

  def hear(event, duration, **more):
    del duration, more
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)


def test_the_table_is_complete():
  names = [row.name for row in table.ROWS]
  assert names == sorted(names)
  missing = sorted(set(registry.TABLE) - set(names))
  unknown = sorted(set(names) - set(registry.TABLE))
  assert not missing, f"add rows to tests/contract_table.py for {missing}"
  assert not unknown, f"rows of tests/contract_table.py that the registry does not list: {unknown}"


@every_row
def test_inputs_are_unmodified(row):
  m = row.prepare(table.tiny())
  (one,) = row.build()
  evidence = collect.evidence(one, m, row.materials(m))
  donors = [d for name in one.needs for d in getattr(evidence[name], "sources", ())]
  before = [bits(x.params) for x in (m, *donors)]
  one.apply(m, evidence, KEY)
  assert not any(x.is_deleted() for x in jax.tree.leaves(m.params))
  assert [bits(x.params) for x in (m, *donors)] == before


@every_row
def test_it_changes_something(row):
  m, one, _, changed = of(row)
  if row.still or row.name.startswith("adapt."):
    return
  del one
  flat, twin = paths.flatten(m.params), paths.flatten(changed.params)
  assert set(flat) != set(twin) or any(bits(flat[a]) != bits(twin[a]) for a in twin)


@every_row
def test_what_is_not_selected_stays_identical(row):
  m, one, _, changed = of(row)
  inside = {a for unit in one.units(m.addresses()) for a in unit}
  for address in set(m.addresses()) - inside:
    assert bits(m.leaf(address)) == bits(changed.leaf(address)), address
  if any(a.startswith("embed/") for a in inside):
    return
  assert changed.params["embed"]["tokens"]["embedding"] is m.params["embed"]["tokens"]["embedding"]


@every_row
def test_by_path_aims_it(row):
  m, one, _, _ = of(row)
  if one.reselect is None:
    with pytest.raises(ValueError, match="cannot be aimed at"):
      step.by_path([("layers/1/.*", row.build())])
    return
  (aimed,) = step.by_path([(r"layers/1/mlp/.*", row.build())])
  evidence = collect.evidence(aimed, m, row.materials(m))
  changed = aimed.apply(m, evidence, KEY)
  units = {a for unit in aimed.units(m.addresses()) for a in unit}
  assert units
  assert all(a.startswith("layers/1/mlp/") for a in units)
  for address in m.addresses():
    if address not in units:
      assert bits(m.leaf(address)) == bits(changed.leaf(address)), address
  (again,) = registry.parse(step.spell((aimed,)))
  assert repr(again) == repr(aimed)


@every_row
def test_eval_shape_agrees(row):
  m, one, evidence, changed = of(row)

  def dry(params):
    return one.apply(m.replace(params=params), evidence, KEY).params

  shapes = jax.eval_shape(dry, m.params)
  if row.adapts:
    planned = m.replace(params=shapes)
    for address in changed.addresses():
      same = [(x.shape, x.dtype) for x in (planned.leaf(address), changed.leaf(address))]
      assert same[0] == same[1], address
    return
  assert jax.tree.structure(shapes) == jax.tree.structure(changed.params)
  for dry_leaf, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(changed.params), strict=True):
    assert (dry_leaf.shape, dry_leaf.dtype) == (leaf.shape, leaf.dtype)


@every_row
def test_unit_by_unit_equals_whole(row):
  m, one, evidence, changed = of(row)
  if one.scope == "model":
    return
  for unit in one.units(m.addresses()):
    part = model.Part(m.spec, {a: m.leaf(a) for a in unit})
    out = one.apply(part, evidence, KEY)
    for address in unit:
      assert bits(out.leaf(address)) == bits(changed.leaf(address)), address


class Memory:
  """A sink that keeps leaves."""

  def __init__(self):
    self.flat = {}

  def done(self, address):
    return address in self.flat

  def write(self, address, leaf):
    self.flat[address] = leaf


@every_row
def test_stream_equals_run(row):
  transform = row.build()
  if not drivers.streamable(transform):
    return
  m = row.prepare(table.tiny())
  try:
    dry.refuse_twice(transform, m)
  except ValueError:
    m = table.tiny()  # prepared for the neutral setting; drivers do not quantize twice
  materials = row.materials(m)
  whole = drivers.run(transform, m, materials, seed=3)
  sink = Memory()
  records = drivers.stream(transform, m, sink, materials, seed=3)
  assert [r.expression for r in records] == [r.expression for r in whole.lineage]
  same(model.Model(m.spec, paths.unflatten(sink.flat)), whole)


@every_row
def test_the_neutral_setting_is_the_identity(row):
  m = row.prepare(table.tiny())
  (one,) = row.build(**row.neutral)
  materials = row.materials(m)
  if row.still:
    materials = dataclasses.replace(materials, requests=())
  out = one.apply(m, collect.evidence(one, m, materials), KEY)
  assert out.spec == m.spec
  for address in m.addresses():
    before, after = (np.asarray(leaves.dense(x.leaf(address))) for x in (m, out))
    np.testing.assert_array_equal(after, before, err_msg=address)


@every_row
def test_the_storage_dtype_is_kept(row):
  m, _, _, changed = of(row, "bfloat16")
  for address in changed.addresses():
    assert leaves.dense(changed.leaf(address)).dtype == "bfloat16", address
  del m


@every_row
def test_spelling_and_info_round_trip(row):
  transform = row.build()
  spelling = step.spell(transform)
  assert step.spell(registry.parse(spelling)) == spelling
  (one,) = transform
  info = json.loads(json.dumps(one.info))
  assert info["name"] == row.name
  again = registry.load(row.name)(**info["arguments"])
  assert step.spell(again) == spelling


@every_row
def test_a_second_call_compiles_nothing(row):
  m, _, evidence, changed = of(row)
  (one,) = row.build()
  first = one.apply(m, evidence, KEY)
  with compilations() as seen:
    second = one.apply(m, evidence, KEY)
  assert not seen
  same(first, changed)
  same(second, changed)


@every_row
def test_compilations_do_not_grow_with_depth(row):
  counts = []
  for layers in (3, 6):
    spec = dataclasses.replace(table.WIDER, num_layers=layers)
    m = row.prepare(table.tiny(spec))
    (one,) = row.build()
    evidence = collect.evidence(one, m, row.materials(m))
    with compilations() as seen:
      one.apply(m, evidence, KEY)
    counts.append(len(seen))
  # The first model compiles the method, either what cuts and stacks its layers.
  assert counts[1] <= counts[0]


@every_row
def test_the_order_of_donors_does_not_matter(row):
  if not row.commutes:
    return
  m, one, evidence, changed = of(row)
  turned = {"donors": collect.needs.Aligned(evidence["donors"].sources[::-1])}
  for name, need in one.needs.items():
    if getattr(need, "of", "model") == "donors":
      value = evidence[name]
      turned[name] = value[::-1] if isinstance(value, tuple) else {a: value[a][::-1] for a in value}
  out = one.apply(m, {**evidence, **turned}, KEY)
  for address in m.addresses():
    np.testing.assert_allclose(
      out.leaf(address), changed.leaf(address), rtol=1e-5, atol=1e-6, err_msg=address
    )


def test_a_wrong_argument_is_named():
  with pytest.raises(ValueError, match="merge.ties has no argument 'dens'; it takes models"):
    registry.parse("merge.ties(dens=0.5)")
