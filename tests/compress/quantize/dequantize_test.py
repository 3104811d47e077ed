# SPDX-License-Identifier: Apache-2.0
"""Dense leaves hold the values of the codes; what is quantized is not quantized again unasked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import leaves, model
from treesurgeon.run import drivers

SPEC = models.Spec(vocab_size=11, d_model=8, num_layers=2, num_heads=2, d_ff=16)
FOUR = "compress.quantize.rtn(bits=4, group_size=8)"


def quantized():
  m = model.Model(SPEC, models.init(SPEC, jax.random.key(0), jnp.bfloat16))
  return drivers.run(registry.parse(FOUR), m)


def test_values_stay():
  m = quantized()
  plain = drivers.run(registry.parse("compress.quantize.dequantize(select='layers/1/.*')"), m)
  for address in m.addresses():
    old, new = m.leaf(address), plain.leaf(address)
    assert leaves.is_leaf(new) == (address.startswith("layers/0/") and address.endswith("kernel"))
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaves.dense(new), leaves.dense(old))


class Memory(dict):
  """A sink."""

  def done(self, address):
    del address
    return False

  def write(self, address, leaf):
    self[address] = leaf


@pytest.mark.parametrize(
  "go",
  [
    drivers.run,
    drivers.run_blockwise,
    lambda t, m: drivers.stream(t, m, Memory()),
    lambda t, m: drivers.stream_blocks(t, m, Memory()),
  ],
  ids=["run", "run_blockwise", "stream", "stream_blocks"],
)
def test_a_quantized_leaf_is_refused_unless_it_stays(go):
  m = quantized()
  other = "compress.quantize.rtn(bits=3, group_size=8)"
  told = r"layers/0/attn/k/kernel is quantized already, int4 .*, and .*bits=3.* would round it "
  told += r"once more; leave it out of `select`, or chain compress.quantize.dequantize\(\) before"
  with pytest.raises(ValueError, match=told):
    go(registry.parse(other), m)
  with pytest.raises(ValueError, match="layers/1/mlp/up/kernel is quantized already"):
    first = registry.parse("compress.quantize.rtn(bits=4, group_size=8, select='layers/1/mlp/.*')")
    plain = drivers.run(registry.parse("compress.quantize.dequantize()"), m)
    go(first + registry.parse("compress.quantize.rtn(bits=2, select='.*/up/kernel')"), plain)
  go(registry.parse(FOUR), m)  # its fixed point
  go(registry.parse("compress.quantize.dequantize() + " + other), m)
