# SPDX-License-Identifier: Apache-2.0
"""The drivers on meshes of eight virtual devices, in a process of their own."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax
import numpy as np
from treesurgeon import models, registry
from treesurgeon.core import leaves, model
from treesurgeon.run import collect, drivers, gradients

jax.config.update("jax_numpy_rank_promotion", "raise")
kind = getattr(jax.sharding.AxisType, sys.argv[1])
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
spec = models.Spec(vocab_size=32, d_model=16, num_layers=2, num_heads=4, d_ff=32, max_positions=32)
alone = model.Model(spec, models.init(spec, jax.random.key(0)))

def place(path, x):
  axes = ((None,) * x.ndim + ("fsdp", "tensor"))[-x.ndim :]
  axes = [n if n and s % mesh.shape[n] == 0 else None for n, s in zip(axes, x.shape, strict=True)]
  if path[0].key == "layers":
    axes[0] = None
  return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))

spread = alone.replace(params=jax.tree.map_with_path(place, alone.params))
text = [np.random.default_rng(i).integers(0, 32, (4, 8)) for i in range(2)]
given = collect.Materials(batches=text, donors=[alone])
wanda = registry.parse("compress.prune.wanda() + merge.linear()")
for go in (drivers.run, drivers.run_blockwise):
  a, b = go(wanda, alone, given), go(wanda, spread, given)
  for address in alone.addresses():
    x, y = a.leaf(address), b.leaf(address)
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=address)
  for x, y in zip(jax.tree.leaves(spread.params), jax.tree.leaves(b.params), strict=True):
    assert x.sharding.mesh == y.sharding.mesh == mesh
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
one, many = (gradients.fisher(m, text) for m in (alone, spread))
np.testing.assert_allclose(
  one["layers/1/mlp/up/kernel"], many["layers/1/mlp/up/kernel"], rtol=1e-3, atol=1e-8
)
(rtn,) = registry.parse("compress.quantize.rtn(bits=4, group_size=8)")
apply = lambda p: rtn.apply(spread.replace(params=p), {}, jax.random.key(0)).params
shapes, done = jax.eval_shape(apply, spread.params), jax.jit(apply)(spread.params)
assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(done)]
whole = rtn.apply(alone, {}, jax.random.key(0)).leaf("layers/1/mlp/up/kernel")
split = alone.replace(params=done).leaf("layers/1/mlp/up/kernel")
np.testing.assert_array_equal(whole.codes, split.codes)
"""


@pytest.mark.parametrize("kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"])
def test_drivers_do_on_a_mesh_what_they_do_on_one_device(kind, eight_devices):
  command = [sys.executable, "-P", "-W", "error", "-c", SCRIPT, kind]
  done = subprocess.run(command, env=eight_devices, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
