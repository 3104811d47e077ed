# SPDX-License-Identifier: Apache-2.0
"""Host arrays in pieces give what whole arrays give, to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon import registry
from treesurgeon.core import model, pieces, trim
from treesurgeon.io import raw
from treesurgeon.run import collect, drivers

RNG = np.random.default_rng(0)


def test_what_is_cut():
  assert pieces.bounds(np.zeros((10, pieces.SIZE // 4), np.int8), ())[:2] == [(0, 4), (4, 8)]
  assert pieces.bounds(np.zeros(pieces.SIZE - 1, np.int8), ()) is None
  assert pieces.bounds(jnp.zeros(2 * pieces.SIZE, jnp.int8), ()) is None
  both = np.zeros(2 * pieces.SIZE, np.int8), jnp.zeros(2 * pieces.SIZE, jnp.int8)
  assert pieces.bounds(both[0], [both[1]]) is None


class Memory(dict):
  def done(self, address):
    return address in self

  def write(self, address, leaf):
    self[address] = leaf


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
  "text",
  [
    "merge.linear(weights=(0.5, 0.3, -0.2))",
    "merge.task_arithmetic(lam=0.7, weights=(0.3, 0.9), normalize=True)",
    "merge.ties(density=0.3)",
    "merge.ties(density=(0.01, 1.0), lam=0.4, normalize=False)",
    "merge.ties(density=(0.0, 0.5))",
    "merge.passthrough(scale=0.5)",
  ],
)
def test_a_stream_in_pieces_equals_a_run(text, dtype, monkeypatch):
  shapes = {"a": (37, 11), "b": (64,), "c": (2, 300)}
  tensors = [{n: RNG.standard_normal(s).astype(dtype) for n, s in shapes.items()} for _ in range(3)]
  for t in tensors[1:]:
    t["a"][:20] = tensors[0]["a"][:20]  # unchanged entries, which tie at zero
  sources = [model.Model(None, t) for t in tensors]
  materials = collect.Materials(donors=sources[1:])
  whole = drivers.run(registry.parse(text), model.Model(None, {
    n: jnp.asarray(x) for n, x in tensors[0].items()}), materials)  # fmt: skip
  monkeypatch.setattr(pieces, "SIZE", 50)
  sink = Memory()
  drivers.stream(registry.parse(text), sources[0], sink, materials)
  for n in shapes:
    assert np.asarray(sink[n]).tobytes() == np.asarray(whole.leaf(n)).tobytes(), n


def test_pieces_are_written_as_they_are_computed(tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, "SIZE", 50)
  tensors = [{"a": RNG.standard_normal((37, 11)).astype(np.float32)} for _ in range(3)]
  materials = collect.Materials(donors=[model.Model(None, t) for t in tensors[1:]])
  ties = registry.parse("merge.ties(density=0.3)")
  held = model.Model(None, {"a": jnp.asarray(tensors[0]["a"])})
  whole = drivers.run(ties, held, materials)
  seen = []
  write = raw.Sink.write
  monkeypatch.setattr(raw.Sink, "write", lambda *x: seen.append(type(x[2])) or write(*x))
  with raw.Sink(tmp_path / "out", {}) as sink:
    drivers.stream(ties, model.Model(None, tensors[0]), sink, materials)
    out = sink.close()
  assert seen == [pieces.Pieces]
  assert raw.Directory(out).leaf("a").tobytes() == np.asarray(whole.leaf("a")).tobytes()


def test_a_second_step_is_given_the_array_of_the_first(monkeypatch):
  monkeypatch.setattr(pieces, "SIZE", 50)
  tensors = [{"a": RNG.standard_normal((37, 11)).astype(np.float32)} for _ in range(3)]
  materials = collect.Materials(donors=[model.Model(None, t) for t in tensors[1:]])
  both = registry.parse("merge.ties(density=0.3) + merge.linear(weights=(0.5, 0.3, 0.2))")
  whole = drivers.run(both, model.Model(None, {"a": jnp.asarray(tensors[0]["a"])}), materials)
  sink = Memory()
  sink.pieces = True
  drivers.stream(both, model.Model(None, tensors[0]), sink, materials)
  assert np.asarray(sink["a"]).tobytes() == np.asarray(whole.leaf("a")).tobytes()


def test_a_piece_that_is_not_finite_is_told_of_its_leaf(tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, "SIZE", 50)
  w = np.ones((37, 11), np.float32)
  w[30, 2:5] = 3e38
  donor = model.Model(None, {"a": w})
  out = tmp_path / "out"
  message = r"a: 3 of 407 values are NaN or infinite after merge\.linear"
  with pytest.raises(ValueError, match=message), raw.Sink(out, {}) as sink:
    drivers.stream(
      registry.parse("merge.linear(normalize=False)"),
      donor,
      sink,
      collect.Materials(donors=[donor]),
    )
  assert list(tmp_path.iterdir()) == []


# Not compiled as a whole, their loops would be, again in every call.
whole_cut, keep = jax.jit(trim.cut, static_argnums=1), jax.jit(trim.kept)


def kept(d, where, at, ties):
  pairs = zip(where, ties, strict=True)
  return [keep(jnp.asarray(d[a:b]), jnp.int32(at), jnp.int32(t)) for (a, b), t in pairs]


@settings(max_examples=60, deadline=None)
@given(
  st.integers(0, 10**6),
  st.sampled_from([1, 2, 57, 200, 399, 400]),
  st.sampled_from(["normal", "few", "zeros"]),
)
def test_a_cut_in_pieces_keeps_the_same_entries(seed, k, kind):
  rng = np.random.default_rng(seed)
  w = np.zeros((40, 10), np.float32)
  d = rng.standard_normal(w.shape).astype(np.float32)
  d = {"normal": d, "few": np.round(d), "zeros": np.where(d > 1, d, 0)}[kind].astype(np.float32)
  where = [(i, min(i + 7, 40)) for i in range(0, 40, 7)]
  at, ties = trim.cut_pieces(w, d, where, k)
  got = np.concatenate(kept(d, where, at, ties))
  threshold, (left,) = whole_cut([jnp.asarray(d)], k)
  np.testing.assert_array_equal(got, keep(jnp.asarray(d), threshold, left))


def test_a_sample_that_misleads_costs_time_only(monkeypatch):
  monkeypatch.setattr(trim, "_SAMPLE", 40)
  d = np.tile(np.array([9.0, 1, 2, 3, 4, 5, 6, 7, 8, 0], np.float32), (40, 1))
  w = np.zeros_like(d)
  where = [(0, 25), (25, 40)]
  for k in (3, 100, 399):
    at, ties = trim.cut_pieces(w, d, where, k)
    got = kept(d, where, at, ties)
    assert sum(int(x.sum()) for x in got) == k
