# SPDX-License-Identifier: Apache-2.0
"""GPTQ's codes agree with llm-compressor's on identical weights and Hessians.

`LLMCOMPRESSOR_PYTHON`, set by `make test-peers`, names the interpreter of llm-compressor's own
environment. Without it the committed codes are compared with, see `llmcompressor_codes.py`.
"""

import os
import pathlib
import runpy
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.quantize import gptq, rtn
from treesurgeon.compress.quantize import grid as grids

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "llmcompressor_codes.py"
PEER = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """Runs llm-compressor, or reads what it once found."""
  python, path = os.environ.get("LLMCOMPRESSOR_PYTHON"), HERE / "gptq_codes.npz"
  if python:
    path = tmp_path_factory.mktemp("peer") / "codes.npz"
    subprocess.run([python, str(SCRIPT), str(path)], check=True)
  with np.load(path) as file:
    return dict(file)


def error(w, h, codes, scales, zeros):
  """Computes tr(dWᵀ H dW) / tr(Wᵀ H W) in float64."""
  w, h = w.astype(np.float64), h.astype(np.float64)
  scales, zeros = (np.repeat(np.asarray(a, np.float64), PEER["GROUP"], 0) for a in (scales, zeros))
  wrong = (np.asarray(codes, np.float64) - zeros) * scales - w
  return np.einsum("ic,ij,jc->", wrong, h, wrong) / np.einsum("ic,ij,jc->", w, h, w)


@pytest.mark.parametrize("case", PEER["CASES"], ids=PEER["name"])
def test_codes_and_error(case, theirs):
  w, h = PEER["problem"](case["problem"])
  codes, scales, zeros = (theirs[f"{PEER['name'](case)}/{k}"] for k in ("codes", "scales", "zeros"))
  form = {"bits": case["bits"], "group_size": PEER["GROUP"], "symmetric": case["symmetric"]}
  solve = jax.jit(lambda w, h: gptq.quantize(w, h, **form, act_order=case["act_order"]))
  ours = solve(jnp.asarray(w), jnp.asarray(h))
  np.testing.assert_allclose(ours.grid.scales, scales, rtol=1e-6)
  if not case["symmetric"]:
    assert np.mean(np.asarray(ours.grid.zeros) == zeros) >= 0.99
  assert ours.group_index is None
  # One tie broken otherwise may change all that follows in its column, one of a hundred.
  same = np.asarray(ours.codes) == codes
  assert same.mean() >= 0.998 or (~same.all(axis=0)).sum() == 1
  mine = error(w, h, ours.codes, ours.grid.scales, zeros)
  np.testing.assert_allclose(mine, error(w, h, codes, scales, zeros), rtol=2e-3)
  nearest, grid = rtn.quantize(jnp.asarray(w), **form)
  assert mine < 0.9 * error(w, h, nearest, grid.scales, zeros)
  wide = grids.spread(ours.grid, group_size=PEER["GROUP"], rows=len(w))
  dense = np.asarray(grids.dequantize(ours.codes, wide, bits=case["bits"]))
  assert np.abs(dense - w).max() < 4 * scales.max()
