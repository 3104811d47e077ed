# SPDX-License-Identifier: Apache-2.0
"""The address grammar: every way through it comes back, and mistakes are named."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from treesurgeon.core import leaves, paths

words = st.text("abcxyz_", min_size=1, max_size=4)


@st.composite
def flats(draw):
  """Draws a model as address to host array: some outer leaves, layers of two structures."""
  outer = draw(st.lists(words, min_size=1, max_size=3, unique=True))
  kinds = [
    {f"{w}/kernel": (2, 3) for w in draw(st.lists(words, min_size=1, max_size=2, unique=True))}
    for _ in range(2)
  ]
  kinds[1]["extra/scale"] = (2,)
  layers = draw(st.lists(st.sampled_from([0, 1]), max_size=12))
  shapes = {f"{w}/leaf": (2,) for w in outer if w != "layers"}
  for i, kind in enumerate(layers):
    shapes.update({f"layers/{i}/{s}": shape for s, shape in kinds[kind].items()})
  rng = np.random.default_rng(0)
  return {a: rng.standard_normal(s).astype(np.float32) for a, s in shapes.items()}, layers


def equal(a, b):
  assert list(a) == list(b)
  for address in a:
    np.testing.assert_array_equal(a[address], b[address], err_msg=address)


few = hypothesis.settings(deadline=None, max_examples=60)


@few
@hypothesis.given(flats())
def test_flatten_undoes_unflatten(drawn):
  flat, layers = drawn
  tree = paths.unflatten(flat)
  ordered = dict(sorted(flat.items(), key=lambda kv: paths.natural(kv[0])))
  equal(paths.flatten(tree), ordered)
  assert paths.addresses(tree) == list(ordered)
  assert paths.num_layers(tree) == len(layers)
  for address, leaf in flat.items():
    np.testing.assert_array_equal(paths.get(tree, address), leaf)


@few
@hypothesis.given(flats())
def test_segments_are_maximal_and_partition_the_layers(drawn):
  flat, layers = drawn
  found = paths.segments(paths.unflatten(flat))
  runs = 1 + sum(a != b for a, b in zip(layers, layers[1:], strict=False)) if layers else 0
  assert len(found) == runs
  covered = [i for start, stop, _ in found for i in range(start, stop)]
  assert covered == list(range(len(layers)))


@few
@hypothesis.given(flats(), st.data())
def test_update_changes_what_it_is_told(drawn, data):
  flat, _ = drawn
  chosen = data.draw(st.lists(st.sampled_from(sorted(flat)), unique=True))
  changes = {a: flat[a] + 1 for a in chosen}
  tree = paths.unflatten(flat)
  before = paths.flatten(tree)
  updated = paths.update(tree, changes)
  wanted = {a: changes.get(a, flat[a]) for a in before}
  equal(paths.flatten(updated), wanted)
  equal(paths.flatten(tree), before)
  assert jax.tree.structure(updated) == jax.tree.structure(tree)


@few
@hypothesis.given(flats(), st.data())
def test_update_splits_segments_where_layers_stop_being_equal(drawn, data):
  flat, _ = drawn
  chosen = data.draw(st.lists(st.sampled_from(sorted(flat)), max_size=3, unique=True))
  changes = {a: flat[a].astype(np.float16) for a in chosen}
  updated = paths.update(paths.unflatten(flat), changes)
  equal(paths.flatten(updated), {a: changes.get(a, flat[a]) for a in paths.flatten(updated)})
  for start, stop, tree in paths.segments(updated):
    assert all(x.shape[0] == stop - start for x in paths.walk(tree).values())


@few
@hypothesis.given(flats())
def test_walk_and_nest(drawn):
  flat, _ = drawn
  tree = paths.unflatten(flat)
  assert jax.tree.structure(paths.nest(paths.walk(tree))) == jax.tree.structure(tree)


def test_untouched_leaves_are_shared():
  tree = {
    "a": {"w": jnp.ones(2)},
    "layers": {"0:2": {"w": jnp.ones((2, 3)), "v": jnp.ones((2, 1))}},
  }
  out = paths.update(tree, {"layers/1/w": jnp.zeros(3)})
  assert out["a"]["w"] is tree["a"]["w"]
  assert out["layers"]["0:2"]["v"] is tree["layers"]["0:2"]["v"]


def test_compressed_leaves_are_leaves():
  low = leaves.LowRank(jnp.ones((3, 4, 1)), jnp.ones((3, 1, 5)))
  tree = {"layers": {"0:3": {"kernel": low}}}
  assert paths.get(tree, "layers/1/kernel").shape == (4, 5)
  out = paths.update(tree, {"layers/1/kernel": jnp.zeros((4, 5))})
  assert [s[:2] for s in paths.segments(out)] == [(0, 1), (1, 2), (2, 3)]
  again = paths.unflatten(paths.flatten(tree))
  assert jax.tree.structure(again) == jax.tree.structure(tree)


def test_shapes_are_enough():
  shapes = jax.eval_shape(lambda: {"layers": {"0:3": {"w": jnp.ones((3, 2))}}})
  flat = paths.flatten(shapes)
  assert flat["layers/2/w"].shape == (2,)
  assert paths.unflatten(flat)["layers"]["0:3"]["w"].shape == (3, 2)


def test_layer_two_comes_before_layer_ten():
  flat = {f"layers/{i}/w": np.zeros(1) for i in (10, 2, 0)}
  assert sorted(flat, key=paths.natural) == ["layers/0/w", "layers/2/w", "layers/10/w"]


def test_select():
  names = ["layers/0/mlp/up/kernel", "layers/10/mlp/up/kernel", "final_norm/scale"]
  assert paths.select(names, "layers/1/.*|layers/10/.*") == names[1:2]
  assert paths.select(names, ".*") == names


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("layers/0/mlp/upp/kernel", "nearest: layers/0/mlp/up/kernel"),
    ("mlp/up", "no address matches 'mlp/up'"),  # fullmatch, not search
    ("(", "is not a regular expression"),
  ],
)
def test_a_selection_that_matches_nothing_is_named(pattern, message):
  with pytest.raises(ValueError, match=message.replace("(", r"\(")):
    paths.select(["layers/0/mlp/up/kernel", "final_norm/scale"], pattern)


@pytest.mark.parametrize(
  "address", ["layers/2/w", "layers/0/v", "w", "layers", "embed", "layers/0"]
)
def test_an_unknown_address_is_named(address):
  tree = {"layers": {"0:2": {"w": jnp.zeros((2, 3))}}, "embed": {"w": jnp.zeros(2)}}
  with pytest.raises(ValueError, match=f"no address matches '{address}'; nearest: "):
    paths.get(tree, address)
  with pytest.raises(ValueError, match=f"no address matches '{address}'"):
    paths.update(tree, {address: jnp.zeros(3)})


def test_a_wrong_segment_name():
  with pytest.raises(ValueError, match="layers/first: a segment is named 'start:stop'"):
    paths.segments({"layers": {"first": {}}})


def test_a_model_without_leaves():
  with pytest.raises(ValueError, match="the model has no leaves"):
    paths.select([], ".*")
