# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest

from treesurgeon.core import leaves
from treesurgeon.core import model as model_lib
from treesurgeon.evaluate import size


def test_counts_dense_and_compressed_leaves():
  packed = leaves.QuantizedTensor(
    codes=jnp.zeros((8, 4), jnp.uint8),
    scales=jnp.zeros((2, 4), jnp.float16),
    zeros=None,
    group_index=None,
    rows=16,
    cols=4,
    bits=4,
    group_size=8,
  )
  got = size.in_memory(model_lib.Model(None, {"a": jnp.zeros((3, 2), jnp.bfloat16), "b": packed}))
  assert got.parameters == 6 + 64
  assert got.nbytes == 12 + 32 + 16
  assert got.bits_per_weight == pytest.approx(60 * 8 / 70)
  assert got.compressed_parameters == 64
  assert got.compressed_bits_per_weight == pytest.approx(48 * 8 / 64)
  assert got.to_json()["nbytes"] == 60


def test_shapes_will_do_and_nothing_compressed_is_none():
  params = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
  got = size.in_memory(model_lib.Model(None, params))
  assert got.nbytes == 64 and got.compressed_bits_per_weight is None


def test_disk(tmp_path):
  (tmp_path / "inside").mkdir()
  (tmp_path / "inside" / "a.safetensors").write_bytes(b"1234")
  (tmp_path / "b.json").write_bytes(b"12")
  assert size.on_disk(tmp_path) == 6
  assert size.on_disk(tmp_path, pattern="*.safetensors") == 4
  assert size.on_disk(tmp_path / "b.json") == 2
  with pytest.raises(ValueError, match="does not exist"):
    size.on_disk(tmp_path / "absent")
