# SPDX-License-Identifier: Apache-2.0
"""RegMean++ against RegMean: equal in one layer, nearer to the donors' outputs in several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models
from treesurgeon.core import model, paths
from treesurgeon.merge import regmean, regmean_pp
from treesurgeon.run import collect, donors, drivers

SPEC = models.Spec(vocab_size=23, d_model=16, num_layers=3, num_heads=2, d_ff=32, max_positions=16)
OWN = [[np.random.default_rng(i).integers(0, 23, (8, 16))] for i in range(2)]


def make(spec, count=2, spread=0.3):
  base = model.Model(spec, models.init(spec, jax.random.key(0)))
  near = []
  for i in range(count):
    rng = np.random.default_rng(i)
    near.append(
      base.replace(
        params=jax.tree.map(
          lambda x, r=rng: x + spread * jnp.std(x) * r.standard_normal(x.shape).astype("float32"),
          base.params,
        )
      )
    )
  return base, near


def test_one_layer_is_regmean_where_the_embeddings_agree():
  base, near = make(dataclasses.replace(SPEC, num_layers=1))
  near = [d.update({a: base.leaf(a) for a in base.addresses() if "embed" in a}) for d in near]
  given = collect.Materials(donors=near, donor_batches=OWN)
  a = drivers.run_blockwise(regmean_pp.regmean_pp(), base, given)
  b = drivers.run(regmean.regmean(), base, given)
  for address in base.addresses():
    np.testing.assert_allclose(a.leaf(address), b.leaf(address), atol=2e-5, err_msg=address)


def test_without_blocks_it_is_regmean():
  base, near = make(SPEC)
  given = collect.Materials(donors=near, donor_batches=OWN)
  a = drivers.run(regmean_pp.regmean_pp(), base, given)
  b = drivers.run(regmean.regmean(), base, given)
  for address in base.addresses():
    np.testing.assert_array_equal(a.leaf(address), b.leaf(address))


def residual(merged, near, address):
  """Squared error of a kernel's outputs to each donor's, on what its merged input block gives."""
  layer = int(address.split("/")[1])
  total = 0.0
  for donor, batches in zip(near, OWN, strict=True):
    h = models.embed(SPEC, merged.params, batches[0])
    for i in range(layer):
      h, _ = models.block(SPEC, donors.layer(merged, i), h, layer=i)
    seen = models.block(SPEC, donors.layer(donor, layer), h, layer=layer, observe=lambda n, v: v)[1]
    x = seen[models.tap_of(address)]
    total += float(jnp.mean((x @ merged.leaf(address) - x @ donor.leaf(address)) ** 2))
  return total


def test_kernels_fit_the_inputs_that_they_will_get_better():
  base, near = make(SPEC)
  given = collect.Materials(donors=near, donor_batches=OWN)
  exact = {"alpha": 1.0, "ridge": 1e-7}
  better = drivers.run_blockwise(regmean_pp.regmean_pp(**exact), base, given)
  plain = drivers.run(regmean.regmean(**exact), base, given)
  for address in [a for a in base.addresses() if a.endswith("kernel") and a.startswith("layers")]:
    # The same inputs for both: what comes before is taken from the RegMean++ merge.
    other = better.update({address: plain.leaf(address)})
    ours, theirs = (residual(m, near, address) for m in (better, other))
    assert ours <= theirs * 1.001 + 1e-9, address


def test_the_auto_driver_walks_through_the_blocks():
  (one,) = regmean_pp.regmean_pp()
  assert one.scope == "block"
  (one,) = regmean.regmean()
  assert one.scope == "leaf"
  assert paths.num_layers(make(SPEC)[0].params) == 3
