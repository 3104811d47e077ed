# SPDX-License-Identifier: Apache-2.0
"""The scan for NaN and Inf sees every one of them, of every float and sign, and nothing else."""

import ml_dtypes
import numpy as np
import pytest

from treesurgeon.io import blocks

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_words_are_judged_as_numpy_judges_them(dtype):
  words = np.random.default_rng(0).integers(0, 256, (4000, np.dtype(dtype).itemsize), np.uint8)
  values = words.view(dtype).reshape(-1)
  with np.errstate(invalid="ignore"):
    wanted = np.isfinite(values)
  assert 0 < wanted.sum()
  assert [blocks.finite(values[i : i + 1]) for i in range(len(values))] == wanted.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_value_anywhere_is_seen(dtype, bad, monkeypatch):
  monkeypatch.setattr(blocks, "_CHUNK", 7)
  top = float(ml_dtypes.finfo(dtype).max)
  for at in (0, 6, 7, 19):
    x = np.tile(np.array([0.0, -0.0, top, -top], dtype), 5)
    assert blocks.finite(x)
    x[at] = bad
    assert not blocks.finite(x)
  assert blocks.finite(np.zeros((0, 3), dtype))
