# SPDX-License-Identifier: Apache-2.0
import contextlib

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import pytest

from treesurgeon import models
from treesurgeon.core import paths
from treesurgeon.evaluate import connectivity
from treesurgeon.merge import permutations, units

SPEC = models.Spec(vocab_size=13, d_model=8, num_layers=1, num_heads=2, d_ff=6)
TEXT = [np.random.default_rng(0).integers(0, 13, (n, 9)) for n in (4, 4)]


def draw(seed):
  rng = np.random.default_rng(seed)
  return {
    a: jnp.asarray(rng.standard_normal(s), jnp.float32) for a, s in models.addresses(SPEC).items()
  }


def scramble(flat):
  rng, index = np.random.default_rng(1), permutations.identity(SPEC)
  for group in permutations.groups(SPEC):
    index = units.compose(index, group, rng.permutation(group.size))
  return units.apply(flat, index)


def test_the_line_against_a_loop():
  a, b = (paths.unflatten(draw(s)) for s in (0, 1))
  found = connectivity.line(SPEC, a, b, TEXT, points=5)
  run = jax.jit(models.nll, static_argnums=0)
  for alpha, loss in zip(np.linspace(0, 1, 5), found.losses, strict=True):
    mixed = jax.tree.map(lambda x, y, t=alpha: (1 - t) * x + t * y, a, b)
    np.testing.assert_allclose(loss, np.mean([run(SPEC, mixed, t) for t in TEXT]), rtol=1e-5)
  ends = found.losses[0] + found.alphas * (found.losses[-1] - found.losses[0])
  assert found.barrier == pytest.approx((found.losses - ends).max())
  gap = [((np.asarray(x) - np.asarray(y)) ** 2).sum() for x, y in
         zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]  # fmt: skip
  assert found.distance == pytest.approx(np.sqrt(sum(gap)), rel=1e-5)


def trained(text):
  """Returns a network that has memorized a text."""
  optimizer = optax.adam(0.02)
  params = jax.tree.map(lambda x: 0.3 * x, paths.unflatten(draw(0)))

  def update(state, _):
    params, moments = state
    slope = jax.grad(models.nll, argnums=1)(SPEC, params, text)
    change, moments = optimizer.update(slope, moments)
    return (optax.apply_updates(params, change), moments), None

  run = jax.jit(lambda start: jax.lax.scan(update, start, None, length=150)[0][0])
  return paths.flatten(run((params, optimizer.init(params))))


def test_a_permuted_twin_has_a_barrier_that_matching_removes():
  a = trained(TEXT[0])
  tree, text = paths.unflatten(a), TEXT[:1]
  apart = connectivity.line(SPEC, tree, paths.unflatten(scramble(a)), text)
  together = connectivity.line(SPEC, tree, tree, text)
  np.testing.assert_allclose(apart.losses[[0, -1]], together.losses[[0, -1]], rtol=1e-4)
  assert apart.barrier > 0.5 > 1e-4 > together.barrier
  assert apart.drop > 0.2 > together.drop == 0
  assert apart.alignment[0.3] < 0.5 < 0.999 < together.alignment[0.3]


@contextlib.contextmanager
def compilations():
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


def test_more_points_compile_nothing():
  a, b = (paths.unflatten(draw(s)) for s in (0, 1))
  connectivity.line(SPEC, a, b, TEXT, points=3)
  with compilations() as seen:
    connectivity.line(SPEC, a, b, TEXT, points=7)
  assert not seen


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_the_alignment_against_the_double_sum(gamma):
  rng = np.random.default_rng(0)
  w, v = rng.standard_normal((2, 6, 4))
  pairs = []
  for x in (w, v):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    keep = s >= gamma * s[0]
    pairs.append((u[:, keep], vt[keep].T))
  (u, r), (t, q) = pairs
  want = sum(
    (u[:, i] @ t[:, j]) * (r[:, i] @ q[:, j]) for i in range(u.shape[1]) for j in range(t.shape[1])
  )
  top, n = connectivity.singular_alignment(jnp.asarray(w), jnp.asarray(v), gamma)
  np.testing.assert_allclose(top, want, atol=1e-5)
  np.testing.assert_allclose(n, np.sqrt(u.shape[1] * t.shape[1]), rtol=1e-6)


def test_singular_vectors_that_do_not_exist_are_left_out():
  low = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
  top, n = connectivity.singular_alignment(low, low)
  assert float(n) == 1.0
  np.testing.assert_allclose(top, 1.0, atol=1e-5)
  assert connectivity.alignment({"b": jnp.ones(3)}, {"b": jnp.ones(3)}) == 0.0


def test_the_barrier_of_a_slope_is_none_and_of_a_valley_is_none():
  def found(losses):
    x = np.linspace(0, 1, len(losses))
    return connectivity.Line(x, np.asarray(losses), 1 - np.asarray(losses) / 10, 0.0, {0.0: 1.0})

  assert found([1.0, 2.0, 3.0]).barrier == pytest.approx(0.0)
  assert found([1.0, 0.0, 1.0]).barrier == pytest.approx(0.0)
  assert found([1.0, 4.0, 3.0]).barrier == pytest.approx(2.0)
  assert found([1.0, 4.0, 3.0]).drop == pytest.approx(0.2)
  lines = {"as trained": found([1.0, 4.0, 3.0]), "matched": found([1.0, 2.0, 3.0])}
  assert [row.split()[-5] for row in connectivity.table(lines).splitlines()[1:]] == [
    "2.0000", "0.0000",
  ]  # fmt: skip
  ax = matplotlib.figure.Figure().add_subplot()
  connectivity.plot(lines, ax, quantity="accuracies")
  assert [t.get_text() for t in ax.get_legend().get_texts()] == list(lines)


def test_mistakes_are_named():
  a = paths.unflatten(draw(0))
  with pytest.raises(ValueError, match="points=2 must be at least 3"):
    connectivity.line(SPEC, a, a, TEXT, points=2)
  with pytest.raises(ValueError, match="needs batches"):
    connectivity.line(SPEC, a, a, [])
