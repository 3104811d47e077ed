# SPDX-License-Identifier: Apache-2.0
"""Blocks that tuning found: how they are looked up, what is no such file, and the search."""

import json

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from treesurgeon import kernels
from treesurgeon.experiments import tune_kernels
from treesurgeon.kernels import devices, tuning
from treesurgeon.kernels.matmul import arg_specs, tpu

CASE = tune_kernels.Case("int4", 16, 1024, 1024, "tpu-v5e")


def name_of(case):
  leaf = case.leaf()
  return tuning.case_of(leaf.layout, leaf.width, 128, case.tokens, case.rows, case.cols)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
  return tmp_path


def test_a_recorded_block_is_taken_for_its_tokens_only(folder):
  found = {"source": "static", "matmul": {name_of(CASE): {"block": [16, 512]}}}
  (folder / "tpu-v5e.json").write_text(json.dumps(found))
  leaf = CASE.leaf()
  assert tpu.blocks(16, leaf) == (16, 512) != tpu.rule(16, leaf)
  assert tpu.blocks(9, leaf) == (9, 512)
  assert tpu.blocks(17, leaf) == tpu.rule(17, leaf)


def test_the_block_does_not_change_the_product(folder):
  x, leaf = arg_specs.operands(arg_specs.ArgSpec(16, 256, 256, 4, 128), jax.random.key(0))
  ready = kernels.prepare(leaf, target="tpu-v5e")
  case = tuning.case_of(ready.layout, 4, 128, 16, 256, 256)
  found = {"source": "static", "matmul": {case: {"block": [8, 256]}}}
  (folder / "tpu-v5e.json").write_text(json.dumps(found))
  assert tpu.blocks(16, ready) == (8, 256) != tpu.rule(16, ready)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    got = tpu.matmul(x, ready)
    expected = tpu.matmul(x, ready, block=tpu.rule(16, ready))
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"matmul": {"a": {}}}', '{"m": {"a": {"block": [0]}}}']
)
def test_another_file_is_refused(folder, text):
  (folder / "tpu-v5p.json").write_text(text)
  with pytest.raises(ValueError, match="tpu-v5p.json is not a file of block sizes"):
    tuning.lookup("tpu-v5p", "matmul", "any")


def test_shipped_files_are_read():
  for path in tuning.FOLDER.glob("*.json"):
    assert path.stem in {*devices.DEVICES, *devices.GPUS}
    assert tuning.load(path.stem)["source"]


def test_the_search_records_what_beats_the_rule(monkeypatch):
  costs = {}

  def fake(case, blocks):
    costs[case] = [10.0, *(5.0 + i for i in range(len(blocks) - 1))]
    return costs[case]

  monkeypatch.setattr(tune_kernels, "static_costs", fake)
  found = tune_kernels.tune([CASE], "tpu-v5e")
  block = list(tune_kernels.candidates(CASE))[1]
  assert found["matmul"] == {name_of(CASE): {"block": list(block), "us": 5.0, "rule_us": 10.0}}
  assert found["source"].startswith("static")


def test_candidates_fit_the_kernel():
  for target in devices.DEVICES:
    case = tune_kernels.Case("int8", 1, 4096, 14336, target)
    blocks = list(tune_kernels.candidates(case))
    assert blocks[0] == tpu.rule(1, case.leaf()) and len(set(blocks)) == len(blocks) > 1
    assert all(width <= tpu.widest(case.leaf()) for _, width in blocks)
