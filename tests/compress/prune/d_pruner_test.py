# SPDX-License-Identifier: Apache-2.0
"""D-Pruner on quadratic losses, where its importance is exact, and the order of its two texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.compress.prune import d_pruner
from treesurgeon.core import model
from treesurgeon.run import collect, drivers, gradients


def test_importance_is_the_change_of_the_regularized_loss():
  """With a loss of diagonal curvature the expansion is exact."""
  rng = np.random.default_rng(0)
  w, g = rng.normal(size=(2, 6, 4))
  f, general = rng.uniform(size=(2, 6, 4))

  def loss(new):
    domain = (g * (new - w) + 0.5 * f * (new - w) ** 2).sum()
    return domain + 0.3 * (general * (new - w) ** 2).sum()

  got = d_pruner.importance(*(jnp.asarray(x) for x in (w, g, f, general)), lam=0.3)
  for i, j in np.ndindex(6, 4):
    new = w.copy()
    new[i, j] = 0
    np.testing.assert_allclose(got[i, j], abs(loss(new)), rtol=1e-4)


SPEC = models.Spec(vocab_size=12, d_model=8, num_layers=1, num_heads=2, d_ff=8, max_positions=8)
GENERAL, DOMAIN = (
  [np.random.default_rng(i).integers(low, low + 6, (3, 6))] for i, low in enumerate((0, 6))
)
UP = "layers/0/mlp/up/kernel"


def test_the_first_text_is_general_and_the_second_the_domain():
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
  given = collect.Materials(batches=GENERAL + DOMAIN, donor_batches=[GENERAL, DOMAIN])
  (one,) = registry.parse(f"compress.prune.d_pruner(lam=2.0, select={UP!r})")
  evidence = collect.evidence(one, m, given)
  both = [gradients.fisher(m, text, select=UP)[UP] for text in (GENERAL, DOMAIN)]
  for i in range(2):
    np.testing.assert_array_equal(evidence["fisher"][UP][i], both[i])
  slope = gradients.gradient(m, DOMAIN, select=UP)[UP]
  score = np.asarray(d_pruner.importance(m.leaf(UP), slope, both[1], both[0], lam=2.0))
  least = np.sort(score.ravel())[32]
  out = drivers.run((one,), m, given)
  np.testing.assert_array_equal(out.leaf(UP), np.where(score < least, 0, m.leaf(UP)))
  blockwise = drivers.run_blockwise((one,), m, given)
  np.testing.assert_array_equal(out.leaf(UP), blockwise.leaf(UP))
  with pytest.raises(ValueError, match=f"{UP}: d_pruner needs two calibration texts.*; 1 given"):
    drivers.run((one,), m, collect.Materials(batches=GENERAL))
  with pytest.raises(ValueError, match="needs calibration text in set 1 and none was given"):
    drivers.run((one,), m, collect.Materials(batches=GENERAL, donor_batches=[GENERAL, []]))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"lam": -1.0}, "lam=-1.0 must not be negative"),
    ({"per": "model"}, "per='model': valid are matrix, column"),
    ({"packed": True}, "packed=True stores N:M sparsity"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    d_pruner.d_pruner(**arguments)
