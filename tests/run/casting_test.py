# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.core import leaves, model, needs
from treesurgeon.run import casting

LOW = leaves.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))
M = model.Model("spec", {"w": jnp.ones(2), "i": jnp.ones(2, jnp.int32), "c": LOW})


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_source_is_cast_as_it_is_read(dtype):
  source = casting.Cast(M, dtype)
  assert isinstance(source, needs.Source)
  assert source.spec == "spec" and list(source.addresses()) == M.addresses()
  assert source.leaf("w").dtype == (dtype or "float32")
  assert source.leaf("i") is M.leaf("i")
  assert source.leaf("c") is LOW
  for address in M.addresses():
    have, want = source.struct(address), source.leaf(address)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), have) == jax.tree.map(
      lambda x: (x.shape, x.dtype), want
    )


def test_a_sink_is_cast_before_it_is_written():
  class Sink:
    def __init__(self):
      self.held = {}

    def done(self, address):
      return address in self.held

    def write(self, address, leaf):
      self.held[address] = leaf

  inner = Sink()
  sink = casting.CastSink(inner, "float16")
  assert not sink.done("w")
  sink.write("w", np.ones(2, np.float32))
  assert sink.done("w") and inner.held["w"].dtype == np.float16
