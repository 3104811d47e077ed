# SPDX-License-Identifier: Apache-2.0
"""The benchmark of decoding: what one chip holds of a large model, and a measured row."""

import jax
import pytest

from treesurgeon import models
from treesurgeon.experiments import bench_decode
from treesurgeon.kernels import devices, static_cost


@pytest.mark.parametrize("name", list(bench_decode.LLAMAS))
def test_eight_shares_are_the_model(name):
  chips, llama = bench_decode.CHIPS, bench_decode.LLAMAS[name]
  whole, one = llama.spec(1), llama.spec(chips)
  count = lambda spec: sum(
    x.size
    for path, x in jax.tree.leaves_with_path(
      jax.eval_shape(lambda key: models.init(spec, key), jax.random.key(0))
    )
    if "scale" not in jax.tree_util.keystr(path)  # every chip has all norms
  )
  assert chips * count(one) == count(whole)
  assert one.head_dim == whole.head_dim == 128
  assert count(whole) == pytest.approx({"llama-7b": 6.74e9, "llama-70b": 68.98e9}[name], rel=1e-3)


def test_packed_weights_are_as_small_as_their_bits():
  held = {}
  for format in ("bf16", "int8", "int4", "int2"):
    _, params, _ = bench_decode.shapes("llama-70b", format, 8, 1024, "tpu-v6e")
    held[format] = bench_decode.held(params["layers"])
  for format, bits in (("int8", 8), ("int4", 4), ("int2", 2)):
    # Scales are bfloat16, one for 128 weights; rows and groups are filled up to whole steps.
    assert held[format] / held["bf16"] == pytest.approx((bits + 16 / 128) / 16, rel=0.1)


def test_a_row_is_measured():
  spec = models.Spec(vocab_size=32, d_model=128, num_layers=1, num_heads=1, d_ff=128)
  row = bench_decode.measure(spec, "int4, 2-bit cache", context=8, new=8)
  assert row["tokens_per_s"] > 0 and row["source"] == "measured"
  dense = bench_decode.measure(spec, "bf16", context=8, new=8)
  assert row["weight_bytes"] < dense["weight_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
def test_a_chips_share_compiles_and_fits(target):
  kwargs = {"name": "llama-7b", "format": "int4", "batch": 8, "context": 1024, "target": target}
  program = "treesurgeon.experiments.bench_decode:decode_step"
  request = static_cost.Request(program, kwargs, target, donate=(0,))
  (cost,) = static_cost.measure([request], profile=False)
  assert not cost.error
  _, params, cache = bench_decode.shapes("llama-7b", "int4", 8, 1024, target)
  total = bench_decode.held(params) + bench_decode.held(cache) + cost.temp_bytes
  assert total < devices.find(target).memory / 8
  # No copy of the cache, nor of the codes.
  assert cost.temp_bytes < bench_decode.held(cache) / 4
