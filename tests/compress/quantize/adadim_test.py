# SPDX-License-Identifier: Apache-2.0
"""AdaDim: the better of two kinds of groups, by the output error computed in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import adadim
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.core import leaves, model, paths
from treesurgeon.stats import folds

KEY = jax.random.key(0)


def problem(rows=32, cols=24, seed=0, *, spiky=False):
  rng = np.random.default_rng(seed)
  mixed = np.eye(rows) + 0.1 * rng.normal(size=(rows, rows))
  w, x = rng.normal(size=(rows, cols)), rng.normal(size=(200, rows)) @ mixed
  if spiky:  # two inputs with large weights, which spoil every group that they are in
    w[[3, 20]] *= 10.0
  return w.astype(np.float32), (x.T @ x).astype(np.float32)


def rounded(w, bits, size, dimension):
  """Rounds each group to its asymmetric grid in float64."""
  out = np.empty(w.shape)
  turned, made = (w, out) if dimension == "output" else (w.T, out.T)
  for c in range(turned.shape[1]):
    for r in range(0, turned.shape[0], size):
      x = turned[r : r + size, c].astype(np.float64)
      s = (max(x.max(), 0) - min(x.min(), 0)) / (2**bits - 1)
      z = np.round(-min(x.min(), 0) / s)
      made[r : r + size, c] = (np.clip(np.round(x / s + z), 0, 2**bits - 1) - z) * s
  return out


def lost(w, h, q):
  d = np.asarray(q, np.float64) - w
  return np.trace(d.T @ h @ d)


@pytest.mark.parametrize("dimension", adadim.DIMENSIONS)
def test_the_error_is_that_of_the_output(dimension):
  w, h = problem()
  got = adadim.error(jnp.asarray(w), jnp.asarray(h), bits=3, group_size=10, dimension=dimension)
  assert float(got) == pytest.approx(lost(w, h, rounded(w, 3, 10, dimension)), rel=1e-3)


def apply(over, kernels, moments):
  tree = {f"layers/{i}:{i + 1}/up/kernel": jnp.asarray(w)[None] for i, w in enumerate(kernels)}
  m = model.Model(None, paths.nest(tree))
  found = {
    f"layers/{i}/up/kernel": folds.SecondMoment(jnp.asarray(h), jnp.asarray(200.0))
    for i, h in enumerate(moments)
  }
  (one,) = adadim.adadim(bits=3, group_size=8, over=over)
  out = one.apply(m, {"hessian": found}, KEY)
  again = one.apply(out, {"hessian": found}, KEY)
  jax.tree.map(np.testing.assert_array_equal, again.params, out.params)
  return [out.leaf(f"layers/{i}/up/kernel") for i in range(len(kernels))]


@pytest.mark.parametrize("over", adadim.OVER)
def test_groups_within_inputs_where_few_inputs_stand_out(over):
  (plain, h), (spiky, g) = problem(), problem(spiky=True)
  # Weights that vary from output to output are better off within outputs.
  plain = plain * np.exp(np.random.default_rng(1).normal(size=(1, plain.shape[1]))).astype("f4")
  made = apply(over, [plain, spiky], [h, g])
  assert [(x.group_size, x.group_cols) for x in made] == [(8, 1), (1, 8)]
  for x, w, k in zip(made, (plain, spiky), (h, g), strict=True):
    errors = {d: lost(w, k, rounded(w, 3, 8, d)) for d in adadim.DIMENSIONS}
    got = lost(w, k, x.dense())
    assert got == pytest.approx(min(errors.values()), rel=1e-3) or over == "gptq"
    assert got < 0.9 * min(errors.values()) or over == "rtn"


def test_gptq_within_inputs_leaves_what_no_later_row_can_mend():
  # Row by row: with the rows before it rounded, a row is what its neighbours ask for, rounded.
  w, h = problem(6, 8)
  how = {"bits": 3, "group_size": 4}
  codes, grid = adadim.quantize(
    jnp.asarray(w), jnp.asarray(h), **how, dimension="input", over="gptq", damping=0.0
  )
  s, z = (np.repeat(np.asarray(a, np.float64), 4, axis=1) for a in grid)
  q = (np.asarray(codes, np.float64) - z) * s
  upper = np.linalg.cholesky(np.asarray(h, np.float64)[::-1, ::-1])[::-1, ::-1]
  for j in range(6):
    wanted = w[j] + upper[:j, j] @ (w[:j] - q[:j]) / upper[j, j]
    expected = np.clip(np.round(wanted / s[j] + z[j]), 0, 7)
    assert (np.asarray(codes[j]) == expected).mean() >= 7 / 8  # a tie may fall otherwise


@pytest.mark.parametrize("over", adadim.OVER)
def test_scales_are_quantized_where_they_are_judged(over):
  w, h = problem(spiky=True)
  how = {"bits": 3, "group_size": 8, "dimension": "input", "scale_dtype": "int8"}
  codes, grid = adadim.quantize(jnp.asarray(w), jnp.asarray(h), over=over, **how)
  leaf = grids.tensor(codes, grid, bits=3, group_size=1, group_cols=8, store="float32")
  assert isinstance(leaf.scales, leaves.QuantizedTensor)
  error = float(adadim.error(jnp.asarray(w), jnp.asarray(h), **how))
  got = lost(w, h, leaf.dense())
  assert got == pytest.approx(error, rel=1e-3) if over == "rtn" else got < error


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="over='awq': valid are rtn, gptq"):
    adadim.adadim(over="awq")
  with pytest.raises(ValueError, match=r"damping=1.5"):
    adadim.adadim(damping=1.5)
  with pytest.raises(ValueError, match="scale_dtype='int7'"):
    adadim.adadim(scale_dtype="int7")
