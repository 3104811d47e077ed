# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models, registry
from treesurgeon.core import model
from treesurgeon.merge import sparse_model_soups as soups

SPEC = models.VisionSpec("mlp", image_size=4, num_classes=3, d_model=8, num_layers=2)
RNG = np.random.default_rng(0)
BATCHES = [
  {
    "inputs": RNG.standard_normal((6, 4, 4, 1)).astype(np.float32),
    "labels": RNG.integers(0, 3, 6).astype(np.int32),
  }
  for _ in range(3)
]
START = model.Model(SPEC, models.init(SPEC, jax.random.key(0)))
KEY = jax.random.key(0)


def run(start=START, batches=BATCHES, **arguments):
  (one,) = soups.sparse_model_soups(**{"steps": 4, "rate": 0.01, **arguments})
  return one.apply(start, {"batches": batches}, KEY)


def test_the_soup_has_the_mask_of_the_pruned_model():
  (cut,) = registry.parse("compress.prune.magnitude(sparsity=0.75)")
  pruned = cut.apply(START, {}, KEY)
  out = run(sparsity=0.75)
  for i in range(2):
    address = f"layers/{i}/dense/kernel"
    zeros = np.asarray(pruned.leaf(address)) == 0
    np.testing.assert_array_equal(np.asarray(out.leaf(address)) == 0, zeros)
    assert (np.asarray(out.leaf(address)) != np.asarray(pruned.leaf(address))).any()
  assert (np.asarray(out.leaf("embed/input/kernel")) != 0).all()


def test_rounds_prune_ever_more_and_never_less():
  out = run(sparsity=0.75, rounds=2)
  np.testing.assert_allclose(out.aux["notes"]["sparsity"], [0.5, 0.75])
  kernel = np.asarray(out.leaf("layers/1/dense/kernel"))
  assert (kernel == 0).sum() == 48


def test_a_pattern_is_kept():
  kernel = np.asarray(run(pattern="2:4").leaf("layers/0/dense/kernel"))
  assert ((kernel.reshape(2, 4, 8) == 0).sum(1) == 2).all()


def test_it_is_the_average_of_copies_trained_one_by_one():
  """Each copy's own descent, written out, gives what the side by side one does."""
  decay = (0.0, 0.1)
  out = run(sparsity=0.5, copies=2, decay=decay, steps=4)
  (cut,) = registry.parse("compress.prune.magnitude(sparsity=0.5)")
  pruned = cut.apply(START, {}, KEY)
  masks = jax.tree.map(jnp.ones_like, pruned.params)
  kernel = pruned.params["layers"]["0:2"]["dense"]["kernel"]
  masks["layers"]["0:2"]["dense"]["kernel"] = (kernel != 0).astype(jnp.float32)

  @jax.jit
  @jax.grad
  def slope(params, batch, weight):
    kept = jax.tree.map(jnp.multiply, params, masks)
    square = sum(jnp.sum(x * x) for x in jax.tree.leaves(kept))
    return models.nll(SPEC, kept, batch) + 0.5 * weight * square

  ends = []
  for copy, weight in enumerate(decay):
    optimizer = optax.adam(optax.linear_schedule(0.01, 0.0, 4))
    params, state = pruned.params, optimizer.init(pruned.params)
    rng = np.random.default_rng([0, copy])
    order = np.concatenate([rng.permutation(3), rng.permutation(3)])
    for t in order[:4]:
      change, state = optimizer.update(slope(params, BATCHES[t], weight), state)
      params = optax.apply_updates(params, change)
    ends.append(params)
  mean = model.Model(SPEC, jax.tree.map(lambda a, b, k: (a + b) / 2 * k, *ends, masks))
  for address in START.addresses():
    np.testing.assert_allclose(out.leaf(address), mean.leaf(address), rtol=1e-4, atol=1e-6)


def test_weights_outside_the_selection_may_be_zero_and_train():
  params = jax.tree.map(jnp.array, START.params)
  dense = params["layers"]["0:2"]["dense"]
  dense["kernel"] = dense["kernel"].at[0, 0].set(0)
  out = run(START.replace(params=params), sparsity=0.5, select="layers/1/.*")
  assert (np.asarray(out.leaf("layers/1/dense/kernel")) == 0).sum() == 32
  assert (np.asarray(out.leaf("layers/0/dense/kernel"))[0] != 0).any()


def test_bfloat16_stays():
  start = START.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), START.params))
  out = run(start, sparsity=0.5)
  assert {x.dtype.name for x in jax.tree.leaves(out.params)} == {"bfloat16"}
  assert (np.asarray(out.leaf("layers/0/dense/kernel"), np.float32) == 0).sum() == 32


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"rounds": 0}, "rounds=0 and copies=3 must be at least 1"),
    ({"copies": 0}, "rounds=1 and copies=0 must be at least 1"),
    ({"decay": ()}, r"decay=\(\) not empty"),
    ({"pattern": "2:4", "rounds": 2}, "with a pattern, rounds is 1"),
    ({"rate": -1.0}, "rate=-1.0 must be above 0"),
    ({"sparsity": 1.5}, "sparsity"),
  ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    soups.sparse_model_soups(**arguments)


def test_batches_of_several_shapes_are_refused():
  short = {k: x[:2] for k, x in BATCHES[0].items()}
  with pytest.raises(ValueError, match="batches must have one shape; these have"):
    run(batches=[BATCHES[0], short])
