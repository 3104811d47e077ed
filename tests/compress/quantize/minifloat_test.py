# SPDX-License-Identifier: Apache-2.0
"""Minifloats: the best split by brute force, of weights and of outputs; what suits which tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import minifloat
from treesurgeon.core import formats, model, paths
from treesurgeon.stats import folds

KEY = jax.random.key(0)


def rounded(w, name, bits):
  """Rounds every column to its scaled table in float64."""
  scale = np.abs(w).max(axis=0) / formats.divisor(name, bits)
  half = 2 ** (bits - 1)
  table = np.arange(-half, half) if name == "int" else formats.levels(name, bits)
  at = np.abs(w[..., None] / scale[:, None] - table.astype(np.float64)).argmin(axis=-1)
  return table[at] * scale


def kernels(seed=0):
  rng = np.random.default_rng(seed)
  shapes = (rng.uniform(-1, 1, (48, 6)), rng.normal(size=(48, 6)), rng.standard_t(2, (48, 6)))
  return [x.astype(np.float32) for x in shapes]


@pytest.mark.parametrize(("bits", "by"), [(3, "weights"), (4, "outputs"), (6, "weights")])
def test_the_best_format_by_brute_force(bits, by):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(200, 48)) * np.geomspace(0.05, 5, 48)
  h = x.T @ x
  names = minifloat.formats(bits)
  assert len(names) == bits
  for w in kernels():
    wrong = [rounded(w.astype(np.float64), n, bits) - w for n in names]
    losses = [np.sum(d * d if by == "weights" else d * (h @ d)) for d in wrong]
    given = None if by == "weights" else jnp.asarray(h, jnp.float32)
    got = minifloat.choose(jnp.asarray(w), given, names=names, bits=bits, group_size=48)
    assert losses[int(got)] <= min(losses) * (1 + 1e-4)


def test_heavier_tails_take_more_exponent_bits_and_a_format_a_kernel():
  tree = {f"layers/{i}:{i + 1}/up/kernel": jnp.asarray(w)[None] for i, w in enumerate(kernels())}
  m = model.Model(None, paths.nest(tree))
  (one,) = minifloat.minifloat(bits=5)
  out = one.apply(m, {}, KEY)
  found = [out.leaf(f"layers/{i}/up/kernel") for i in range(3)]
  exponents = [0 if k.format == "int" else int(k.format[1]) for k in found]
  assert exponents[0] <= 1 <= exponents[1] < exponents[2]
  for k, w in zip(found, kernels(), strict=True):
    np.testing.assert_allclose(k.dense(), rounded(w, k.format, 5), rtol=1e-5, atol=1e-6)
  again = one.apply(out, {}, KEY)
  jax.tree.map(np.testing.assert_array_equal, again.params, out.params)


def test_inputs_decide_where_outputs_count():
  w = kernels()[2]
  few = np.where(np.abs(w).max(axis=1) < np.quantile(np.abs(w), 0.9), 1.0, 1e-6)
  moment = folds.SecondMoment(jnp.diag(jnp.asarray(few, jnp.float32)), jnp.asarray(1.0))
  m = model.Model(None, paths.nest({"layers/0:1/up/kernel": jnp.asarray(w)[None]}))
  (one,) = minifloat.minifloat(bits=4, by="outputs")
  leaf = one.apply(m, {"hessian": {"layers/0/up/kernel": moment}}, KEY).leaf("layers/0/up/kernel")
  losses = [(few[:, None] * (rounded(w, n, 4) - w) ** 2).sum() for n in minifloat.formats(4)]
  assert leaf.format == minifloat.formats(4)[int(np.argmin(losses))]


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="bits=2: minifloats have 3 to 8"):
    minifloat.minifloat(bits=2)
  with pytest.raises(ValueError, match="by='loss': valid are weights, outputs"):
    minifloat.minifloat(by="loss")
