# SPDX-License-Identifier: Apache-2.0
"""GQSA: groups chosen and corrected as in float64, its bits, and that tuning beats two bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import gptq, gqsa
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, model
from treesurgeon.stats import folds

KEY = jax.random.key(0)
ROWS, COLS, GROUP = 22, 7, 4  # the last group sticks out
HOW = {"bits": 4, "group": GROUP, "sparsity": 0.5, "damping": 0.01}


def problem(seed=0, rank=None):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(90, rank or ROWS)) @ rng.normal(size=(rank or ROWS, ROWS))
  w = rng.normal(size=(ROWS, COLS)) * np.exp(rng.normal(size=(ROWS, COLS)))
  return w.astype(np.float32), (x.T @ x / 90 + 0.05 * np.eye(ROWS)).astype(np.float32)


def by_definition(w, h):
  w, h = w.astype(np.float64), h.astype(np.float64)
  h = h + 0.01 * np.diag(h).mean() * np.eye(ROWS)
  saliency = w**2 / np.diag(np.linalg.inv(h))[:, None]
  sums = np.stack([saliency[i : i + GROUP].sum(0) for i in range(0, ROWS, GROUP)])
  mask = np.argsort(np.argsort(-sums, axis=0), axis=0) < 3
  scales = np.stack([np.abs(w[i : i + GROUP]).max(0) / 7.5 for i in range(0, ROWS, GROUP)])
  left, out = w.copy(), np.zeros_like(w)
  for j in range(ROWS):
    s = scales[j // GROUP]
    out[j] = np.where(mask[j // GROUP], s * np.clip(np.round(left[j] / s), -8, 7), 0)
    inverse = np.linalg.inv(h[j:, j:])
    left[j:] -= np.outer(inverse[0] / inverse[0, 0], left[j] - out[j])
  return mask, out


def test_groups_and_corrections_by_definition():
  w, h = problem()
  found = jax.jit(functools.partial(gqsa.prune, **HOW))(w, h)
  mask, want = by_definition(w, h)
  np.testing.assert_array_equal(found.mask, mask)
  leaf = gqsa._leaf(found, 4, GROUP, jnp.asarray(w))
  assert np.isclose(leaf.dense(), want, atol=1e-4).mean() > 0.97
  np.testing.assert_allclose(gqsa._soft(found, 4, GROUP, jnp.asarray(w)).dense(), leaf.dense())
  assert leaf.kept.shape == (3 * GROUP, COLS)


def test_bits_of_a_wide_kernel():
  def quantize(w):
    h = jnp.zeros((4096, 4096))
    return gqsa._leaf(gqsa.prune(w, h), 4, 16, w)

  leaf = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 4096), "bfloat16"))
  assert leaves.bits_per_weight(leaf) == 0.5 * (4 + 16 / 16) + 1 / 16


def test_kernel_step_keeps_its_result():
  w, h = problem()
  address = "layers/0/mlp/up/kernel"
  m = model.Model(None, {"layers": {"0:1": {"mlp": {"up": {"kernel": jnp.asarray(w)[None]}}}}})
  evidence = {"hessian": {address: folds.SecondMoment(jnp.asarray(h), jnp.asarray(1.0))}}
  (one,) = gqsa.gqsa(group=GROUP, epochs=0)
  leaf = one.apply(m, evidence, KEY).leaf(address)
  again = one.apply(m.update({address: leaf}), evidence, KEY).leaf(address)
  jax.tree.map(np.testing.assert_array_equal, again, leaf)


def test_tuned_half_of_four_bits_beats_two_bits():
  """The paper's claim, where inputs are redundant and groups can stand in for each other."""
  rng = np.random.default_rng(0)
  w = {n: jnp.asarray(rng.normal(size=(32, 32)) / 6, jnp.float32) for n in ("up", "down")}
  x = rng.normal(size=(8, 24, 6)) @ rng.normal(size=(6, 32)) + 0.05 * rng.normal(size=(8, 24, 32))
  x = jnp.asarray(x / 3, jnp.float32)

  def forward(changes, h):
    up, down = (leaves.dense({**w, **changes}[n]) for n in ("up", "down"))
    return jnp.tanh(h @ up) @ down

  def moment(h):
    flat = np.asarray(h).reshape(-1, 32)
    return folds.SecondMoment(jnp.asarray(flat.T @ flat), jnp.asarray(1.0))

  states = {"up": moment(x), "down": moment(jnp.tanh(x @ w["up"]))}
  run = functools.partial(
    gqsa._block, inputs=x, targets=forward({}, x), forward=forward, hessian=states,
    rate=0.05, scale_rate=5e-3, batch=4, **HOW,
  )  # fmt: skip
  start, tuned = (jax.jit(functools.partial(run, epochs=e))(w) for e in (0, 60))
  two = {}
  for n, x_ in w.items():
    form = {"bits": 2, "group_size": GROUP}
    codes, grid, _ = gptq.quantize(x_, states[n].moment, **form)
    two[n] = grids.tensor(codes, grid, **form, store="float32")
  loss = lambda made: float(jnp.square(forward(made, x) - forward({}, x)).mean())
  errors = {"tuned": loss(tuned), "start": loss(start), "two": loss(two)}
  assert errors["tuned"] < 0.7 * errors["start"], errors
  assert errors["tuned"] < errors["two"], errors


def test_arguments_are_checked():
  for how, text in (
    ({"sparsity": 1.0}, "sparsity=1.0: valid is 0 to below 1"),
    ({"group": -1}, "group=-1: groups have 1 row or more"),
    ({"batch": 0}, "epochs=5, batch=0: valid are 0 or more, and 1 or more"),
  ):
    with pytest.raises(ValueError, match=text):
      gqsa.gqsa(**how)
