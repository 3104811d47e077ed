# SPDX-License-Identifier: Apache-2.0
"""Preparing for a device loses nothing: bit for bit back, and the same when done again."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon import kernels
from treesurgeon.core import formats, leaves
from treesurgeon.kernels import devices
from treesurgeon.kernels.matmul import arg_specs, arrange, layouts, prepared

KEY = jax.random.key(0)
SIZES = (16, 32, 64, 128, 256, 384)


def draw(rows=300, cols=5, bits=4, group_size=128, symmetric=True, format="int"):
  spec = arg_specs.ArgSpec(2, rows, cols, bits, group_size, symmetric)
  if format == "int":
    return arg_specs.operands(spec, KEY)[1]
  leaf = arg_specs.quantized(spec, format)
  high = 243 if format == "ternary" else 256  # five trits fill a byte to 242
  codes = jax.random.randint(KEY, leaf.codes.shape, 0, high).astype(jnp.uint8)
  if format == "ternary":  # what pads the last byte stands for zero
    codes = formats.pack_trits(formats.unpack_trits(codes, rows=rows))
  elif rows % 8:
    codes = codes.at[-1].set(codes[-1] & (2 ** (rows % 8) - 1))
  scales = jax.random.uniform(KEY, leaf.scales.shape)
  return dataclasses.replace(leaf, codes=codes, scales=scales)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@settings(max_examples=6, deadline=None)
@given(
  rows=st.integers(1, 900),
  bits=st.integers(1, 8),
  group_size=st.sampled_from((*SIZES, 10_000)),
  symmetric=st.booleans(),
  scales=st.sampled_from(["float32", "bfloat16", "float16"]),
  zeros=st.sampled_from(["uint8", "float32"]),
  target=st.sampled_from(sorted(devices.DEVICES)),
)
def test_restoring_is_exact(rows, bits, group_size, symmetric, scales, zeros, target):
  leaf = draw(rows, 3, bits, group_size, symmetric)
  leaf = dataclasses.replace(
    leaf,
    scales=leaf.scales.astype(scales),
    zeros=None if leaf.zeros is None else leaf.zeros.astype(zeros),
  )
  ready = kernels.prepare(leaf, target=target)
  assert isinstance(ready, prepared.PreparedTensor) and ready.shape == leaf.shape
  same(ready.restore(), leaf)
  same(ready.dense(), leaf.dense())


@pytest.mark.parametrize(("format", "bits"), [("ternary", 2), ("sign", 1)])
def test_formats_of_few_values_are_restored(format, bits):
  leaf = draw(333, 4, bits, format=format)
  ready = kernels.prepare(leaf, target="tpu-v6e")
  assert ready.layout == "gs32"
  same(ready.restore(), leaf)


@pytest.mark.parametrize(
  ("format", "bits", "width"),
  [("e2m1", 4, 5), ("e2m3", 6, 7), ("pow2", 3, 5), ("shift", 3, 5)],
)
@pytest.mark.parametrize("rows", [128, 300])
def test_multiples_of_one_number_keep_their_values(format, bits, width, rows):
  leaf = dataclasses.replace(draw(rows, 3, bits, 32), format=format)
  ready = kernels.prepare(leaf, target="tpu-v5e")
  assert ready.width == width
  again = ready.restore()
  same(again.dense() + 0.0, leaf.dense() + 0.0)  # minus zero is a zero
  changed = np.asarray(again.integers() != leaf.integers())
  assert not np.asarray(leaf.dense())[changed].any()


def test_preparing_again_changes_nothing_and_for_another_device_rearranges():
  leaf = draw()
  one = kernels.prepare(leaf, target="tpu-v5e")
  assert kernels.prepare(one, target="tpu-v5e") is one
  other = kernels.prepare(one, target="tpu-v6e")
  assert (one.layout, other.layout) == ("gs32", "native")
  same(other, kernels.prepare(leaf, target="tpu-v6e"))


def test_stacked_layers_are_arranged_one_by_one():
  one, two = draw(bits=3), draw(bits=3, cols=5)
  stacked = jax.tree.map(lambda a, b: jnp.stack([a, b])[None], one, two)
  ready = kernels.prepare(stacked, target="tpu7x")
  assert ready.shape == (1, 2, 300, 5)
  same(ready.restore(), stacked)
  same(jax.tree.map(lambda a: a[0, 1], ready), kernels.prepare(two, target="tpu7x"))


def test_trees_and_sums_are_walked():
  leaf = draw()
  total = leaves.Sum((leaf, leaves.LowRank(jnp.ones((300, 1)), jnp.ones((1, 5)))))
  tree = {"a": total, "b": jnp.ones(2), "c": leaves.ActivationQuantized(leaf, None)}
  ready = kernels.prepare(tree, target="tpu-v5e")
  assert isinstance(ready["a"].parts[0], prepared.PreparedTensor)
  assert ready["c"].weight.layout == "gs8"
  same(kernels.restore(ready), tree)
  again = kernels.prepare(ready, target="tpu-v5e")
  assert again["a"].parts[0] is ready["a"].parts[0]
  same(again, ready)
  other = kernels.prepare(ready, target="tpu7x")  # it has no faster integers
  assert (other["c"].weight.layout, other["c"].weight.inputs) == ("native", "bfloat16")


def test_quantized_inputs_that_no_kernel_takes():
  dense = leaves.ActivationQuantized(jnp.ones((4, 2)), None)
  odd = leaves.ActivationQuantized(draw(group_size=3), None)
  for leaf in (dense, odd):
    assert kernels.prepare(leaf, target="tpu-v5e").weight is leaf.weight


def test_what_no_kernel_takes_stays_and_is_told_once(caplog):
  arrange._say.cache_clear()
  leaf = draw(group_size=3)
  with caplog.at_level(logging.WARNING):
    assert kernels.prepare(leaf, target="tpu-v5e") is leaf
    assert kernels.prepare(leaf, target="tpu-v5e") is leaf
  reason = "it takes groups of 4 rows or more for codes of 4 bits, not 3"
  assert [r.message for r in caplog.records] == [f"some kernels stay in plain XLA: {reason}"]


def test_reasons():
  index = jnp.zeros((1, 300), jnp.int32)
  plain = draw()
  for leaf, reason in (
    (dataclasses.replace(draw(bits=8), format="rf8"), "no codes for format 'rf8'"),
    (dataclasses.replace(plain, group_index=index), "with up to 128 rows a group, not 300"),
    (draw(group_size=2), "groups of 4 rows or more for codes of 4 bits, not 2"),
    (leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3))), "not LowRank"),
  ):
    assert reason in arrange.unsupported(leaf)
  for leaf, reason in (
    (dataclasses.replace(plain, format="nf"), "no codes for format 'nf'"),
    (dataclasses.replace(plain, group_index=index), "not a group_index"),
    (dataclasses.replace(plain, group_cols=2), "groups of rows with plain scales"),
    (draw(group_size=40), "not 40"),
    (dataclasses.replace(plain, rows=9000, group_size=8192), "up to 6144 rows or of all, not 8192"),
  ):
    assert reason in arrange.unsupported(leaf, target="gpu-sm90")


def test_files_do_not_take_it():
  ready = kernels.prepare(draw(), target="tpu-v5e")
  with pytest.raises(ValueError, match="PreparedTensor has no form in files.*restore gives back"):
    leaves.to_parts(ready)


def test_other_platforms_need_nothing():
  leaf = draw()
  assert kernels.prepare(leaf) is leaf
  with pytest.raises(ValueError, match="target='h200' is unknown"):
    kernels.prepare(leaf, target="h200")


def test_long_groups_of_narrow_codes_go_as_bytes():
  assert arrange.arrangement(10_000, 1, 640, "tpu-v6e")[0] == "native"


@pytest.mark.parametrize("target", devices.DEVICES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_steps_cover_the_rows_with_little_filling(width, target):
  for rows in (1, 128, 4096, 11008, 14336, 28672):
    for size in (32, 128, 640, rows):
      layout, step, steps = arrange.arrangement(rows, width, size, target)
      assert step <= arrange.MOST_UNITS and step * steps * 128 >= rows
      units = -(-rows // 128)
      fields = layouts.tile(layout, width)[0]
      assert step % fields == 0 and (size >= rows or size <= 128 or step % (size // 128) == 0)
      if size <= 128 and units >= 32:
        assert step * steps <= 1.12 * units
