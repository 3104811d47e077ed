# SPDX-License-Identifier: Apache-2.0
"""Adapters on, off, and on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, model
from treesurgeon.io import writer


def low_rank(rows=4, cols=6, rank=2, scale=1 / 3, dtype=jnp.float32):
  a = jax.random.normal(jax.random.key(rank), (rows, rank), dtype)
  return leaves.LowRank(a, jnp.ones((rank, cols), dtype), scale)


@pytest.fixture
def m():
  w = jax.random.normal(jax.random.key(9), (3, 4, 6))
  return model.Model(None, {"layers": {"0:3": {"up": {"kernel": w}}}, "scale": jnp.ones(4)})


def test_strip_and_extract_undo_attach(m):
  lows = {"layers/2/up/kernel": low_rank(), "layers/0/up/kernel": low_rank(rank=1)}
  tuned = adapters.attach(m, lows)
  assert list(tuned.params["layers"]) == ["0:1", "1:2", "2:3"]
  found = adapters.extract(tuned)
  assert list(found) == ["layers/0/up/kernel", "layers/2/up/kernel"]
  for address, low in found.items():
    np.testing.assert_array_equal(low.a, lows[address].a)
    assert low.scale == lows[address].scale
  bare = adapters.strip(tuned)
  for address in m.addresses():
    np.testing.assert_array_equal(bare.leaf(address), m.leaf(address))
  assert adapters.extract(m) == {} and adapters.strip(m) is m


def test_a_sum_that_does_not_end_low_rank_has_no_adapter():
  total = leaves.Sum((jnp.ones((4, 6)), low_rank(), jnp.ones((4, 6))))
  assert adapters.split(total) == (total, None)


def test_attach_names_what_does_not_fit(m):
  with pytest.raises(
    ValueError, match=r"no address matches 'layers/9/up/kernel'; nearest: layers/"
  ):
    adapters.attach(m, {"layers/9/up/kernel": low_rank()})
  with pytest.raises(
    ValueError, match=r"layers/1/up/kernel: the adapter is \(5, 6\), the weight \(4, 6\)"
  ):
    adapters.attach(m, {"layers/1/up/kernel": low_rank(rows=5)})


def test_saved_alone_they_come_back_bit_for_bit(tmp_path):
  lows = {"layers/10/up/kernel": low_rank(), "layers/2/up/kernel": low_rank(dtype=jnp.bfloat16)}
  adapters.save(tmp_path / "out", lows)
  back = adapters.load(tmp_path / "out")
  assert list(back) == ["layers/2/up/kernel", "layers/10/up/kernel"]
  for address, low in back.items():
    assert low.scale == 1 / 3 and low.a.dtype == lows[address].a.dtype
    np.testing.assert_array_equal(low.a, lows[address].a)
    np.testing.assert_array_equal(low.b, lows[address].b)


def test_a_file_that_is_no_adapter_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no adapters to save"):
    adapters.save(tmp_path / "none", {})
  for name, tensors, message in (
    ("half", ["w/a"], r"tensor 'w/b' is missing"),
    ("more", ["w/a", "w/b", "w/scale", "w/c"], r"tensor 'w/c' is not part of an adapter"),
  ):
    with writer.Writer(tmp_path / name) as out:
      for tensor in tensors:
        out.write(tensor, np.ones((), np.float32) if tensor == "w/scale" else np.ones((2, 2)))
    with pytest.raises(ValueError, match=message):
      adapters.load(tmp_path / name)
