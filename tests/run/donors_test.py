# SPDX-License-Identifier: Apache-2.0
"""Statistics of donors: each on its own data, under every driver."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import lifting, model, needs, paths, step
from treesurgeon.run import collect, donors, drivers, dry, gradients

SPEC = models.Spec(vocab_size=19, d_model=8, num_layers=2, num_heads=2, d_ff=12, max_positions=16)
TEXT = [np.random.default_rng(i).integers(0, 19, (2, 6)) for i in range(2)]
OWN = [[np.random.default_rng(10 + i).integers(0, 19, (n, 6))] for i, n in enumerate((3, 2))]
KEY = jax.random.key(0)
UP = "layers/1/mlp/up/kernel"


def make(seed=0):
  return model.Model(SPEC, models.init(SPEC, jax.random.key(seed)))


DONORS = [make(1), make(2)]


def needing(**wants):
  wants = {"donors": needs.Donors(), **wants}
  return step.Step(wants, lambda m, e, k: m, "model", {"name": "demo", "given": {}}, lambda n: [n])


def weigh(w, donors, sizes):
  return sum(d * (s.value / s.count).sum() for d, s in zip(donors, sizes, strict=True)) + 0 * w


@step.method("test.weigh")
def weighed(*, select: str | None = None) -> step.Step:
  """Weigh donors by the sizes of their inputs."""
  wants = {"donors": needs.Donors(), "sizes": needs.Statistic("sum_squares", of="donors")}
  return lifting.over_leaves(weigh, hyper={}, select=select, wants=wants, scope="block")


class Lazy:
  """A donor read leaf by leaf."""

  spec = SPEC

  def __init__(self, m):
    self.m = m

  def addresses(self):
    return self.m.addresses()

  def leaf(self, address):
    return self.m.leaf(address)

  def struct(self, address):
    return self.m.struct(address)


@pytest.mark.parametrize("wrap", [lambda m: m, Lazy], ids=["memory", "lazy"])
@pytest.mark.parametrize("own", [OWN, ()], ids=["own", "shared"])
def test_each_donor_is_measured_on_its_batches(own, wrap):
  one = needing(
    h=needs.Statistic("second_moment", UP, of="donors"),
    f=needs.Statistic("fisher", UP, of="donors"),
    mine=needs.Statistic("second_moment", UP),
  )
  given = collect.Materials(batches=TEXT, donors=[wrap(d) for d in DONORS], donor_batches=own)
  found = collect.evidence(one, make(), given)
  for i, donor in enumerate(DONORS):
    batches = own[i] if own else TEXT
    alone = collect.evidence(
      needing(h=needs.Statistic("second_moment", UP)), donor,
      collect.Materials(batches=batches, donors=[donor]),
    )["h"][UP]  # fmt: skip
    np.testing.assert_array_equal(found["h"][UP][i].moment, alone.moment)
    np.testing.assert_array_equal(
      found["f"][UP][i], gradients.fisher(donor, batches, select=UP)[UP]
    )
  assert list(found["h"]) == [UP]
  assert UP in list(found["f"]) and len(found["f"]) == 2  # stacked layers come along
  assert found["mine"][UP].count == 24


def test_batches_of_donors_come_one_a_donor():
  one = needing(b=needs.Batches(of="donors"), all=needs.Batches())
  given = collect.Materials(batches=TEXT, donors=DONORS, donor_batches=OWN)
  found = collect.evidence(one, make(), given)
  assert [len(b[0]) for b in found["b"]] == [3, 2]
  assert found["all"] is TEXT
  shared = collect.evidence(one, make(), dataclasses.replace(given, donor_batches=()))
  assert shared["b"] == (TEXT,)
  assert set(given.inputs) == {"batches", "batches of donor 0", "batches of donor 1"}


@pytest.mark.parametrize("own", [OWN, ()], ids=["own", "shared"])
def test_blockwise_runs_donors_blocks_on_what_the_merged_blocks_gave(own):
  m = make()
  given = collect.Materials(batches=TEXT, donors=DONORS, donor_batches=own)
  done = drivers.run_blockwise(weighed(select="(layers|lm_head)/.*"), m, given)
  flat, data = paths.flatten(m.params), own or (TEXT, TEXT)
  hidden = [[models.embed(SPEC, m.params, b) for b in batches] for batches in data]

  def merge(kernels, seen):
    for address in kernels:
      flat[address] = 0.0
      for d, taps in zip(DONORS, seen, strict=True):
        x = [np.asarray(t[models.tap_of(address)], np.float64).reshape(-1, 8 if "down" not in
             address else 12) for t in taps]  # fmt: skip
        flat[address] += np.asarray(d.leaf(address)) * (np.concatenate(x) ** 2).mean(0).sum()

  for i in range(2):
    names = [a for a in flat if a.startswith(f"layers/{i}/")]
    seen = []
    for d, h in zip(DONORS, hidden, strict=True):
      block = donors.layer(d, i)
      seen.append([models.block(SPEC, block, x, layer=i, observe=lambda n, v: v)[1] for x in h])
    merge([a for a in names if a.endswith("kernel")], seen)
    block = paths.nest({a.split("/", 2)[2]: jnp.asarray(flat[a], jnp.float32) for a in names})
    hidden = [[models.block(SPEC, block, x, layer=i)[0] for x in h] for h in hidden]
  seen = []
  for d, h in zip(DONORS, hidden, strict=True):
    taps = []
    for x in h:
      models.head(SPEC, d.params, x, observe=lambda n, v, to=taps: to.append({n: v}))
    seen.append(taps)
  merge(["lm_head/kernel"], seen)
  for address, want in flat.items():
    np.testing.assert_allclose(done.leaf(address), want, rtol=2e-3, atol=1e-5, err_msg=address)


def test_blockwise_agrees_with_run_on_the_first_block_and_on_fisher():
  given = collect.Materials(batches=TEXT, donors=DONORS, donor_batches=OWN)
  m = make()
  # With the embeddings of all models alike, the first block sees the same either way.
  shared = [d.update({"embed/tokens/embedding": m.leaf("embed/tokens/embedding")}) for d in DONORS]
  given = dataclasses.replace(given, donors=shared)
  a, b = (go(weighed(), m, given) for go in (drivers.run, drivers.run_blockwise))
  first = [n for n in m.addresses() if n.startswith("layers/0/")]
  for name in first:
    np.testing.assert_allclose(a.leaf(name), b.leaf(name), rtol=1e-5, atol=1e-6)
  assert not np.allclose(a.leaf(UP), b.leaf(UP), rtol=1e-4)


def test_a_dry_run_counts_the_donors():
  (one,) = weighed()
  shapes = dry.dry_run((one,), make(), donors=3)
  assert shapes.nbytes() == make().nbytes()


def test_missing_data_is_told():
  one = needing(h=needs.Statistic("absmax", UP, of="donors"))
  for more, message in (
    ({}, "needs calibration text and none was given"),
    ({"donor_batches": [TEXT, []]}, "needs calibration text for donor 1 and none was given"),
    ({"donor_batches": [TEXT]}, "calibration text was given for 1 donors of 2; give one a donor"),
    ({"donor_batches": [TEXT, iter(TEXT)]}, "read more than once; give a list"),
  ):
    with pytest.raises(ValueError, match=message):
      collect.evidence(one, make(), collect.Materials(donors=DONORS, **more))
  bad = [DONORS[0], registry.parse("compress.quantize.rtn()")[0].apply(DONORS[1], {}, KEY)]
  one = needing(f=needs.Statistic("fisher", UP, of="donors"))
  with pytest.raises(ValueError, match="donor 1: layers/1/mlp/up/kernel: a compressed leaf has no"):
    collect.evidence(one, make(), collect.Materials(batches=TEXT, donors=bad))
  both = step.by_path([("layers/0/.*", weighed()), ("layers/1/.*", weighed())])
  drivers.run(both, make(), collect.Materials(batches=TEXT, donors=DONORS))
  with pytest.raises(ValueError, match="needs calibration text and none was given"):
    drivers.run(_learns(), make(), collect.Materials())


def _learns():
  one = step.Step({"b": needs.Batches()}, lambda m, e, k: m, "model", {"name": "demo", "given": {}},
                  lambda n: [tuple(n)])  # fmt: skip
  return (one,)
