# SPDX-License-Identifier: Apache-2.0
"""Depth growth: which layer goes where, and that everything follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from treesurgeon import models
from treesurgeon.core import model, paths
from treesurgeon.grow import g_stack, interpolate
from treesurgeon.models import hf
from treesurgeon.run import drivers

SPEC = models.Spec(
  vocab_size=8, d_model=4, num_layers=2, num_heads=1, d_ff=8, window=(0, 4), family="llama"
)
ORDER = {
  "stack": (g_stack.g_stack, [0, 1, 0, 1, 0, 1]),
  "repeat": (interpolate.interpolate, [0, 0, 0, 1, 1, 1]),
}


def make():
  return model.Model(SPEC, models.init(SPEC, jax.random.key(0)))


@pytest.mark.parametrize("kind", ORDER)
def test_new_layers_are_the_old_ones_in_order(kind):
  factory, order = ORDER[kind]
  m = make()
  grown = drivers.run(factory(growth=3), m)
  assert grown.spec == SPEC.take_layers(order)
  assert grown.spec.window == tuple((0, 4)[i] for i in order)
  for new, old in enumerate(order):
    for suffix in ("mlp/up/kernel", "attn_norm/scale"):
      np.testing.assert_array_equal(
        grown.leaf(f"layers/{new}/{suffix}"), m.leaf(f"layers/{old}/{suffix}")
      )
  for kept in ("embed/tokens/embedding", "final_norm/scale", "lm_head/kernel"):
    assert grown.leaf(kept) is m.leaf(kept)


def test_lineage_tells_size_before_and_after():
  m = make()
  grown = drivers.run(g_stack.g_stack(growth=2), m)
  notes = grown.lineage[0].notes
  assert notes["layers"] == [2, 4]
  assert notes["parameters"] == [m.size(), grown.size()]
  assert "notes" not in grown.aux


def test_the_grown_model_runs_and_exports():
  grown = drivers.run(g_stack.g_stack(growth=2), make())
  tokens = jnp.array([[1, 2, 3]])
  assert models.forward(grown.spec, grown.params, tokens).logits.shape == (1, 3, 8)
  assert hf.to_config(grown.spec)["num_hidden_layers"] == 4
  addresses = {a for entry in hf.entries(grown.spec) for a in entry.address}
  assert addresses >= set(grown.addresses())
  assert any(e.name == "model.layers.3.mlp.up_proj.weight" for e in hf.entries(grown.spec))


def test_the_optimizer_grows_along():
  m = make()
  optimizer = optax.adamw(1e-2)
  grads = jax.tree.map(jnp.cos, m.params)
  _, state = optimizer.update(grads, optimizer.init(m.params), m.params)
  m = m.replace(aux={"optimizer": state, "other": "kept"})
  grown = drivers.run(g_stack.g_stack(growth=2), m)
  assert grown.aux["other"] == "kept"
  old, new = state[0], grown.aux["optimizer"][0]
  assert new.count == old.count
  for which in ("mu", "nu"):
    np.testing.assert_array_equal(
      paths.get(getattr(new, which), "layers/3/mlp/up/kernel"),
      paths.get(getattr(old, which), "layers/1/mlp/up/kernel"),
    )
  grads = jax.tree.map(jnp.cos, grown.params)
  updates, _ = optimizer.update(grads, grown.aux["optimizer"], grown.params)
  assert jax.tree.structure(updates) == jax.tree.structure(grown.params)


def test_what_is_keyed_by_address_grows_along():
  masks = {"layers/1/mlp/up/kernel": "b", "layers/0/mlp/up/kernel": "a", "lm_head/kernel": "c"}
  grown = drivers.run(g_stack.g_stack(growth=2), make().replace(aux={"masks": masks}))
  names = [f"layers/{i}/mlp/up/kernel" for i in range(4)]
  assert grown.aux["masks"] == dict(zip(names, "abab", strict=True)) | {"lm_head/kernel": "c"}


def test_index_lists():
  assert g_stack.stack_index(3, 2) == [0, 1, 2, 0, 1, 2]
  assert interpolate.repeat_index(3, 2) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ORDER)
def test_mistakes_are_named(kind):
  factory, _ = ORDER[kind]
  for growth in (0, -1, 1.5, True):
    with pytest.raises((ValueError, TypeError), match="growth|integer"):
      factory(growth=growth)
  with pytest.raises(ValueError, match="a model without layers cannot grow"):
    drivers.run(factory(growth=2), model.Model(None, {"w": jnp.ones(2)}))
