# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from treesurgeon.core import step
from treesurgeon.merge import mergekit


def models(*names, **parameters):
  return [{"model": n, **({"parameters": parameters} if parameters else {})} for n in names]


def spelled(**config):
  plan = mergekit.plan(config)
  return plan.base, step.spell(plan.transform)


def test_linear_merges_the_first_with_the_rest():
  listed = [*models("a", weight=1), *models("b", weight=0.5)]
  assert spelled(merge_method="linear", models=listed) == (
    "a",
    "merge.linear(models=('b',), weights=(1.0, 0.5))",
  )
  kept = spelled(merge_method="linear", models=listed, parameters={"normalize": False, "weight": 9})
  assert kept[1].endswith("normalize=False)") and "9" not in kept[1]


def test_a_models_parameter_comes_before_the_global_one():
  listed = [*models("a", weight=0.25), *models("b")]
  shared = {"weight": 2, "lambda": 0.5, "density": 0.3}
  base, text = spelled(merge_method="ties", base_model="o", models=listed, parameters=shared)
  assert base == "o"
  assert text == ("merge.ties(models=('a', 'b'), weights=(0.25, 2.0), density=(0.3, 0.3), lam=0.5)")


def test_a_base_among_the_models_is_not_merged_into_itself():
  listed = models("o", "a", weight=1.0)
  for method in ("task_arithmetic", "ties"):
    assert "models=('a',)" in spelled(merge_method=method, base_model="o", models=listed)[1]
  with pytest.raises(ValueError, match="no model besides base_model is listed"):
    spelled(merge_method="ties", base_model="o", models=listed[:1])


def test_dtypes_and_names_are_read():
  plan = mergekit.plan({
    "merge_method": "linear", "models": models("a", "b", weight=1), "dtype": "bfloat16",
    "out_dtype": "float16", "name": "mine",
  })  # fmt: skip
  assert (plan.dtype, plan.out_dtype) == ("bfloat16", "float16")


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"merge_method": "slerp"}, "merge_method='slerp' is not supported; supported: linear"),
    ({"slices": []}, "the configuration: 'slices' is not supported; supported: merge_method"),
    ({"models": []}, "'models' must be a list of at least one model"),
    ({"models": ["a"]}, "models[0] must be a mapping with a 'model'"),
    ({"models": [{"model": "a", "wait": 1}]}, "models[0]: 'wait' is not supported"),
    ({"models": models("a")}, "models[0] (a) lacks the parameter 'weight'"),
    ({"models": models("a", weight=[0, 1])}, "weight of models[0] is [0, 1]; supported: a number"),
    ({"models": models("a", weight=True)}, "weight of models[0] is True"),
    ({"models": models("a", density=1)}, "models[0].parameters: 'density' is not supported"),
    ({"parameters": {"lambda": 1}}, "parameters: 'lambda' is not supported"),
    ({"parameters": [1]}, "parameters must be a mapping, not [1]"),
    ({"parameters": {"normalize": "yes"}}, "normalize is 'yes'; it must be true or false"),
    ({"base_model": "a"}, "'linear' takes no base_model; list it among the models"),
    ({"dtype": "int8"}, "dtype='int8' is not supported; supported: float32"),
    ({"merge_method": "ties"}, "merge_method 'ties' needs a base_model"),
  ],
)
def test_what_is_not_supported_is_named(config, message):
  base = {"merge_method": "linear", "models": models("a", "b", weight=1.0)}
  with pytest.raises(ValueError, match=re.escape(message)):
    mergekit.plan(base | config)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"- a\n", "is not a mapping; expected a mergekit configuration"),
    (b"a: [", "is not YAML"),
    (b"\xff\xfe\xff", "is not YAML"),
    (b"merge_method: x", "m.yml: merge_method='x' is not supported"),
    (b"!!python/object/apply:os.system [ls]", "is not YAML"),
  ],
)
def test_bad_files_are_named(tmp_path, content, message):
  path = tmp_path / "m.yml"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=re.escape(message)):
    mergekit.read(path)


def test_files_are_read(tmp_path):
  path = tmp_path / "m.yml"
  path.write_text("merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n")
  assert mergekit.read(path).base == "a"
  with pytest.raises(ValueError, match="is not a file; expected a mergekit YAML configuration"):
    mergekit.read(tmp_path)
