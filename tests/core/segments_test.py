# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.core import leaves, model, paths


def tree(*bounds, width=2):
  """Parameters with the given segments and one leaf outside."""
  layers = {
    f"{a}:{b}": {
      "w": jnp.arange(a, b, dtype=jnp.float32)[:, None] * jnp.ones((1, width)),
      "v": jnp.arange(a, b, dtype=jnp.float32),
    }
    for a, b in bounds
  }
  return {"embed": {"w": jnp.zeros(3)}, "layers": layers}


def names(params):
  return [f"{a}:{b}" for a, b, _ in paths.segments(params)]


def test_addresses_are_in_natural_order():
  listed = paths.addresses(tree((0, 11)))
  assert listed[0] == "embed/w"
  assert listed.index("layers/2/w") < listed.index("layers/10/w")
  assert paths.natural("layers/²/w") > paths.natural("layers/2/w")


def test_flatten_and_unflatten_are_inverse():
  params = tree((0, 2), (2, 3))
  flat = paths.flatten(params)
  assert list(flat) == paths.addresses(params)
  again = paths.unflatten(flat)
  assert names(again) == ["0:3"]
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), flat, paths.flatten(again)))


def test_update_shares_what_it_does_not_touch():
  params = tree((0, 2), (2, 4))
  out = paths.update(params, {"layers/0/w": jnp.ones(2)})
  assert out["layers"]["0:2"]["v"] is params["layers"]["0:2"]["v"]
  assert out["embed"]["w"] is params["embed"]["w"]
  outer = paths.update(params, {"embed/w": jnp.ones(3)})
  assert outer["layers"]["2:4"] is params["layers"]["2:4"]


def test_update_splits_where_layers_differ_and_joins_where_they_agree_again():
  params = tree((0, 5))
  low = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
  mixed = paths.update(params, {"layers/1/w": low, "layers/2/w": low})
  assert names(mixed) == ["0:1", "1:3", "3:5"]
  assert isinstance(mixed["layers"]["1:3"]["w"], leaves.LowRank)
  assert paths.get(mixed, "layers/4/v") == 4
  back = paths.update(mixed, {f"layers/{i}/w": paths.get(params, f"layers/{i}/w") for i in (1, 2)})
  assert names(back) == ["0:5"]
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, back))


def test_update_keeps_segments_that_nothing_touched():
  params = tree((0, 2), (2, 4))
  assert names(paths.update(params, {"embed/w": jnp.ones(3)})) == ["0:2", "2:4"]
  assert names(paths.update(params, {"layers/3/w": jnp.ones(2)})) == ["0:2", "2:4"]


def test_update_works_on_shapes():
  params = jax.eval_shape(lambda: tree((0, 3)))
  out = paths.update(params, {"layers/1/w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})
  assert names(out) == ["0:1", "1:2", "2:3"]
  back = paths.update(out, {"layers/1/w": jax.ShapeDtypeStruct((2,), jnp.float32)})
  assert names(back) == ["0:3"]
  assert back["layers"]["0:3"]["v"].shape == (3,)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_update_is_what_flat_dicts_do(kinds, data):
  def leaf(kind, i):
    return np.full((kind + 1,), i, np.float32)

  flat = {f"layers/{i}/w": leaf(k, i) for i, k in enumerate(kinds)}
  flat |= {f"layers/{i}/v": np.float32(i) for i in range(len(kinds))}
  params = paths.unflatten(flat)
  chosen = data.draw(st.lists(st.sampled_from(sorted(flat)), unique=True))
  changes = {a: leaf(data.draw(st.integers(0, 2)), 9) for a in chosen if a.endswith("w")}
  out = paths.update(params, changes)
  want = flat | changes
  got = paths.flatten(out)
  assert set(got) == set(want)
  for address, x in want.items():
    np.testing.assert_array_equal(got[address], x)
  bounds = paths.segments(out)
  assert [a for a, _, _ in bounds] == [0, *(b for _, b, _ in bounds[:-1])]
  if changes:
    assert names(out) == names(paths.unflatten(want))


def test_messages_name_the_nearest():
  params = tree((0, 2))
  with pytest.raises(ValueError, match=r"no address matches 'layers/7/w'; nearest: layers/1/w"):
    paths.get(params, "layers/7/w")
  with pytest.raises(ValueError, match="no address matches 'embed/x'"):
    paths.update(params, {"embed/x": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"select='\(' is not a regular expression"):
    paths.select(["a"], "(")
  with pytest.raises(ValueError, match="a segment is named 'start:stop'"):
    paths.segments({"layers": {"0": {}}})


def test_a_model_is_compared_by_identity_and_described_without_reading():
  m = model.Model(None, tree((0, 2)))
  assert m == m and m != m.replace() and len({m, m}) == 1
  assert m.struct("layers/1/w") == jax.ShapeDtypeStruct((2,), jnp.float32)
  assert m.size() == 9 and m.nbytes() == 36
  part = model.Part(None, {"layers/1/w": jnp.ones(2)})
  assert part.struct("layers/1/w").shape == (2,)
  with pytest.raises(ValueError, match="layers/0/w is not in this part of the model: layers/1/w"):
    part.update({"layers/0/w": jnp.ones(2)})
