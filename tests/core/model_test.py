# SPDX-License-Identifier: Apache-2.0
"""A model is a value: changes make another one."""

import dataclasses

import jax.numpy as jnp
import pytest

from treesurgeon.core import leaves, model


def make():
  low = leaves.LowRank(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 6)))
  return model.Model("spec", {"w": jnp.ones(3, jnp.bfloat16), "layers": {"0:2": {"kernel": low}}})


def test_update_makes_another_model():
  m = make()
  out = m.update({"w": jnp.zeros(3)})
  assert m.leaf("w").tolist() == [1, 1, 1]
  assert out.leaf("w").tolist() == [0, 0, 0]
  assert out.spec == m.spec
  assert m.update({}) is m


def test_sizes_count_compressed_leaves_compressed():
  m = make()
  assert m.size() == 3 + 2 * 24
  assert m.nbytes() == 3 * 2 + 2 * (4 + 6) * 4
  assert m.addresses() == ["layers/0/kernel", "layers/1/kernel", "w"]


def test_it_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().spec = "other"


def test_a_part_holds_leaves_by_address():
  part = model.Part("spec", {"layers/3/w": jnp.ones(2)})
  assert part.addresses() == ["layers/3/w"]
  out = part.update({"layers/3/w": jnp.zeros(2)})
  assert isinstance(out, model.Part)
  assert out.leaf("layers/3/w").tolist() == [0, 0]
  assert part.leaf("layers/3/w").tolist() == [1, 1]
