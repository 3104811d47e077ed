# SPDX-License-Identifier: Apache-2.0
import random
import re

import pytest

from treesurgeon.core import varied
from treesurgeon.merge.mergekit import parameters

FILTERS = [
  {"filter": "attn", "value": [0, 1]},
  {"filter": "*", "value": 0.25},
  {"value": 0.5},
]
SUFFIXES = ("attn.q.weight", "attn.k.weight", "mlp.up.weight", "mlp.up.bias", "norm.weight")
NAMES = [f"model.layers.{i}.{s}" for i in range(12) for s in SUFFIXES] + [
  "model.embed.weight", "model.norm.weight", "lm_head.weight", "lm_head", "h+.x",
]  # fmt: skip


@pytest.mark.parametrize(
  ("setting", "t", "want"),
  [
    (0.3, 0.7, 0.3),
    ([1, 3], 0.5, 2.0),
    ([0, 1, 10], 0.75, 5.5),
    ([4], 1.0, 4.0),
    ([0, 1], 1, 1.0),
    ([], 0.5, None),
    (FILTERS, 0.5, 0.25),
    ({"filter": "mlp", "value": 2}, 0, 2.0),
    ({"filter": "other", "value": 2}, 0, None),
    ("1e-5", 0, 1e-5),
  ],
)
def test_settings(setting, t, want):
  assert parameters.evaluate(setting, "h.0.mlp", t, parameters.number) == want


def test_the_first_filter_that_is_part_of_the_name_counts():
  found = [parameters.evaluate(FILTERS, n, 0.5, parameters.number) for n in ("h.attn.q", "h.up")]
  assert found == [0.5, 0.25]
  empty = [{"filter": "h", "value": []}, {"value": 1}]
  assert parameters.evaluate(empty, "h", 0, parameters.number) is None


def test_words_and_flags_step_along_a_gradient():
  at = [parameters.evaluate([True, False], "w", t, parameters.flag) for t in (0, 0.99, 1)]
  assert at == [True, True, False]
  assert parameters.evaluate(["a", "b", "c"], "w", 0.5, parameters.text) == "b"


@pytest.mark.parametrize(
  ("read", "good", "bad"),
  [
    (parameters.number, {"2": 2.0, -1: -1.0}, (True, "x", None, [1])),
    (parameters.integer, {3.0: 3, "4": 4}, (0.5, "x")),
    (parameters.flag, {"on": True, 0: False, "True": True}, (2, 0.5, "maybe")),
    (parameters.text, {"x": "x"}, (1, None)),
  ],
)
def test_readers(read, good, bad):
  for given, want in good.items():
    assert read(given) == want and type(read(given)) is type(want)
  for given in bad:
    with pytest.raises(ValueError, match=re.escape(repr(given))):
      read(given)


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ([{"filter": "a"}], "must be a mapping of 'value'"),
    ([{"value": 1, "fliter": "a"}], "must be a mapping of 'value'"),
    ([{"value": 1, "filter": 3}], "filter=3 must be a part of"),
    ([{"filter": "zzz", "value": 1}, 3], "3 must be a mapping"),
    ([0, "x"], "'x' is not a number"),
  ],
)
def test_settings_that_mean_nothing(setting, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    parameters.evaluate(setting, "w", 0, parameters.number)


def test_patterns_match_the_names_chosen_and_no_other():
  names, draw = parameters.Names(NAMES), random.Random(0)
  for _ in range(200):
    chosen = set(draw.sample(NAMES, draw.randrange(1, len(NAMES) + 1)))
    pattern = re.compile(names.pattern(chosen))
    assert {n for n in NAMES if pattern.fullmatch(n)} == chosen


def test_patterns_are_short():
  names = parameters.Names(NAMES)
  assert names.pattern(NAMES) == ".*"
  some = [n for n in NAMES if re.match(r"model\.layers\.[34]\.attn", n)]
  assert names.pattern(some) == r"model\.layers\.(?:3|4)\.attn\..*"


def test_rules_say_of_every_name_what_it_was_given():
  names, draw = parameters.Names(NAMES), random.Random(0)
  for kinds in (1, 2, 5, 40):
    values = {n: float(draw.randrange(kinds)) for n in NAMES}
    rules = names.rules(values)
    assert all(varied.at(rules, n) == v for n, v in values.items())
    assert kinds > 1 or rules == 0.0


def test_rules_of_many_tensors_are_few_and_short():
  many = [f"model.layers.{i}.{s}.{j}" for i in range(80) for s in SUFFIXES for j in range(5)]
  names = parameters.Names(many)
  values = {n: float(n.split(".")[2]) + ("attn" in n) / 100 for n in many}
  rules = names.rules(values)
  assert len(rules) == 160 and max(len(pattern) for pattern, _ in rules) < 60
  assert [varied.at(rules, n) for n in many] == list(values.values())
