# SPDX-License-Identifier: Apache-2.0
"""Merging: what is folded, what is refused, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import adapt
from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, model, step


def low_rank(rows, cols, rank=2, scale=0.5, seed=0, dtype=jnp.float32):
  a, b = jax.random.split(jax.random.key(seed))
  return leaves.LowRank(
    jax.random.normal(a, (rows, rank), dtype), jax.random.normal(b, (rank, cols), dtype), scale
  )


def four_bits(rows=4, cols=6):
  codes = jnp.arange(rows // 2 * cols, dtype=jnp.uint8).reshape(rows // 2, cols)
  return leaves.QuantizedTensor(codes, jnp.ones((1, cols)), None, None, rows, cols, 4, rows)


@pytest.fixture
def m():
  w = jax.random.normal(jax.random.key(9), (2, 4, 6))
  return model.Model(None, {"layers": {"0:2": {"up": {"kernel": w}}}, "scale": jnp.ones(4)})


def merge(m, **arguments):
  (one,) = adapt.merge(**arguments)
  return one.apply(m, {}, jax.random.key(0))


def test_merge_is_the_formula_in_float64_and_keeps_the_dtype(m):
  for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
    base = m.replace(params=jax.tree.map(lambda x: x.astype(dtype), m.params))  # noqa: B023
    lows = {f"layers/{i}/up/kernel": low_rank(4, 6, seed=i) for i in range(2)}
    merged = merge(adapters.attach(base, lows))
    for address, low in lows.items():
      w, a, b = (np.asarray(x, np.float64) for x in (base.leaf(address), low.a, low.b))
      got = merged.leaf(address)
      assert isinstance(got, jax.Array) and got.dtype == dtype
      np.testing.assert_allclose(
        np.asarray(got, np.float64), w + 0.5 * a @ b, rtol=tolerance, atol=tolerance
      )
    assert list(merged.params["layers"]) == ["0:2"]


def test_nothing_to_merge_changes_nothing(m):
  merged = merge(m)
  np.testing.assert_array_equal(merged.leaf("layers/1/up/kernel"), m.leaf("layers/1/up/kernel"))
  assert merged.params["scale"] is m.params["scale"]


def test_selected_leaves_only_and_stacked_adapters_together(m):
  address = "layers/1/up/kernel"
  both = [low_rank(4, 6, seed=1), low_rank(4, 6, rank=3, seed=2)]
  tuned = adapters.attach(m, {address: both[0], "layers/0/up/kernel": both[0]})
  tuned = adapters.attach(tuned, {address: both[1]})
  merged = merge(tuned, select="layers/1/.*")
  want = m.leaf(address) + both[0].dense() + both[1].dense()
  np.testing.assert_allclose(merged.leaf(address), want, atol=1e-6)
  assert list(adapters.extract(merged)) == ["layers/0/up/kernel"]


def test_a_compressed_base_is_refused_unless_dense_is_asked_for(m):
  tuned = adapters.attach(
    m.update({"layers/0/up/kernel": four_bits()}), {"layers/0/up/kernel": low_rank(4, 6)}
  )
  with pytest.raises(
    ValueError, match=r"layers/0/up/kernel: adapt.merge cannot fold .* QuantizedTensor .*dense=True"
  ):
    merge(tuned)
  assert merge(tuned, select="layers/1/.*").leaf("layers/1/up/kernel").shape == (4, 6)
  aimed = step.by_path([("layers/0/.*", adapt.merge())])
  with pytest.raises(ValueError, match="layers/0/up/kernel: adapt.merge"):
    aimed[0].apply(tuned, {}, jax.random.key(0))
  got = merge(tuned, dense=True).leaf("layers/0/up/kernel")
  want = leaves.dense(four_bits()) + low_rank(4, 6).dense()
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_compressed_leaf_without_adapter_is_left_alone(m):
  small = m.update({"layers/0/up/kernel": four_bits()})
  assert isinstance(merge(small).leaf("layers/0/up/kernel"), leaves.QuantizedTensor)


def test_unmerge_undoes_merge(m):
  lows = {f"layers/{i}/up/kernel": low_rank(4, 6, seed=i) for i in range(2)}
  tuned = adapters.attach(m, lows)
  back = adapters.unmerge(merge(tuned), lows)
  assert list(adapters.extract(back)) == list(lows)
  for address in lows:
    np.testing.assert_allclose(
      adapters.strip(back).leaf(address), m.leaf(address), rtol=1e-6, atol=1e-6
    )
  with pytest.raises(ValueError, match="cannot subtract an adapter from a Sum"):
    adapters.unmerge(tuned, lows)
