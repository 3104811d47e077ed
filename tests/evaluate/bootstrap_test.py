# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from treesurgeon.evaluate import bootstrap


def draw(rng, n, mean=2.0):
  counts = rng.integers(50, 200, n)
  return [(float(c * (mean + 0.3 * rng.standard_normal())), int(c)) for c in counts]


def test_value_is_the_ratio_of_sums():
  got = bootstrap.interval([(3.0, 1), (1.0, 3)])
  assert got.value == 1.0
  assert got.low <= got.value <= got.high


def test_width_agrees_with_the_delta_method():
  documents = draw(np.random.default_rng(0), 400)
  t, n = np.array(documents).T
  mean = t.sum() / n.sum()
  spread = np.sqrt(((t - mean * n) ** 2).sum()) / n.sum()
  got = bootstrap.interval(documents, resamples=4000)
  assert (got.high - got.low) / 2 == pytest.approx(1.96 * spread, rel=0.1)


def test_covers_the_truth_about_as_often_as_it_says():
  rng = np.random.default_rng(1)
  hits = 0
  for i in range(100):
    got = bootstrap.interval(draw(rng, 60), level=0.9, resamples=300, seed=i)
    hits += got.low <= 2.0 <= got.high
  assert 80 <= hits <= 98


def test_pairing_removes_what_documents_share():
  rng = np.random.default_rng(2)
  a = draw(rng, 200)
  b = [(t + 0.01 * n, n) for t, n in a]
  got = bootstrap.paired_difference(a, b)
  assert got.value == pytest.approx(-0.01)
  assert got.high - got.low < 1e-9
  alone = bootstrap.interval(a)
  assert alone.high - alone.low > 0.01


def test_is_deterministic_and_independent_of_chunks(monkeypatch):
  documents = draw(np.random.default_rng(3), 50)
  whole = bootstrap.interval(documents, resamples=100)
  assert whole == bootstrap.interval(documents, resamples=100)
  monkeypatch.setattr(bootstrap, "CHUNK", 500)
  assert bootstrap.interval(documents, resamples=100) == whole


def test_documents_without_tokens_are_left_out():
  base = [(2.0, 1), (3.0, 2)]
  assert bootstrap.interval([*base, (0.0, 0)]) == bootstrap.interval(base)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: bootstrap.interval([(1.0, 1)]), "1 documents .* give at least 2"),
    (lambda: bootstrap.interval([(1.0, 1)] * 2, level=9.5), "level=9.5 must lie strictly between"),
    (lambda: bootstrap.interval([(1.0, 1)] * 2, resamples=0), "resamples=0"),
    (lambda: bootstrap.paired_difference([(1.0, 1)] * 2, [(1.0, 1)]), "models have 2 and 1"),
    (
      lambda: bootstrap.paired_difference([(1.0, 1)] * 3, [(1.0, 1), (0.0, 0), (1.0, 1)]),
      "document 1 was scored by one",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
