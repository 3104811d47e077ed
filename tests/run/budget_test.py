# SPDX-License-Identifier: Apache-2.0
"""Mixed configurations to a budget: what is measured, what is chosen, what cannot be met."""

import functools
import re

import jax
import numpy as np
import pytest

from treesurgeon import models, registry
from treesurgeon.core import leaves, model, needs
from treesurgeon.run import budget, collect, drivers, gradients, statistics

SPEC = models.Spec(vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=32, max_positions=32)
TEXT = collect.Materials(batches=[np.random.default_rng(0).integers(0, 32, (4, 16))])


SELECT = "layers/.*/mlp/.*"


@pytest.fixture(scope="module")
def base():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: models.init(SPEC, jax.random.key(0)))
  draw = lambda x: rng.normal(x.ndim == 2, 0.1, x.shape).astype("float32")
  return model.Model(SPEC, jax.tree.map(draw, shapes))


def choices(method):
  build = functools.partial(registry.load(method), select=SELECT)
  return budget.configurations(build, bits=(2, 4, 8), group_sizes=(8,))


def test_what_is_measured_is_what_the_quantizer_makes(base):
  found = budget.measure(choices("compress.quantize.rtn"), base, collect.Materials())
  assert list(found) == [a for a in base.addresses() if re.fullmatch(SELECT, a)]
  (two,) = choices("compress.quantize.rtn")[0]
  made = two.apply(base, {}, jax.random.key(0))
  for address, (nbytes, losses) in found.items():
    w, q = (np.asarray(leaves.dense(m.leaf(address)), np.float64) for m in (base, made))
    assert nbytes[0] == made.leaf(address).nbytes
    assert losses[0] == pytest.approx(((q - w) ** 2).sum() / (w**2).sum(), rel=1e-4)
    assert nbytes == sorted(nbytes) and losses == sorted(losses, reverse=True)


def test_loss_is_weighed_by_inputs_and_gradients(base):
  address = "layers/1/mlp/down/kernel"
  (two,) = registry.parse(f"compress.quantize.rtn(bits=2, group_size=8, select={address!r})")
  found = budget.measure([(two,)], base, TEXT, model=base)
  taps = statistics.wanted({"h": needs.Statistic("second_moment", address)}, [address])
  h = statistics.tap_statistics(base, taps, TEXT.batches)[("second_moment", address)].moment
  f = np.asarray(gradients.fisher(base, TEXT.batches, select=address)[address], np.float64)
  made = two.apply(base, {}, jax.random.key(0)).leaf(address)
  wrong = np.asarray(made.dense() - base.leaf(address), np.float64)
  expected = np.trace(wrong.T @ h @ wrong) * f.sum() / (np.trace(h) * wrong.shape[1])
  assert found[address].losses[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_plan_fits_and_beats_one_width_for_all(base, share):
  some = choices("compress.quantize.rtn")
  sizes = [drivers.run(c, base).nbytes() for c in some]
  limit = int(sizes[0] + share * (sizes[-1] - sizes[0]))
  plan = budget.plan(some, base, collect.Materials(), limit)
  made = drivers.run(plan, base)
  assert made.nbytes() <= limit
  assert registry.parse(made.lineage[0].expression)[0].info == plan[0].info
  measured = budget.measure(some, base, collect.Materials()).values()
  fit = max(i for i, size in enumerate(sizes) if size <= limit)
  assert _lost(base, made) <= sum(m.losses[fit] for m in measured) * (1 + 1e-5)


def _lost(base, made):
  total = 0.0
  for a in base.addresses():
    w, q = (np.asarray(leaves.dense(m.leaf(a)), np.float64) for m in (base, made))
    total += ((q - w) ** 2).sum() / (w**2).sum()
  return total


def test_what_is_easy_to_round_leaves_its_bits_to_others(base):
  easy = {f"layers/0/mlp/{k}/kernel": np.zeros((16, 32), np.float32) for k in ("up", "gate")}
  m = base.update(easy)
  some = choices("compress.quantize.rtn")
  made = drivers.run(budget.plan(some, m, collect.Materials(), drivers.run(some[1], m).nbytes()), m)
  widths = {a: made.leaf(a).bits for a in made.addresses() if re.fullmatch(SELECT, a)}
  assert [widths[a] for a in easy] == [2, 2] and sorted(widths.values()) == [2, 2, 4, 4, 4, 8]


def test_mistakes_are_told(base):
  some = choices("compress.quantize.rtn")
  with pytest.raises(
    ValueError, match=r"1,000 bytes .* smallest possible is 14,912, .*quantize.rtn leaves"
  ):
    budget.plan(some, base, collect.Materials(), 1000)
  grown = registry.parse("grow.g_stack()")
  with pytest.raises(ValueError, match="grow.g_stack.* does not quantize each leaf by itself"):
    budget.measure([grown], base, collect.Materials())
  with pytest.raises(ValueError, match="has 2 steps"):
    budget.measure([some[0] + some[1]], base, collect.Materials())
  with pytest.raises(ValueError, match="bits=9"):
    budget.configurations(registry.load("compress.quantize.rtn"), bits=(9,))
  with pytest.raises(ValueError, match="needs calibration text and none was given"):
    budget.measure(choices("compress.quantize.gptq"), base, collect.Materials())


@pytest.mark.parametrize("text", ["2.6", "3 TB", "", "-1GB", "1e9", "iB", "MB"])
def test_what_is_no_size_is_told(text):
  if text == "2.6":
    assert budget.read_bytes(text) == 2
    return
  with pytest.raises(ValueError, match="is not a size such as 2.6GB"):
    budget.read_bytes(text)


def test_sizes():
  assert budget.read_bytes("123") == 123 and budget.read_bytes("1kb") == 1000
  assert budget.read_bytes(".5MiB") == 2**19 and budget.read_bytes(" 7 B ") == 7
