# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import leaves
from treesurgeon.train import partition


def quantized():
  return leaves.QuantizedTensor(
    codes=jnp.zeros((2, 4, 3), jnp.uint8),
    scales=jnp.ones((2, 1, 3)),
    zeros=None,
    group_index=None,
    rows=8,
    cols=3,
    bits=4,
    group_size=8,
  )


def tree():
  low = leaves.LowRank(jnp.ones((2, 8, 1)), jnp.zeros((2, 1, 3)), scale=2.0)
  return {
    "embed": {"tokens": {"embedding": jnp.ones((5, 8))}},
    "layers": {
      "0:2": {"q": {"kernel": leaves.Sum((quantized(), low))}, "norm": {"scale": jnp.ones((2, 8))}}
    },
  }


@pytest.mark.parametrize(
  ("select", "types", "numbers"),
  [
    (".*", None, 40 + 6 + 16 + 6 + 16),  # with the scales of the quantized base
    (".*", ("LowRank",), 16 + 6),
    ("layers/1/.*", ("LowRank",), 8 + 3),
    (".*", ("array",), 40 + 16),
    (r"layers/0/norm/scale|embed/.*", None, 8 + 40),
    (r".*/q/kernel", ("QuantizedTensor",), 6),
  ],
)
def test_split_and_join_round_trip(select, types, numbers):
  params = tree()
  mask = partition.trainable(params, select, types=types)
  train, frozen = partition.split(params, mask)
  assert partition.count(train) == numbers
  back = partition.join(train, frozen, mask)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_join_puts_layers_back_where_they_were():
  params = {"layers": {"0:3": {"w": jnp.zeros((3, 2))}, "3:4": {"w": jnp.zeros((1, 5))}}}
  mask = partition.trainable(params, "layers/(0|2)/w")
  train, frozen = partition.split(params, mask)
  assert train["layers"]["0:3"]["w"].shape == (2, 2) and train["layers"]["3:4"]["w"] is None
  joined = partition.join(jax.tree.map(lambda x: x + 1, train), frozen, mask)
  assert joined["layers"]["0:3"]["w"].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_join_is_differentiable_in_what_trains():
  params = {"layers": {"0:3": {"w": jnp.arange(6.0).reshape(3, 2)}}}
  mask = partition.trainable(params, "layers/1/w")
  train, frozen = partition.split(params, mask)
  grad = jax.grad(lambda t: (partition.join(t, frozen, mask)["layers"]["0:3"]["w"] ** 2).sum())
  assert grad(train)["layers"]["0:3"]["w"].tolist() == [[4.0, 6.0]]


def test_bad_input_is_named():
  params = tree()
  with pytest.raises(ValueError, match="types names 'Lowrank'; valid: array, QuantizedTensor"):
    partition.trainable(params, types=("Lowrank",))
  with pytest.raises(ValueError, match="types names 'Sum'"):
    partition.trainable(params, types=("Sum",))
  with pytest.raises(ValueError, match="no address matches 'head'; nearest"):
    partition.trainable(params, "head")
  with pytest.raises(ValueError, match="nothing is trainable: select='embed/.*' matches 1 leaves"):
    partition.trainable(params, "embed/.*", types=("LowRank",))
