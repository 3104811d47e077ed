# SPDX-License-Identifier: Apache-2.0
"""Fusion of distributions: alignment, the loss's zeros, and a target that learns from a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treesurgeon import models
from treesurgeon.core import model
from treesurgeon.merge import fuse

SPEC = models.Spec(vocab_size=6, d_model=8, num_layers=1, num_heads=2, d_ff=12, max_positions=8)
TEACHER = models.Spec(vocab_size=5, d_model=12, num_layers=2, num_heads=2, d_ff=8, max_positions=8)
MINE, THEIRS = list("abcdef"), ["f", "a", "c", "b", "zz"]
TEXT = np.random.default_rng(0).integers(0, 3, (6, 8))  # letters that both have


def make(spec, seed):
  return model.Model(spec, models.init(spec, jax.random.key(seed)))


def test_positions_are_those_where_the_text_so_far_agrees():
  rng = np.random.default_rng(0)
  text = "".join(rng.choice(list("abc"), 40))

  def cut():
    edges = [0, *sorted(rng.choice(np.arange(1, 40), 12, replace=False)), 40]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]

  source, target = cut(), cut()
  found = fuse.positions(source, target)
  for t, s in enumerate(found):
    same = [i for i in range(len(source)) if "".join(source[: i + 1]) == "".join(target[: t + 1])]
    assert [s] == (same or [-1])
  assert fuse.positions(target, target).tolist() == list(range(13))
  assert fuse.positions(["a", "", "b"], ["a", "b"]).tolist() == [1, 2]
  with pytest.raises(ValueError, match="the tokens spell two texts: 'x', 'b'"):
    fuse.positions(["a", "x"], ["a", "b"])


def test_tokens_are_mapped_by_their_strings():
  assert fuse.vocabulary(THEIRS, MINE).tolist() == [5, 0, 2, 1, -1]
  assert fuse.vocabulary(["ab", "x"], ["a", "b"], how="prefix").tolist() == [0, -1]
  with pytest.raises(ValueError, match="how='near'; valid: exact, prefix"):
    fuse.vocabulary(["a"], ["a"], how="near")


def test_divergence_is_zero_where_the_network_is_its_teacher():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.standard_normal((7, 6)), jnp.float32)
  labels, known = jnp.asarray(rng.integers(0, 6, 7)), jnp.ones(7)
  own = jax.nn.softmax(logits)
  kl = fuse.fusion_loss(logits, labels, own, known, lam=0.0)
  np.testing.assert_allclose(kl, 0.0, atol=1e-6)
  slope = jax.grad(lambda z: fuse.fusion_loss(z, labels, own, known, lam=0.0))(logits)
  np.testing.assert_allclose(slope, 0.0, atol=1e-6)
  other = jax.nn.softmax(jnp.asarray(rng.standard_normal((7, 6)), jnp.float32))
  some = jnp.asarray([1, 0, 1, 1, 0, 0, 1], jnp.float32)
  p, q = np.float64(other), np.float64(own)
  ce = -np.log(q[np.arange(7), labels]).mean()
  want = (p * np.log(p / q)).sum(1)[np.asarray(some) > 0].mean()
  got = fuse.fusion_loss(logits, labels, other, some, lam=0.25)
  np.testing.assert_allclose(got, 0.25 * ce + 0.75 * want, rtol=1e-5)


def distributions(m, tokens):
  """The teacher's distributions of the target's next tokens, through both vocabularies."""
  ids = np.array([THEIRS.index(MINE[t]) for t in range(3)])
  probs = jax.nn.softmax(models.forward(TEACHER, m.params, ids[tokens][:, :-1]).logits)
  mapping = jnp.asarray(fuse.vocabulary(THEIRS, MINE))
  rows = [fuse.positions([MINE[t] for t in row[:-1]], [MINE[t] for t in row[:-1]])
          for row in tokens]  # fmt: skip
  each = [
    fuse.translate(p, jnp.asarray(r), mapping, size=6) for p, r in zip(probs, rows, strict=True)
  ]
  return jnp.stack([e[0] for e in each]), jnp.stack([e[1] for e in each]), probs


def test_a_target_learns_what_teachers_of_another_vocabulary_say():
  teachers = [make(TEACHER, 1), make(TEACHER, 2)]
  made = [distributions(t, TEXT) for t in teachers]
  p, known, probs = made[0]
  np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(p[0, 0, 0] / p[0, 0, 5], probs[0, 0, 1] / probs[0, 0, 0], rtol=1e-4)
  assert float(p[..., 3:5].max()) == 0.0 and float(known.min()) == 1.0
  labels = jnp.asarray(TEXT[:, 1:])
  stacked = jnp.stack([m[0] for m in made])
  fused, some = fuse.choose(stacked, jnp.stack([m[1] for m in made]), labels)
  ce = -np.log(np.take_along_axis(np.asarray(stacked), TEXT[None, :, 1:, None], -1))[..., 0].mean(2)
  for b, best in enumerate(ce.argmin(0)):
    np.testing.assert_array_equal(fused[b], stacked[best, b])
  batch = {"tokens": TEXT, "teacher": fused, "known": some}
  target = make(SPEC, 0)
  done = fuse.fuse(target, [batch], steps=150, rate=0.01, lam=0.0)
  note = done.aux["notes"]
  # Teachers disagree on equal prefixes, so some divergence stays.
  assert note["last_loss"] < 0.3 * note["first_loss"]
  assert done.leaf("lm_head/kernel").dtype == target.leaf("lm_head/kernel").dtype
  same = fuse.fuse(target, [batch], steps=0)
  assert same.leaf("lm_head/kernel").tolist() == target.leaf("lm_head/kernel").tolist()


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="lam=2.0 must lie between 0 and 1"):
    fuse.fuse(make(SPEC, 0), [], steps=1, lam=2.0)
  with pytest.raises(ValueError, match="there is no batch to learn from"):
    fuse.fuse(make(SPEC, 0), [], steps=1)
