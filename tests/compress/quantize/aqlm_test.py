# SPDX-License-Identifier: Apache-2.0
"""AQLM: each of its parts against brute force or numpy, and its error from round to round."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import additive, aqlm
from treesurgeon.core import leaves, model
from treesurgeon.stats import folds

KEY = jax.random.key(0)
ROWS, COLS, LENGTH, K = 12, 10, 4, 5
search = functools.partial(jax.jit, static_argnames="beam")(additive.search)


def problem(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(80, ROWS)) @ rng.normal(size=(ROWS, ROWS)) * np.exp(rng.normal(size=ROWS))
  w = rng.normal(size=(ROWS, COLS))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / 80, jnp.float32)


def state(w, tables=2, k=K):
  return additive.start(w, key=KEY, length=LENGTH, k=k, tables=tables, iterations=10)


def dense(s):
  """Adds the entries up by definition."""
  codes, tables = np.asarray(s.codes), np.asarray(s.tables, np.float64)
  out = np.zeros((ROWS, COLS))
  for m, r, c in np.ndindex(codes.shape):
    out[r * LENGTH : (r + 1) * LENGTH, c] += tables[m, codes[m, r, c]]
  return out * np.asarray(s.scales, np.float64)


def error(w, h, q):
  wrong = np.asarray(w, np.float64) - q
  return np.einsum("ic,ij,jc->", wrong, np.asarray(h, np.float64), wrong)


def test_value_and_error_by_definition():
  w, h = problem()
  s = state(w)
  np.testing.assert_allclose(additive.value(s), dense(s), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(additive.error(w, h, s), error(w, h, dense(s)), rtol=1e-4)


def test_tables_become_the_least_squares_solution(monkeypatch):
  monkeypatch.setattr(additive, "STEPS", 200)
  w, h = problem()
  s = state(w, tables=1)
  # Columns of the design: what the output is if one number of the table is 1.
  units = np.eye(K * LENGTH).reshape(K * LENGTH, 1, K, LENGTH)
  images = np.stack([dense(s._replace(tables=u)).ravel() for u in units], axis=1)
  root = np.kron(
    np.linalg.cholesky(np.asarray(h, np.float64) + 1e-9 * np.eye(ROWS)).T, np.eye(COLS)
  )
  best, *_ = np.linalg.lstsq(root @ images, root @ np.asarray(w, np.float64).ravel(), rcond=None)
  want = error(w, h, (images @ best).reshape(ROWS, COLS))
  fitted = jax.jit(additive.fit_tables)(w, h, s)
  np.testing.assert_allclose(error(w, h, dense(fitted)), want, rtol=1e-3)
  assert want < 0.9 * error(w, h, dense(s))


def test_scales_become_the_best():
  w, h = problem()
  s = state(w)
  fitted = additive.fit_scales(w, h, s)
  q = dense(s._replace(scales=np.ones((1, COLS))))
  for c in range(COLS):
    want = q[:, c] @ h @ w[:, c] / (q[:, c] @ h @ q[:, c])
    np.testing.assert_allclose(fitted.scales[0, c], want, rtol=1e-4)


def test_a_wide_beam_finds_the_best_pair():
  """One vector an output, two tables: the search sees all pairs."""
  w, h = problem()
  w, h = w[:LENGTH], h[:LENGTH, :LENGTH]
  s = state(w)
  found = search(w, h, s, beam=K)
  for c in range(COLS):
    costs = {}
    for i, j in itertools.product(range(K), repeat=2):
      wrong = np.asarray(w[:, c] - s.scales[0, c] * (s.tables[0, i] + s.tables[1, j]), np.float64)
      costs[i, j] = wrong @ np.asarray(h, np.float64) @ wrong
    np.testing.assert_allclose(
      costs[tuple(found.codes[:, 0, c].tolist())], min(costs.values()), rtol=1e-4
    )


def test_no_part_raises_the_error_and_a_beam_helps(monkeypatch):
  monkeypatch.setattr(additive, "CHUNK", 3 * 4 * K)  # several parts, the last not full
  w, h = problem(1)
  start = state(w)
  ends = {}
  for beam in (1, 4):
    s, errors = start, [error(w, h, dense(start))]
    for _ in range(3):
      for part in (
        jax.jit(additive.fit_tables),
        additive.fit_scales,
        functools.partial(search, beam=beam),
      ):
        s = part(w, h, s)
        errors.append(error(w, h, dense(s)))
    assert (np.diff(errors) <= 1e-4 * errors[0]).all(), errors
    ends[beam] = errors[-1]
  assert ends[4] < ends[1] < 0.8 * errors[0]


def test_kernel_step_stops_at_its_result_and_keeps_it():
  w, h = problem()
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": w[None, :-2]}}}}})
  address = "layers/0/mlp/up/kernel"
  evidence = {"hessian": {address: folds.SecondMoment(h[:-2, :-2], jnp.asarray(80.0))}}
  (one,) = aqlm.aqlm(length=LENGTH, entries=K, tables=2, epochs=0)
  leaf = one.apply(m, evidence, KEY).leaf(address)
  assert isinstance(leaf, leaves.Sum) and leaf.shape == (ROWS - 2, COLS)
  begun = additive.value(state(jnp.pad(w[:-2], [(0, 2), (0, 0)])))[:-2]
  assert error(w[:-2], h[:-2, :-2], leaf.dense()) < 0.8 * error(w[:-2], h[:-2, :-2], begun)
  again = one.apply(m.update({address: leaf}), evidence, KEY).leaf(address)
  jax.tree.map(np.testing.assert_array_equal, again, leaf)


def test_a_block_is_tuned_by_its_output():
  rng = np.random.default_rng(0)
  w = {n: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for n in ("up", "down")}
  x = jnp.asarray(rng.normal(size=(6, 5, 8)), jnp.float32)

  def forward(changes, h):
    up, down = (leaves.dense({**w, **changes}[n]) for n in ("up", "down"))
    return jnp.tanh(h @ up) @ down

  moment = folds.SecondMoment(jnp.eye(8), jnp.asarray(1.0))
  how = {"length": 4, "entries": K, "tables": 1, "beam": 1, "tolerance": 0.01, "iterations": 5}
  tune = functools.partial(
    aqlm._block, w, inputs=x, targets=forward({}, x), forward=forward, key=KEY,
    hessian={"up": moment, "down": moment}, rate=1e-2, batch=4, **how,
  )  # fmt: skip
  before, after = (jax.jit(lambda e=e: tune(epochs=e))() for e in (0, 30))
  loss = lambda made: float(jnp.square(forward(made, x) - forward({}, x)).mean())
  assert loss(after) < 0.7 * loss(before)
  for n in w:
    np.testing.assert_array_equal(after[n].codes, before[n].codes)
    assert (after[n].codebook != before[n].codebook).any()


def test_arguments_are_checked():
  for how, text in (
    ({"entries": 1}, "entries=1: a table has 2 to 65536 vectors"),
    ({"beam": 0}, "beam=0: valid is 1 or more"),
    ({"epochs": -1}, r"epochs=-1: valid is 0 \(do not tune blocks\) or more"),
    ({"tolerance": 1.0}, "tolerance=1.0: valid is 0 to below 1"),
  ):
    with pytest.raises(ValueError, match=text):
      aqlm.aqlm(**how)
