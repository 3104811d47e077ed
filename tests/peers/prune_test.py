# SPDX-License-Identifier: Apache-2.0
"""SparseGPT and Wanda keep what llm-compressor keeps, at the same error.

`LLMCOMPRESSOR_PYTHON`, set by `make test-peers`, names the interpreter of llm-compressor's own
environment. Without it the committed masks are compared with, see `llmcompressor_masks.py`.
"""

import functools
import os
import pathlib
import runpy
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon.compress.prune import sparsegpt, wanda

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "llmcompressor_masks.py"
PEER = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """Runs llm-compressor, or reads what it once found."""
  python, path = os.environ.get("LLMCOMPRESSOR_PYTHON"), HERE / "prune_masks.npz"
  if python:
    path = tmp_path_factory.mktemp("peer") / "masks.npz"
    subprocess.run([python, str(SCRIPT), str(path)], check=True)
  with np.load(path) as file:
    return dict(file)


@pytest.mark.parametrize("case", PEER["CASES"], ids=PEER["name"])
def test_mask_and_error(case, theirs):
  w, h = PEER["problem"](case["problem"])
  form = {"sparsity": case["sparsity"], "pattern": case["pattern"]}
  method, evidence = wanda.prune, np.diag(h)
  if case["method"] == "sparsegpt":
    method, evidence = sparsegpt.prune, h
    form["sparsity"] += 1.5 / (128 * w.shape[1])  # of every block they prune one weight more
  ours = jax.jit(functools.partial(method, **form))(jnp.asarray(w), jnp.asarray(evidence))
  kept = np.unpackbits(theirs[f"{PEER['name'](case)}/kept"], count=w.size).reshape(w.shape)
  assert np.mean((np.asarray(ours) != 0) == kept) >= (1 if case["method"] == "wanda" else 0.9999)
  mine = PEER["error"](w, h, ours)
  np.testing.assert_allclose(mine, theirs[f"{PEER['name'](case)}/error"], rtol=2e-5)
  if case["method"] == "sparsegpt" and case["pattern"] is None:
    small = np.where(np.abs(w) < np.quantile(np.abs(w), case["sparsity"]), 0, w)
    assert mine < 0.95 * PEER["error"](w, h, small)
