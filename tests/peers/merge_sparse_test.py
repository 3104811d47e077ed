# SPDX-License-Identifier: Apache-2.0
"""Merges of sparsified task vectors equal mergekit's, tensor by tensor in float32.

Breadcrumbs and scaled TIES to the bit; DARE and DELLA given the masks that mergekit drew, to
rounding, for their rescaling sums a tensor in another order. mergekit leaves the order of equal
magnitudes to its sort, so entries exactly at a cut are left out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods import api

from treesurgeon.merge import breadcrumbs, dare, della, ties

SHAPES = [(211, 317), (129,)]
WEIGHTS = (1.0, -0.5, 2.0)


def draw(shape):
  rng = np.random.default_rng(0)
  base = rng.standard_normal(shape).astype(np.float32)
  return base, [(base + 0.02 * rng.standard_normal(shape)).astype(np.float32) for _ in WEIGHTS]


def theirs(method, base, donors, **parameters):
  tensors = [torch.from_numpy(x) for x in (base, *donors)]
  given = {"weight": list(WEIGHTS), **parameters}
  return api.merge_tensors(tensors, method, parameters=given, base_index=0).numpy()


def ours(fn, base, donors, *more, weights=WEIGHTS, lam=1.0, **hyper):
  """Runs a method as a step does: compiled, with its numbers as data."""
  call = jax.jit(functools.partial(fn, **hyper))
  knobs = {"weights": tuple(map(np.float32, weights)), "lam": np.float32(lam)}
  return np.asarray(call(jnp.asarray(base), tuple(map(jnp.asarray, donors)), *more, **knobs))


def at_cuts(base, donors, ranks):
  """Marks entries whose change in some donor ties with another at one of the cuts."""
  found = np.zeros(base.shape, bool)
  for donor in donors:
    size = np.abs(donor - base)
    sorted_ = np.sort(size.ravel())
    for i in ranks:
      equal = size == sorted_[min(max(i, 0), size.size - 1)]
      found |= equal if equal.sum() > 1 else False
  return found


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.01), (0.95, 0.1), (0.0, 0.01), (1.0, 0.01)])
@pytest.mark.parametrize("shape", SHAPES)
def test_breadcrumbs_is_theirs_to_the_bit(shape, density, gamma, normalize, elect):
  base, donors = draw(shape)
  name = "breadcrumbs_ties" if elect else "breadcrumbs"
  more = {"lambda": 0.4, "normalize": normalize}
  wanted = theirs(name, base, donors, density=density, gamma=gamma, **more)
  got = ours(
    breadcrumbs.keep_middle_and_merge, base, donors,
    density=density, gamma=gamma, elect=elect, normalize=normalize, lam=0.4,
  )  # fmt: skip
  keep, top = int(density * base.size), int(gamma * base.size)
  bottom = max(0, base.size - keep - top)
  ranks = (bottom - 1, bottom, bottom + keep - 1, bottom + keep)
  skip = at_cuts(base, donors, ranks if density < 1 else ())
  assert skip.mean() < 0.001
  np.testing.assert_array_equal(np.where(skip, 0, got), np.where(skip, 0, wanted))


@pytest.mark.parametrize("normalize", [False, True])
def test_scaled_ties_is_theirs_to_the_bit(normalize):
  base, donors = draw(SHAPES[0])
  wanted = theirs("ties", base, donors, density=0.3, **{"lambda": 0.4, "normalize": normalize})
  got = ours(ties.trim_elect_merge, base, donors, density=0.3, normalize=normalize, lam=0.4)
  cut = base.size - int(0.3 * base.size)
  skip = at_cuts(base, donors, (cut - 1, cut))
  np.testing.assert_array_equal(np.where(skip, 0, got), np.where(skip, 0, wanted))


@pytest.fixture
def masks(monkeypatch):
  """Collects the masks that mergekit draws."""
  seen = []
  bernoulli = torch.bernoulli

  def listen(p):
    mask = bernoulli(p)
    seen.append((p.numpy(), mask.numpy().astype(bool)))
    return mask

  monkeypatch.setattr(torch, "bernoulli", listen)
  torch.manual_seed(0)
  return seen


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_ones_are_theirs_given_their_masks(method, rescale, shape, masks):
  base, donors = draw(shape)
  wanted = theirs(method, base, donors, density=0.3, rescale=rescale, **{"lambda": 0.7})
  drawn = tuple(jnp.asarray(m).reshape(shape) for _, m in masks)
  assert len(drawn) == len(donors)
  hyper = {"elect": method in ("dare_ties", "della"), "normalize": method == "della"}
  fn = dare.drop_and_merge if "dare" in method else della.sample_and_merge
  how = "l1" if rescale else "none"
  got = ours(fn, base, donors, drawn, density=0.3, rescale=how, lam=0.7, **hyper)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)
  if not rescale:
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_della_gives_their_probabilities(shape, masks):
  base, (donor, *_) = draw(shape)
  delta = donor - base
  sparsify.della_magprune(torch.from_numpy(delta), 0.4, 0.15)
  got = della.probabilities(jnp.asarray(delta), density=0.4, epsilon=0.15)
  wanted = masks[0][0].reshape(shape)
  # Equal magnitudes in a row swap neighbouring ranks.
  step = 2 * 0.15 / (shape[-1] - 1)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1.5 * step)
  assert np.mean(np.abs(np.asarray(got) - wanted) < 1e-6) > 0.999


@pytest.mark.parametrize("rescale", ["l1", "none"])
def test_keep_rates_and_scales_are_theirs_in_distribution(rescale):
  """Over one large tensor: how much is kept, and the sum of magnitudes after rescaling."""
  base, (donor, *_) = draw((400, 500))
  delta = torch.from_numpy(donor - base)
  norm = sparsify.RescaleNorm.l1 if rescale == "l1" else None
  torch.manual_seed(1)
  pairs = {
    "dare": (
      sparsify.bernoulli(delta, 0.3, norm),
      dare.drop_and_merge(
        jnp.zeros(delta.shape), (jnp.asarray(delta.numpy()),), None, jax.random.key(1),
        density=0.3, rescale=rescale,
      ),
    ),
    "della": (
      sparsify.della_magprune(delta, 0.3, 0.15, norm),
      della.sample_and_merge(
        jnp.zeros(delta.shape), (jnp.asarray(delta.numpy()),), None, jax.random.key(1),
        density=0.3, epsilon=0.15, rescale=rescale, normalize=False, elect=False,
      ),
    ),
  }  # fmt: skip
  for name, (their, our) in pairs.items():
    their, our = their.numpy(), np.asarray(our)
    sigma = np.sqrt(0.3 * 0.7 / delta.numel())
    assert abs((our != 0).mean() - (their != 0).mean()) < 6 * sigma, name
    assert abs((our != 0).mean() - 0.3) < 5 * sigma, name
    np.testing.assert_allclose(np.abs(our).sum(), np.abs(their).sum(), rtol=0.01, err_msg=name)
    if rescale == "l1":
      np.testing.assert_allclose(np.abs(our).sum(), np.abs(delta.numpy()).sum(), rtol=1e-5)
