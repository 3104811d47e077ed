# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.train import data


def numbered(n, width=3, start=0):
  return (start + np.arange(n * width, dtype=np.int32)).reshape(n, width)


def take(stream, n):
  return [b.tolist() for b in itertools.islice(iter(stream), n)]


@settings(max_examples=50, deadline=None)
@given(
  documents=st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=6),
  length=st.integers(1, 7),
)
def test_pack_predicts_every_token_once_in_order(documents, length):
  stream = [t for d in documents if d for t in [*d, 0]]
  if len(stream) < length + 1:
    with pytest.raises(ValueError, match="is empty|shorter than one sequence"):
      data.pack(documents, length=length, eos=0)
    return
  rows = data.pack(documents, length=length, eos=0)
  assert rows.dtype == np.int32 and rows.shape[1] == length + 1
  flat = [int(t) for r in rows for t in r[1:]]
  assert flat == stream[1 : 1 + len(flat)]
  assert len(stream) - 1 - len(flat) < length
  assert [int(r[0]) for r in rows] == stream[: len(flat) : length]


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order():
  stream = iter(data.batches(numbered(12), batch=4, seed=3))
  epochs = [[r[0] for _ in range(3) for r in next(stream).tolist()] for _ in range(2)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == numbered(12)[:, 0].tolist()
  assert epochs[0] != epochs[1]


def test_order_depends_on_the_seed_alone():
  rows = numbered(30)
  one = take(data.batches(rows, batch=4, seed=1), 5)
  assert one == take(data.batches(rows, batch=4, seed=1), 5)
  assert one != take(data.batches(rows, batch=4, seed=2), 5)


@pytest.mark.parametrize("sources", [numbered(10), {"a": numbered(10), "b": numbered(7)}])
def test_iterator_resumes_exactly(sources):
  first = iter(data.batches(sources, batch=3, seed=5))
  for _ in range(4):
    next(first)
  state = first.get_state()
  rest = [next(first).tolist() for _ in range(5)]
  second = iter(data.batches(sources, batch=3, seed=5))
  second.set_state(state)
  assert [next(second).tolist() for _ in range(5)] == rest


def test_mixture_keeps_its_weights():
  sources = {"code": numbered(50), "prose": numbered(50, start=1000)}
  rows = np.concatenate(
    list(itertools.islice(data.batches(sources, batch=8, weights={"code": 3, "prose": 1}), 20))
  )
  assert (rows[:, 0] < 1000).mean() == pytest.approx(0.75, abs=0.02)


def test_processes_share_one_global_batch():
  rows = numbered(24)
  whole = take(data.batches(rows, batch=6), 4)
  parts = [take(data.batches(rows, batch=6, shard=(i, 3)), 4) for i in range(3)]
  assert [sum(p, []) for p in zip(*parts, strict=True)] == whole


def test_epochs_end():
  assert len(take(data.batches(numbered(10), batch=4, epochs=2), 99)) == 5


def test_rows_use_tokenizers_of_either_kind():
  class Encoding:
    def __init__(self, ids):
      self.ids = ids

  class Fast:
    def encode_batch(self, texts, add_special_tokens):
      assert not add_special_tokens
      return [Encoding(list(t.encode())) for t in texts]

  class Plain:
    def encode(self, text):
      return list(text.encode())

  fast, plain = (data.rows(["abc", "de"], t, length=2, eos=0) for t in (Fast(), Plain()))
  assert fast.tolist() == plain.tolist() == [[97, 98, 99], [99, 0, 100], [100, 101, 0]]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: data.pack([], length=2, eos=0), "text is empty: 0 documents"),
    (lambda: data.pack([[], []], length=2, eos=0), "text is empty: 2 documents"),
    (lambda: data.pack([[1, 2]], length=8, eos=0), r"3 tokens .* length=8 needs 9; .* at most 2"),
    (lambda: data.pack([[1]], length=0, eos=0), "length must be at least 1"),
    (lambda: data.batches(numbered(3), batch=4, epochs=1), "3 rows do not fill one batch of 4"),
    (lambda: data.batches({}, batch=4), "no source of rows"),
    (lambda: data.batches(np.zeros((0, 3), np.int32), batch=1), "must hold rows of tokens"),
    (
      lambda: data.batches({"a": numbered(3), "b": numbered(3, 4)}, batch=1),
      "agree in row length; they have {'a': 3, 'b': 4}",
    ),
    (lambda: data.batches(numbered(3), batch=3, shard=(0, 2)), "batch=3 is not divisible by 2"),
    (lambda: data.batches(numbered(3), batch=2, shard=(2, 2)), r"shard=\(2, 2\)"),
    (
      lambda: data.batches({"a": numbered(3)}, batch=1, weights={"b": 1.0}),
      r"weights are for \['b'\]; the domains are \['a'\]",
    ),
    (
      lambda: data.batches({"a": numbered(3)}, batch=1, weights={"a": 0.0}),
      "weights must be positive",
    ),
    (
      lambda: data.batches({"a": numbered(3), "b": numbered(3)}, batch=1, epochs=1),
      "epochs=1 has no meaning for a mixture of 2",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
