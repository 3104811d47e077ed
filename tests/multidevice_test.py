# SPDX-License-Identifier: Apache-2.0
"""Sharded equals unsharded: every transform on a mesh of eight virtual devices.

The number of devices is fixed when JAX starts, so a process of its own runs all the cases (this
file as a script) and the tests read its report.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import traceback

import pytest

HERE = pathlib.Path(__file__)
KINDS = ("auto", "explicit")


def load_table():
  """Imports the contract suite's table."""
  spec = importlib.util.spec_from_file_location(
    "contract_table", HERE.with_name("contract_table.py")
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module", params=["full", pytest.param("all", marks=pytest.mark.slow)])
def report(request, tmp_path_factory, eight_devices):
  """Runs the cases in a process with eight devices; returns case to what went wrong."""
  out = tmp_path_factory.mktemp("multidevice") / "report.json"
  done = subprocess.run(
    [sys.executable, "-P", "-W", "error", str(HERE), str(out), request.param],
    env=eight_devices,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return request.param, json.loads(out.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_unsharded(report, kind):
  which, report = report
  wrong = {case: text for case, text in report.items() if case.endswith(kind) and text}
  assert not wrong, "\n\n".join(f"{case}:\n{text}" for case, text in wrong.items())
  assert len([c for c in report if c.endswith(kind)]) == len(cases(load_table(), which))


def cases(table, which):
  """Lists the rows that `make test` runs, or all."""
  rows = [*table.ROWS, *table.EXTRA]
  law = "test_compilations_do_not_grow_with_depth"
  return rows if which == "all" else [r for r in rows if not table.slow(r, law)]


def main(out, which):
  """Runs rows on both kinds of mesh and writes the report."""
  import jax

  jax.config.update("jax_numpy_rank_promotion", "raise")
  assert len(jax.devices()) == 8
  table = load_table()
  found = {}
  for i, row in enumerate(cases(table, which)):
    for kind in KINDS:
      try:
        check(table, row, kind)
        found[f"{row.name}-{i}-{kind}"] = ""
      except Exception:
        found[f"{row.name}-{i}-{kind}"] = traceback.format_exc()[-1500:]
    if i % 20 == 19:
      jax.clear_caches()  # programs map memory, of which a process has so many pieces
  pathlib.Path(out).write_text(json.dumps(found))


def check(table, row, kind):
  """Applies one row to a sharded model and compares with the model on one device."""
  import jax
  import numpy as np

  from treesurgeon.core import leaves, paths
  from treesurgeon.run import collect

  axis_type = getattr(jax.sharding.AxisType, kind.capitalize())
  mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)

  def place(path, x):
    # Trailing axes go over the mesh where they divide; the layer axis never does.
    spec = ((None,) * x.ndim + ("fsdp", "tensor"))[-x.ndim :]
    spec = [n if n and s % mesh.shape[n] == 0 else None for n, s in zip(spec, x.shape, strict=True)]
    if path[0].key == "layers":
      spec[0] = None
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

  def spread(m):
    return m.replace(params=jax.tree.map_with_path(place, m.params))

  def everywhere(x):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P())) if isinstance(x, jax.Array) else x

  key = jax.random.key(7)
  m = row.prepare(table.tiny())
  (one,) = row.build()
  evidence = dict(collect.evidence(one, m, row.materials(m)))
  alone = one.apply(m, evidence, key)
  for name, value in evidence.items():
    if isinstance(value, collect.needs.Aligned):
      evidence[name] = collect.needs.Aligned([spread(d) for d in value.sources])
    else:
      evidence[name] = jax.tree.map(everywhere, value)
  placed = spread(m)
  together = one.apply(placed, evidence, key)
  assert together.addresses() == alone.addresses()
  for address in alone.addresses():
    a, b = alone.leaf(address), together.leaf(address)
    assert jax.tree.structure(a) == jax.tree.structure(b), address
    x, y = (np.asarray(leaves.dense(jax.device_get(v))) for v in (a, b))
    if row.searches:
      w = np.asarray(leaves.dense(m.leaf(address)))
      far, near = (float(np.square(v - w).sum()) for v in (y, x))
      assert far == pytest.approx(near, rel=0.02), address
    elif row.reduces:
      close = row.within * float(np.abs(x).max())
      np.testing.assert_allclose(y, x, rtol=0, atol=close, err_msg=address)
    else:
      np.testing.assert_array_equal(y, x, err_msg=address)
  for name, leaf in paths.walk(together.params).items():
    if not leaves.is_leaf(leaf):
      old = paths.walk(placed.params).get(name)
      if old is not None:
        old = jax.tree.leaves(old)[0]  # of a sum of leaves, the base
        tell = f"{name} {leaf.shape}: {leaf.sharding} where the input had {old.sharding}"
        assert leaf.sharding.is_equivalent_to(fitting(old.sharding, leaf), leaf.ndim), tell


def fitting(sharding, leaf):
  """Return a sharding without the axes that do not divide the (smaller) leaf."""
  import jax

  spec, sizes = [], sharding.mesh.shape
  for name, size in zip(sharding.spec, leaf.shape, strict=False):
    spec.append(name if name and size % sizes[name] == 0 else None)
  return jax.NamedSharding(sharding.mesh, jax.P(*spec))


if __name__ == "__main__":
  main(*sys.argv[1:])
