# SPDX-License-Identifier: Apache-2.0
"""The static cost of programs: what the compiler says, read right; aborts and refusals survived."""

import jax
import numpy as np
import pytest

from treesurgeon.kernels import devices, static_cost

PRODUCT = "treesurgeon.kernels.matmul.arg_specs:product"


def request(target="tpu-v5e", steps=0, **kwargs):
  shape = {"format": "bf16", "tokens": 256, "rows": 1024, "cols": 1024, "group_size": 128}
  kwargs = {**shape, "target": target, **kwargs}
  return static_cost.Request(PRODUCT, kwargs, target, steps)


def test_a_dense_product_costs_what_theory_says():
  (cost,) = static_cost.measure([request()])
  assert cost.error == "" and cost.source == "static: critical path" and cost.temp_bytes == 0
  moved = 2 * (256 * 1024 + 1024 * 1024 + 256 * 1024)
  assert cost.bytes == moved
  np.testing.assert_allclose(cost.memory_us, moved / 819e3)
  # 4 units of 128 x 128 at 1.5 GHz
  peak_us = 256 * 1024 * 1024 / (4 * 128 * 128 * 1500)
  assert peak_us < cost.compute_us < 1.3 * peak_us
  assert cost.predicted_us == max(cost.compute_us, cost.memory_us)


def test_what_does_not_compile_says_why_and_the_rest_goes_on():
  costs = static_cost.measure([request(tokens=-1), request(tokens=8)], profile=False)
  assert "Error" in costs[0].error and costs[0].cycles is None
  assert costs[1].error == "" and costs[1].source == "compiled"


def test_a_process_that_dies_costs_one_program(monkeypatch):
  calls = []

  def work(requests, flag):
    calls.append((len(requests), flag != ""))
    if len(calls) == 1:
      return [], "ERROR: Unknown command line flag 'x'"
    return ([static_cost.Cost(1)] if flag == "" or len(requests) == 3 else []), "Check failed: x"

  monkeypatch.setattr(static_cost, "_work", work)
  costs = static_cost.measure([request()] * 3)
  assert [c.cycles for c in costs] == [1, 1, 1]
  assert calls == [(3, True), (3, True), (1, False), (1, True), (1, False)]


@pytest.mark.parametrize("target", devices.DEVICES)
def test_devices_are_found(target):
  assert devices.find(target) is devices.DEVICES[target]


def test_unknown_devices_are_named(monkeypatch):
  with pytest.raises(ValueError, match=r"target='tpu-v9' is unknown; known are tpu-v5e, tpu-v5p"):
    devices.find("tpu-v9")
  assert devices.here() is None
  fake = type("Fake", (), {"device_kind": "TPU v6 lite"})
  monkeypatch.setattr(jax, "devices", lambda: [fake])
  assert devices.here() == "tpu-v6e"
