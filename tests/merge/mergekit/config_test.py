# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from treesurgeon.merge.mergekit import config

PLAIN = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}


def sliced(**source):
  return {
    "merge_method": "slerp", "base_model": "a",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 2], **source}]}],
  }  # fmt: skip


def test_the_three_forms_are_read():
  (piece,) = config.parse(PLAIN).slices()
  assert piece.inputs == (config.Input("a", None, {"weight": 1}),)
  (piece,) = config.parse(sliced(parameters={"t": 0.5})).slices()
  assert piece.inputs[0].layers == (0, 2) and piece.inputs[0].parameters == {"t": 0.5}
  modules = {"text": {"models": [{"model": "b"}], "parameters": {"t": 1}}}
  found = config.parse({"merge_method": "slerp", "modules": modules, "base_model": "a"})
  assert found.modules["text"].parameters == {"t": 1} and found.models() == ["a", "b"]


def test_models_are_spelled_in_several_ways():
  spelled = {
    "a": "a",
    "a+l": {"model": "a", "lora": "l"},
    "a@v1": {"path": "a", "revision": "v1"},
    "a@v1+l": {"model": {"path": "a", "revision": "v1"}, "lora": {"path": "l"}},
  }
  for want, value in spelled.items():
    document = {"merge_method": "linear", "models": [{"model": value}]}
    assert config.parse(document).models() == [want]


def test_the_base_comes_first_among_the_models():
  entries = [{"model": m} for m in ("b", "a", "b")]
  found = config.parse({"merge_method": "ties", "base_model": "o", "models": entries})
  assert found.models() == ["o", "b", "a"]


def test_dtypes_tokenizers_and_names():
  more = {"dtype": "torch.bfloat16", "out_dtype": "float16", "name": "n", "tokenizer_source": "u"}
  found = config.parse(PLAIN | more)
  assert (found.dtype, found.out_dtype, found.name) == ("bfloat16", "float16", "n")
  assert found.tokenizer == {"source": "u"} and found.document["name"] == "n"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"merge_metod": "x"}, "unknown key 'merge_metod'; did you mean 'merge_method'?"),
    ({"zzz": 1}, "unknown key 'zzz'; known: merge_method, models"),
    ({"merge_method": None}, "merge_method=None must be the name of a method"),
    ({"models": None}, "exactly one of 'models', 'slices' and 'modules' is needed; none is given"),
    ({"slices": [1]}, "is needed; 'models' and 'slices' is given"),
    ({"models": "a"}, "models must be a list, not 'a'"),
    ({"models": ["a"]}, "models[0] must be a mapping, not 'a'"),
    ({"models": [{"model": None}]}, "models[0] must have a 'model'"),
    ({"models": [{"model": "a", "wait": 1}]}, "models[0]: unknown key 'wait'"),
    ({"models": [{"model": "a", "layer_range": [0, 1]}]}, "unknown key 'layer_range'"),
    ({"models": [{"model": 3}]}, "models[0].model is 3; it must be a directory"),
    ({"models": [{"model": "a+b+c"}]}, "at most one adapter can be added"),
    ({"models": [{"model": {"pth": "a"}}]}, "unknown key 'pth'; did you mean 'path'?"),
    ({"parameters": [1]}, "parameters must be a mapping, not [1]"),
    ({"dtype": "int8"}, "dtype='int8' is not supported; supported: float32, bfloat16, float16"),
    ({"out_dtype": 16}, "out_dtype=16 is not supported"),
    ({"chat_template": 1}, "chat_template=1 must be text"),
    ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, "exclude each other"),
    ({"tokenizer": "union"}, "tokenizer must be a mapping, not 'union'"),
    ({"models": None, "modules": {"m": {}}}, "modules.m: exactly one of 'slices' and 'models'"),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    config.parse({**PLAIN, **changes})


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ({"layer_range": None}, "slices[0].sources[0]: layer_range=None must be [first, one past"),
    ({"layer_range": [2, 1]}, "layer_range=[2, 1] must be"),
    ({"layer_range": [0, "all"]}, "layer_range=[0, 'all'] must be"),
    ({"layer_rang": [0, 1]}, "unknown key 'layer_rang'; did you mean 'layer_range'?"),
  ],
)
def test_mistakes_in_slices_are_named(source, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    config.parse(sliced(**source))


def test_slices_of_unequal_length_and_weights_of_residuals_are_refused():
  document = sliced()
  document["slices"][0]["sources"].append({"model": "b", "layer_range": [0, 3]})
  with pytest.raises(ValueError, match=r"slices\[0\]: all sources must have the same number"):
    config.parse(document)
  document = sliced()
  document["slices"][0]["residual_weight"] = 0.5
  with pytest.raises(ValueError, match="'residual_weight' has no effect in mergekit"):
    config.parse(document)
  with pytest.raises(ValueError, match="'sources' must be a list of at least one model"):
    config.parse({**sliced(), "slices": [{"sources": []}]})
