# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.io import tokenizer
from treesurgeon.run import calibration

HOW = {"length": 4, "samples": 8, "batch": 3, "vocab_size": 257}


def cut(text, **how):
  return calibration.batches(text, tokenizer.ByteTokenizer(), **{**HOW, **how})


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 200), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5))
def test_rows_are_disjoint_runs_of_the_text(size, length, samples, batch):
  length = min(length, size)
  text = "".join(chr(97 + i % 26) for i in range(size))
  found = cut(text, length=length, samples=samples, batch=batch)
  rows = np.concatenate(found)
  assert rows.dtype == np.int32
  assert len(rows) == min(samples, size // length)
  assert [len(b) for b in found[:-1]] == [batch] * (len(found) - 1)
  all_rows = np.frombuffer(text.encode(), np.uint8)[: size // length * length].reshape(-1, length)
  assert all(any((r == a).all() for a in all_rows) for r in rows)
  assert (rows[0] == all_rows[0]).all()
  if len(rows) > 1:
    assert (rows[-1] == all_rows[-1]).all()


def test_a_text_shorter_than_a_sequence_is_refused():
  with pytest.raises(ValueError, match=r"x.txt has 3 tokens, fewer than one sequence of 4; give"):
    cut("abc", source="x.txt")
  with pytest.raises(ValueError, match="the calibration text has 0 tokens"):
    cut("")


def test_a_token_outside_the_vocabulary_is_refused():
  with pytest.raises(ValueError, match=r"has the token 122, the model's vocabulary ends at 99"):
    cut("zzzz", vocab_size=100)
