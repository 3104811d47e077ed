# SPDX-License-Identifier: Apache-2.0
"""Gathering layers against indexing one by one, for every kind of leaf and state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models
from treesurgeon.core import leaves, paths
from treesurgeon.grow import take_layers

UNEQUAL = models.Spec(vocab_size=8, d_model=4, num_layers=4, num_heads=1, d_ff=(8, 8, 6, 8))
UNIFORM = models.Spec(vocab_size=8, d_model=4, num_layers=3, num_heads=1, d_ff=8)
INDEX = [2, 0, 1, 3, 3, 0]


def params_of(spec):
  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


def one_by_one(params, index):
  flat = paths.flatten(params)
  out = {a: x for a, x in flat.items() if not a.startswith("layers/")}
  for new, old in enumerate(index):
    for a, x in flat.items():
      if a.startswith(f"layers/{old}/"):
        out[f"layers/{new}/" + a.split("/", 2)[2]] = x
  return paths.unflatten(out)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("index", [INDEX, [0], [3, 2, 1, 0], [0, 1, 2, 3]])
def test_equals_indexing_one_by_one(index):
  params = params_of(UNEQUAL)
  equal(take_layers.take_layers(params, index), one_by_one(params, index))


def test_segments_are_those_of_the_spec():
  grown = take_layers.take_layers(params_of(UNEQUAL), INDEX)
  names = [(a, b) for a, b, _ in paths.segments(grown)]
  assert names == list(UNEQUAL.take_layers(INDEX).segments())
  # Layers of one structure that came from different segments are one segment again.
  assert (1, 6) in names


def test_taking_all_layers_in_order_touches_nothing():
  params = params_of(UNEQUAL)
  grown = take_layers.take_layers(params, range(4))
  assert (
    grown["layers"]["0:2"]["mlp"]["up"]["kernel"] is params["layers"]["0:2"]["mlp"]["up"]["kernel"]
  )


def test_compressed_leaves():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 6, 2), (3, 2, 5)))
  tree = {"layers": {"0:3": {"w": {"kernel": leaves.LowRank(a, b, 0.5)}}}}
  leaf = take_layers.take_layers(tree, [2, 2, 0, 1])["layers"]["0:4"]["w"]["kernel"]
  assert leaf.scale == 0.5
  dense = tree["layers"]["0:3"]["w"]["kernel"].dense()
  np.testing.assert_array_equal(leaf.dense(), dense[np.array([2, 2, 0, 1])])


def test_host_arrays_stay_on_the_host():
  tree = {"layers": {"0:2": {"w": np.arange(6.0).reshape(2, 3)}}}
  taken = take_layers.take_layers(tree, [1, 0, 1])["layers"]["0:3"]["w"]
  assert type(taken) is np.ndarray
  np.testing.assert_array_equal(taken[:, 0], [3, 0, 3])


def test_shapes_are_enough():
  shapes = jax.eval_shape(lambda: params_of(UNEQUAL))
  grown = take_layers.take_layers(shapes, INDEX)
  wanted = jax.eval_shape(lambda: models.init(UNEQUAL.take_layers(INDEX), jax.random.key(0)))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(
    lambda x: (x.shape, x.dtype), wanted
  )


def mask(params):
  return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


OPTIMIZERS = {
  "adam": lambda p: optax.adamw(1e-2),
  "chain": lambda p: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
  "masked": lambda p: optax.chain(optax.masked(optax.adam(1e-2), mask)),
  "masked away": lambda p: optax.masked(optax.trace(0.9), {**mask(p), "layers": False}),
  "multi": lambda p: optax.multi_transform(
    {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)},
    lambda q: jax.tree.map(lambda m: "a" if m else "b", mask(q)),
  ),
  "injected": lambda p: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
  "accumulating": lambda p: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
  "factored": lambda p: optax.adafactor(1e-2, min_dim_size_to_factor=4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states(name):
  params = params_of(UNIFORM)
  # Adafactor factors the two largest axes, so a count of layers must not become one of them.
  index = [2, 0, 1] if name == "factored" else [0, 1, 2, 0, 1, 2]
  optimizer = OPTIMIZERS[name](params)
  state = optimizer.init(params)
  grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)
  _, state = optimizer.update(grads, state, params)
  grown = take_layers.take_layers(params, index)
  moved = take_layers.take_layers(state, index, like=params)
  fresh = optimizer.init(grown)
  assert jax.tree.structure(moved) == jax.tree.structure(fresh)
  for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(fresh), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  updates, _ = optimizer.update(take_layers.take_layers(grads, index), moved, grown)
  assert jax.tree.structure(updates) == jax.tree.structure(grown)


def test_moments_of_the_gathered_are_the_gathered_moments():
  params = params_of(UNIFORM)
  index = [0, 1, 2, 0, 1, 2]
  optimizer = optax.adam(1e-2)
  grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)
  _, state = optimizer.update(grads, optimizer.init(params))
  grown = take_layers.take_layers(params, index)
  _, wanted = optimizer.update(take_layers.take_layers(grads, index), optimizer.init(grown))
  equal(take_layers.take_layers(state, index, like=params), wanted)


def test_mistakes_are_named():
  params = params_of(UNIFORM)
  with pytest.raises(ValueError, match=r"layers \[3\] cannot be taken; valid are 0 to 2"):
    take_layers.take_layers(params, [0, 3])
  with pytest.raises(ValueError, match=r"layers \[\] cannot be taken"):
    take_layers.take_layers(params, [])
  state = {"layers": {"0:3": {"w": jnp.ones((2, 2))}}}
  with pytest.raises(ValueError, match=r"shape \(2, 2\) lacks the axis of its 3 layers"):
    take_layers.take_layers(state, [0], like=params)
