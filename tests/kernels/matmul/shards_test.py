# SPDX-License-Identifier: Apache-2.0
"""Products with sharded, stacked and mapped leaves equal those with the whole matrix.

What needs eight devices runs in a process of its own (this file as a script).
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import kernels
from treesurgeon.kernels.matmul import arg_specs

HERE = pathlib.Path(__file__)
KEY = jax.random.key(0)
TARGET = "tpu-v5e"


def close(y, x, leaf):
  expected = np.asarray(x, np.float64) @ np.asarray(leaf.dense(), np.float64)
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=1e-4)


def draw(rows=256, cols=24, bits=4, group_size=64, **more):
  return arg_specs.operands(arg_specs.ArgSpec(3, rows, cols, bits, group_size, **more), KEY)


def stack(count, prepare, **more):
  """Draw several leaves, and stack them prepared or not."""
  spec = arg_specs.ArgSpec(3, 256, 24, 4, 64, **more)
  pairs = [arg_specs.operands(spec, k) for k in jax.random.split(KEY, count)]
  xs, plain = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
  return pairs, xs, kernels.prepare(plain, target=TARGET) if prepare else plain


@pytest.mark.parametrize("prepare", [False, True])
def test_experts_and_layers(prepare):
  pairs, xs, stacked = stack(3, prepare)
  mapped = jax.jit(jax.vmap(kernels.matmul))(xs, stacked)
  layers = lambda xs, w: jax.lax.scan(lambda c, p: (c, kernels.matmul(*p)), None, (xs, w))[1]
  scanned = jax.jit(layers)(xs, stacked)
  for i, pair in enumerate(pairs):
    close(mapped[i], *pair)
    close(scanned[i], *pair)


@pytest.mark.parametrize("prepare", [False, True])
def test_layers_of_experts(prepare):
  pairs, xs, stacked = stack(4, prepare)
  xs, stacked = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), (xs, stacked))
  step = lambda c, pair: (c, jax.vmap(kernels.matmul)(*pair))
  y = jax.jit(lambda xs, w: jax.lax.scan(step, None, (xs, w))[1])(xs, stacked)
  for i, pair in enumerate(pairs):
    close(y[i // 2, i % 2], *pair)


@pytest.mark.parametrize(
  ("bits", "group_size", "rows", "cols", "symmetric"),
  [(3, 64, 2, 3, True), (2, 256, 8, 1, False)],
)
def test_shards_are_the_blocks_of_the_matrix(bits, group_size, rows, cols, symmetric):
  leaf = draw(bits=bits, group_size=group_size, symmetric=symmetric)[1]
  shards = kernels.split(leaf, rows=rows, cols=cols)
  assert shards.shape == (rows * cols, 256 // rows, 24 // cols)
  whole = np.asarray(leaf.dense()).reshape(rows, 256 // rows, cols, 24 // cols)
  np.testing.assert_array_equal(shards.dense(), whole.swapaxes(1, 2).reshape(shards.shape))
  stacked = jax.tree.map(lambda a: jnp.stack([a, a]), leaf)
  again = jax.tree.map(lambda a: a[:, 1], kernels.split(stacked, rows=rows, cols=cols))
  np.testing.assert_array_equal(again.dense(), shards.dense())
  ready = kernels.prepare(shards, target=TARGET)
  np.testing.assert_array_equal(ready.dense(), shards.dense())


def test_columns_with_a_group_index():
  leaf = draw()[1]
  index = jax.random.randint(KEY, (1, 256), 0, 4)
  leaf = dataclasses.replace(leaf, group_index=index)
  shards = kernels.split(leaf, cols=3)
  np.testing.assert_array_equal(jnp.concatenate([*shards.dense()], axis=-1), leaf.dense())
  with pytest.raises(ValueError, match="rows=2, but rows with a group_index are not cut; rows=1"):
    kernels.split(leaf, rows=2)


def test_refusals():
  leaf = draw()[1]
  for rows in (8, 3, 0):
    with pytest.raises(ValueError, match=rf"rows={rows} cuts 256 rows within a group of 64 .* 4$"):
      kernels.split(leaf, rows=rows)
  with pytest.raises(ValueError, match=r"a byte of 3-bit codes; valid are 1, 2, 3, 6$"):
    kernels.split(draw(48, 24, 3, 2)[1], rows=12)
  with pytest.raises(ValueError, match="cols=5 does not divide the 24 columns"):
    kernels.split(leaf, cols=5)
  with pytest.raises(ValueError, match="SparseTensor, not PreparedTensor; split it before"):
    kernels.split(kernels.prepare(leaf, target=TARGET), cols=2)
  with pytest.raises(ValueError, match="in the QuantizedTensor codes have shape"):
    kernels.split(dataclasses.replace(leaf, rows=128), rows=2)
  with pytest.raises(ValueError, match="groups of rows with plain scales"):
    kernels.split(dataclasses.replace(leaf, group_cols=24, scales=leaf.scales[:, :1]), cols=2)


@pytest.fixture(scope="module")
def report(tmp_path_factory, eight_devices):
  """Run the cases in a process with eight devices; return case to what went wrong."""
  out = tmp_path_factory.mktemp("shards") / "report.json"
  done = subprocess.run(
    [sys.executable, "-P", "-W", "error", str(HERE), str(out)],
    env=eight_devices,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(out.read_text())


def spread(kind, across, *, product=kernels.matmul, **more):
  """Multiply with shards on a mesh of rows and columns; compare with the whole matrix."""
  rows, cols = across
  x, leaf = draw(**more)
  x = x.astype(jnp.float32)
  mesh = mesh_of((rows, cols), ("rows", "cols"))
  shards = kernels.split(leaf, rows=rows, cols=cols)
  if kind == "prepared":
    shards = kernels.prepare(shards, target=TARGET)

  def body(x, shards):
    return jax.lax.psum(product(x, jax.tree.map(lambda a: a[0], shards)), "rows")

  both = jax.P(("rows", "cols"))
  specs = {"in_specs": (jax.P(None, "rows"), both), "out_specs": jax.P(None, "cols")}
  shards = jax.device_put(shards, jax.NamedSharding(mesh, both))
  close(jax.jit(jax.shard_map(body, mesh=mesh, **specs))(x, shards), x, leaf)


def mesh_of(shape, names):
  return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def rows_plain():
  spread("plain", (8, 1), rows=512, symmetric=False)


def cols_plain():
  spread("plain", (1, 8), symmetric=False)


def both_plain():
  spread("plain", (2, 4), bits=3)


def one_group():
  spread("plain", (4, 2), bits=8, group_size=256)


def both_grouped():
  spread("plain", (4, 2), product=lambda x, w: kernels.matmul(x, w, implementation="grouped"))


def both_prepared():
  spread("prepared", (4, 2), symmetric=False)


def interpreted(across):
  from jax.experimental.pallas import tpu as pltpu

  product = lambda x, w: kernels.matmul(x, w, implementation="tpu")
  with pltpu.force_tpu_interpret_mode():
    more = {"rows": 256, "cols": 256, "group_size": 128, "dtype": "bfloat16"}
    spread("prepared", across, product=product, **more)


def rows_in_the_tpu_kernel():
  interpreted((2, 1))


def layers_of_experts():
  """Experts on eight devices, each with stacked layers."""
  pairs, xs, stacked = stack(16, prepare=True)
  mesh = mesh_of((8,), ("experts",))

  def body(xs, w):
    return jax.lax.scan(lambda c, pair: (c, kernels.matmul(*pair)), None, (xs, w))[1]

  spec = jax.P("experts")
  sharded = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  y = jax.jit(sharded)(xs, stacked)
  for i, pair in enumerate(pairs):
    close(y[i], *pair)


def placed():
  """Arrays on a mesh, without shard_map."""
  x, leaf = draw(cols=32)
  mesh = mesh_of((2, 4), ("rows", "cols"))
  put = lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P("rows", "cols")))
  close(jax.jit(kernels.matmul)(x, jax.tree.map(put, leaf)), x, leaf)


def slices_of_arrays_are_refused():
  """A leaf's arrays cut by shard_map itself: groups and units of 128 rows may be cut too."""
  x, plain = draw(2048, 128, 4, 128)
  ready = kernels.prepare(plain, target=TARGET)
  mesh = mesh_of((8,), ("x",))
  for leaf, axis in ((plain, -2), (plain, -1), (ready, -2), (ready, -1)):
    spec = jax.tree.map(lambda a, n=axis: jax.P(*[None] * (a.ndim + n), "x"), leaf)
    specs = {"in_specs": (jax.P(), spec), "out_specs": jax.P()}
    sharded = jax.shard_map(kernels.matmul, mesh=mesh, check_vma=False, **specs)
    with pytest.raises(ValueError, match=r"Tensor codes have shape .*need .*kernels\.split"):
      jax.eval_shape(sharded, x, leaf)


