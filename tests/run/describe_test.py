# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp

from treesurgeon import registry
from treesurgeon.core import leaves, model
from treesurgeon.run import describe


def make():
  up = {"kernel": jnp.ones((3, 8, 4), jnp.bfloat16)}
  return model.Model(None, {"layers": {"0:3": {"mlp": {"up": up}}}, "norm": jnp.ones(5)})


def test_rows_tell_shapes_and_bytes_of_what_is_held():
  m = make()
  (one,) = registry.parse("compress.quantize.rtn(bits=4, group_size=8, select='layers/1/.*')")
  mixed = one.apply(m, {}, jax.random.key(0))
  rows = {r.address: r for r in describe.rows(mixed.params)}
  assert list(rows) == [*(f"layers/{s}/mlp/up/kernel" for s in ("0:1", "1:2", "2:3")), "norm"]
  packed = rows["layers/1:2/mlp/up/kernel"]
  assert (packed.kind, packed.shape, packed.size, packed.nbytes) == ("int4 column", (8, 4), 32, 24)
  assert packed.bits == 6.0
  assert describe.total(rows.values()) == (mixed.size(), mixed.nbytes())


def test_rows_of_shapes_alone_are_the_same():
  m = make()
  assert describe.rows(jax.eval_shape(lambda: m.params)) == describe.rows(m.params)


def test_kinds():
  low = leaves.LowRank(jnp.ones((4, 2)), jnp.ones((2, 4)))
  assert "rank" in describe.kind(low) or "2" in describe.kind(low)
  assert describe.kind(leaves.Sum((jnp.ones((4, 4)), low))).startswith("float32")


def test_differences_name_every_kind_of_change():
  m = model.Model(None, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "d": jnp.ones(2)})
  params = {"a": jnp.ones(2), "b": 2 * jnp.ones(2), "c": jnp.ones(3), "e": jnp.ones(2)}
  found = {d.address: d for d in describe.differences(m, model.Model(None, params))}
  assert {a: d.note for a, d in found.items()} == {
    "a": "equal", "b": "changed", "c": "(2,) -> (3,)", "d": "only in the first",
    "e": "only in the second",
  }  # fmt: skip
  assert found["b"].relative == 1.0 and found["c"].relative is None


def test_a_change_of_storage_is_told_though_values_are_equal():
  m = model.Model(None, {"a": jnp.ones(2)})
  (d,) = describe.differences(m, m.update({"a": jnp.ones(2, jnp.bfloat16)}))
  assert (d.relative, d.note) == (0.0, "equal values, float32 -> bfloat16")
