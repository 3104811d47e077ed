# SPDX-License-Identifier: Apache-2.0
"""OPCM against a float64 transcription of the official code, its identities, and its memory."""

import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model, needs, step
from treesurgeon.merge import opcm
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
run = jax.jit(opcm.fold_in, static_argnames="matrix")
SHAPES = {"a/kernel": (12, 20), "b/kernel": (16, 9), "a/bias": (20,), "embed/embedding": (11, 7)}


def draw(count, shapes=SHAPES):
  base = {n: RNG.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
  near = [
    {n: (w + 0.05 * RNG.standard_normal(w.shape)).astype(np.float32) for n, w in base.items()}
    for _ in range(count)
  ]
  return part(base), [part(d) for d in near]


def part(tree):
  return model.Part(None, {n: jnp.asarray(x) for n, x in tree.items()})


def merge(base, donors, **more):
  (one,) = opcm.opcm(**more)
  return one.apply(base, {"donors": needs.Aligned(donors, lazy=True)}, KEY)


def wide(m):
  return {n: np.asarray(m.leaf(n), np.float64) for n in m.addresses()}


def cleaned(delta, total, alpha):
  u, s, vt = np.linalg.svd(total, full_matrices=True)
  split = int((np.cumsum(s) / s.sum() > alpha).argmax())
  inner = u.T @ delta @ vt.T
  np.fill_diagonal(inner, 0)
  inner[:split, :split] = 0
  return u @ inner @ vt, u[:, :split], vt[:split].T


def oracle(base, donors, alpha=0.5):
  """The official loop, its scaling back and forth included, on whole models."""
  base, donors = wide(base), [wide(d) for d in donors]
  norm = lambda tree: np.sqrt(sum(np.square(x).sum() for x in tree.values()))
  deltas = [{n: d[n] - base[n] for n in base} for d in donors]
  merged, last, norms = deltas[0], 1.0, [norm(deltas[0])]
  for delta in deltas[1:]:
    norms.append(norm(delta))
    new = {}
    for n, x in merged.items():
      linear = n.endswith("kernel")
      new[n] = last * x + (cleaned(delta[n], x, alpha)[0] if linear else delta[n])
    last = norm(new) / np.mean(norms)
    merged = {n: x / last for n, x in new.items()}
  return {n: base[n] + x for n, x in merged.items()}, np.mean(norms)


def test_equals_the_official_loop():
  base, donors = draw(4)
  got = wide(merge(base, donors, alpha=0.4))
  wanted, mean = oracle(base, donors, 0.4)
  for name in wanted:
    np.testing.assert_allclose(got[name], wanted[name], atol=2e-6, rtol=0, err_msg=name)
  size = np.sqrt(sum(np.square(got[n] - x).sum() for n, x in wide(base).items()))
  np.testing.assert_allclose(size, mean, rtol=1e-5)


def test_tensor_granularity_scales_each_leaf():
  base, donors = draw(3)
  got = merge(base, donors, granularity="tensor")
  for name in base.addresses():
    one, others = part({name: base.leaf(name)}), [part({name: d.leaf(name)}) for d in donors]
    wanted, _ = oracle(one, others)
    np.testing.assert_allclose(got.leaf(name), wanted[name], atol=2e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_what_is_added_is_orthogonal(alpha):
  total, delta = (RNG.standard_normal((14, 10)).astype(np.float32) for _ in range(2))
  new = np.asarray(run(total, delta, alpha=alpha), np.float64) - total
  assert abs((new * total).sum()) < 1e-5 * np.linalg.norm(new) * np.linalg.norm(total)
  u, s, vt = np.linalg.svd(total)
  r = int((np.cumsum(s) / s.sum() <= alpha - 1e-6).sum())
  block = u[:, :r].T @ new @ vt[:r].T
  assert np.abs(block).max(initial=0) < 2e-5
  if alpha < 1:
    np.testing.assert_allclose(new, cleaned(delta, total, alpha)[0], atol=2e-5, rtol=0)


def test_one_donor_is_returned():
  base, donors = draw(1)
  got = merge(base, donors)
  for name in base.addresses():
    np.testing.assert_allclose(got.leaf(name), donors[0].leaf(name), atol=1e-6, rtol=0)


def test_a_leaf_that_was_not_changed_takes_the_next_donors_change_whole():
  base, donors = draw(2)
  idle = donors[0].update({"a/kernel": base.leaf("a/kernel")})
  got = merge(base, [idle, donors[1]], granularity="tensor")
  moved, whole = (np.asarray(x.leaf("a/kernel") - base.leaf("a/kernel")) for x in (got, donors[1]))
  np.testing.assert_allclose(moved, 0.5 * whole, atol=1e-6, rtol=0)  # the mean of 0 and its norm
  same = merge(base, [base, base])
  for name in base.addresses():
    np.testing.assert_array_equal(same.leaf(name), base.leaf(name))


def test_the_order_of_donors_matters_little():
  # Donors of low rank, as task vectors are: what different orders disagree in is small beside the
  # merged change.
  shape = (24, 24)
  zero = part({"a/kernel": np.zeros(shape, np.float32)})
  donors = []
  for _ in range(3):
    low = RNG.standard_normal((24, 2)) @ RNG.standard_normal((2, 24))
    donors.append(part({"a/kernel": low.astype(np.float32)}))
  found = [merge(zero, order).leaf("a/kernel") for order in itertools.permutations(donors)]
  mean = sum(found) / len(found)
  spread = max(float(jnp.linalg.norm(x - mean) / jnp.linalg.norm(mean)) for x in found)
  assert spread < 0.1


class Drawn:
  """A donor whose leaves are drawn when they are read, and which watches the memory then."""

  def __init__(self, seed, seen):
    self.seed, self.seen, self.spec = seed, seen, None

  def addresses(self):
    return ["a/kernel", "b/kernel"]

  def struct(self, address):
    return jax.ShapeDtypeStruct((128, 96), jnp.float32)

  def leaf(self, address):
    self.seen.append(live())
    rng = np.random.default_rng([self.seed, len(address), ord(address[0])])
    return jnp.asarray(rng.standard_normal((128, 96), np.float32))


def live():
  return sum(x.nbytes for x in jax.live_arrays())


def peak(transform, count):
  """Returns the most bytes that arrays held whenever a donor's leaf was read, beyond the base."""
  seen = []
  base = part({n: np.zeros((128, 96), np.float32) for n in ("a/kernel", "b/kernel")})
  (one,) = transform
  donors = [Drawn(i, seen) for i in range(count)]
  before = live()
  one.apply(base, {"donors": needs.Aligned(donors, lazy=one.needs["donors"].lazy)}, KEY)
  return max(seen) - before


def test_memory_does_not_grow_with_donors():
  leaf = 128 * 96 * 4
  transform = opcm.opcm()
  few, many = peak(transform, 3), peak(transform, 12)
  assert many - few < 0.1 * leaf  # a few scalars a donor
  assert many < 4.1 * leaf
  # The measure sees what grows: who reads all donors at once holds them all.
  grows = registry.parse("merge.task_arithmetic()")
  assert peak(grows, 12) - peak(grows, 3) > 8.9 * leaf


def test_a_stream_reads_one_donor_at_a_time():
  found = []
  for count in (2, 8):
    seen, sink = [], {}
    base = part({n: np.zeros((128, 96), np.float32) for n in ("a/kernel", "b/kernel")})

    class Sink:
      done = staticmethod(sink.__contains__)
      write = staticmethod(sink.__setitem__)

    materials = collect.Materials(donors=[Drawn(i, seen) for i in range(count)])
    before = live()
    drivers.stream(opcm.opcm(granularity="tensor"), base, Sink(), materials)
    found.append(max(seen) - before)
  assert found[1] - found[0] < 0.1 * 128 * 96 * 4


def test_host_memory_does_not_grow_with_donors():
  base = part({"a/kernel": np.zeros((128, 96), np.float32)})
  (one,) = opcm.opcm(granularity="tensor")

  class Host(Drawn):
    def leaf(self, address):
      return np.full((128, 96), self.seed, np.float32)

  def peak(count):
    donors = [Host(i, []) for i in range(count)]
    tracemalloc.start()
    one.apply(base, {"donors": needs.Aligned(donors, lazy=True)}, KEY)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found

  peak(3)  # compiles
  # The runtime lets go of a host array some time after its program ended; on a busy machine late.
  few, many = (min(peak(count) for _ in range(5)) for count in (3, 12))
  assert many - few < 3 * 128 * 96 * 4  # of nine donors more


def test_a_transformer_is_merged_by_the_drivers():
  spec = models.Spec(vocab_size=13, d_model=8, num_layers=2, num_heads=2, d_ff=16)
  shapes = jax.eval_shape(lambda: models.init(spec, KEY))
  drawn = lambda x: jnp.asarray(0.1 * RNG.standard_normal(x.shape), jnp.float32)
  m, *donors = (model.Model(spec, jax.tree.map(drawn, shapes)) for _ in range(3))
  out = drivers.run(opcm.opcm(), m, collect.Materials(donors=donors))
  got, wanted = wide(out), oracle(m, donors)[0]
  for name in wanted:
    np.testing.assert_allclose(got[name], wanted[name], atol=1e-5, rtol=0, err_msg=name)


def test_bfloat16_is_merged_in_float32():
  base, donors = draw(2, {"a/kernel": (6, 8)})
  cast = [part({"a/kernel": x.leaf("a/kernel").astype(jnp.bfloat16)}) for x in (base, *donors)]
  got = merge(cast[0], cast[1:]).leaf("a/kernel")
  assert got.dtype == jnp.bfloat16
  full = [part({"a/kernel": x.leaf("a/kernel").astype(jnp.float32)}) for x in cast]
  wanted = merge(full[0], full[1:]).leaf("a/kernel").astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, wanted)


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="granularity='layer'; valid: global, tensor"):
    registry.parse("merge.opcm(granularity='layer')")
  with pytest.raises(ValueError, match="alpha=2.0 must lie between 0 and 1"):
    registry.parse("merge.opcm(alpha=2.0)")
  base, donors = draw(1, {"a/kernel": (6, 8)})
  other = part({"a/kernel": np.zeros((6, 9), np.float32)})
  with pytest.raises(ValueError, match=r"a/kernel: donor 1 has shape \(6, 9\), the base has"):
    merge(base, [donors[0], other])
  with pytest.raises(ValueError, match="at least one model among the donors"):
    merge(base, [])


def test_it_can_be_aimed():
  (one,) = step.by_path([("a/.*", opcm.opcm())])
  assert one.scope == "model"
  assert one.units(["a/kernel", "b/kernel", "a/bias"]) == [("a/kernel", "a/bias")]
  (one,) = step.by_path([("a/.*", opcm.opcm(granularity="tensor"))])
  assert one.units(["a/kernel", "b/kernel", "a/bias"]) == [("a/kernel",), ("a/bias",)]