def no_code_leaves_its_device():
  leaf = draw()[1]
  mesh = mesh_of((2, 4), ("rows", "cols"))
  put = lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P("rows", "cols")))
  out = jax.NamedSharding(mesh, jax.P(("rows", "cols")))
  cut = jax.jit(lambda w: kernels.split(w, rows=2, cols=4), out_shardings=out)
  text = str(cut.lower(jax.tree.map(put, leaf)).compile().as_text())
  assert "fusion" in text or "copy" in text
  assert "all-" not in text and "collective-permute" not in text


CASES = (
  rows_plain,
  cols_plain,
  both_plain,
  one_group,
  both_grouped,
  both_prepared,
  rows_in_the_tpu_kernel,
  layers_of_experts,
  placed,
  no_code_leaves_its_device,
  slices_of_arrays_are_refused,
)


@pytest.mark.parametrize("case", [c.__name__ for c in CASES])
def test_sharded_equals_whole(report, case):
  assert not report[case], report[case]


def main(out):
  """Run all cases and write the report."""
  jax.config.update("jax_numpy_rank_promotion", "raise")
  assert len(jax.devices()) == 8
  found = {}
  for case in CASES:
    found[case.__name__] = ""
    try:
      case()
    except Exception:
      found[case.__name__] = traceback.format_exc()[-2500:]
  pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
