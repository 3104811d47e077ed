# SPDX-License-Identifier: Apache-2.0
"""Plans over models in memory; `tests/cli/merge_test.py` carries configurations out on files."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

from treesurgeon import registry
from treesurgeon.core import step
from treesurgeon.merge import mergekit

RESTS = ("attn.q.weight", "mlp.up.weight")
CONFIG = {"num_hidden_layers": 3, "model_type": "mystery"}
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


class Raw:
  """Tensors by name, all filled with one number, beside a config."""

  spec = None

  def __init__(self, value=1.0, layers=3, dtype=F32, config=None, drop=(), **more):
    names = [f"h.{i}.{r}" for i in range(layers) for r in RESTS]
    names = ["wte.weight", *names, "norm.weight", "lm_head.weight"]
    self.tensors = {n: np.full((4, 2), value, dtype) for n in names if n not in drop} | more
    self.config = CONFIG | {"num_hidden_layers": layers} if config is None else config

  def addresses(self):
    return list(self.tensors)

  def leaf(self, address):
    return self.tensors[address]

  def struct(self, address):
    x = self.tensors[address]
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def entry(model, **parameters):
  return {"model": model, "parameters": parameters}


def source(model, first, last, **parameters):
  return {"model": model, "layer_range": [first, last], "parameters": parameters}


def plan(held=None, /, *, compat="mergekit", **document):
  held = {"o": Raw(0.0), "a": Raw(1.0), "b": Raw(2.0)} | (held or {})
  document = {k: v for k, v in document.items() if v is not None}
  config = mergekit.parse(document)
  return mergekit.plan(config, lookup=registry.load, opened=held.__getitem__, compat=compat)


def spelled(**document):
  return step.spell(plan(**document).transform)


TASK = {"merge_method": "task_arithmetic", "base_model": "o",
        "models": [entry("a", weight=0.5), entry("b", weight=2)]}  # fmt: skip
LINEAR = {"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=3)]}


def test_a_plain_merge_is_one_step_with_plain_numbers():
  assert spelled(**TASK) == "merge.task_arithmetic(models=('a', 'b'), weights=(0.5, 2.0))"
  made = plan(**LINEAR)
  assert step.spell(made.transform) == "merge.linear(models=('b',), weights=(1.0, 3.0))"
  assert list(made.models) == ["base", "donor 0"] and list(made.donors) == ["b"]
  assert made.base.addresses() == Raw().addresses() and made.config == CONFIG
  assert made.notes == ()


def test_a_base_among_the_models_is_not_merged_into_itself():
  listed = [entry("o", weight=9), *TASK["models"]]
  assert spelled(**TASK | {"models": listed}) == spelled(**TASK)


def test_the_nearest_setting_counts():
  slices = [{"sources": [source("o", 0, 3), source("a", 0, 3, weight=1), source("b", 0, 3)],
             "parameters": {"weight": 2, "lambda": 0.5}}]  # fmt: skip
  shared = {"weight": 3, "lambda": 0.1, "normalize": True}
  text = spelled(**TASK | {"models": None, "slices": slices, "parameters": shared})
  assert text == (
    "merge.task_arithmetic(models=('a', 'b'), weights=(1.0, 2.0), lam=0.5, normalize=True)"
  )


def test_a_gradient_becomes_rules_over_layers():
  made = plan(**TASK | {"models": [entry("a", weight=[0, 1]), entry("b", weight=1)]})
  assert step.spell(made.transform) == (
    r"merge.task_arithmetic(models=('a', 'b'), weights=((('h\\.1\\..*', 0.5), ('h\\.2\\..*', 1.0), "
    "('.*', 0.0)), 1.0))"
  )
  assert made.notes == (
    "gradients run over the layers: embeddings, final norm and head take the first value, as in "
    "mergekit",
  )


def test_a_slice_of_one_layer_takes_a_gradients_last_value():
  slices = [{"sources": [source("o", 0, 1), source("a", 0, 1, weight=[0, 1])]}]
  made = plan(**TASK | {"models": None, "slices": slices})
  assert r"('h\\..*', 1.0), ('.*', 0.0)" in step.spell(made.transform)
  assert made.config["num_hidden_layers"] == 1


def test_what_must_be_compiled_apart_becomes_steps_by_path():
  normalize = [{"filter": "attn", "value": False}, {"value": True}]
  (one,) = plan(**LINEAR | {"parameters": {"normalize": normalize}}).transform
  assert one.info["name"] == "by_path"
  assert [text.count("normalize=False") for _, text in one.info["arguments"]["rules"]] == [0, 1]


def test_slices_with_different_numbers_of_models():
  slices = [
    {"sources": [source("o", 0, 1), source("a", 0, 1, weight=1)]},
    {"sources": [source("o", 1, 3), source("b", 1, 3, weight=1), source("a", 0, 2, weight=2)]},
    {"sources": [source("o", 2, 3)]},
  ]
  made = plan(**TASK | {"models": None, "slices": slices})
  (one,) = made.transform
  assert [t.partition("(")[2].split(", w")[0] for _, t in one.info["arguments"]["rules"]] == [
    "models=('source 1',)", "models=('source 1', 'source 2')",
  ]  # fmt: skip
  assert list(made.donors) == ["source 1", "source 2"]
  assert made.donors["source 1"].leaf("h.0.mlp.up.weight")[0, 0] == 1
  assert made.donors["source 1"].leaf("h.1.mlp.up.weight")[0, 0] == 2
  assert made.donors["source 2"].leaf("h.2.mlp.up.weight")[0, 0] == 1
  assert made.config["num_hidden_layers"] == 4
  assert not {u for unit in one.units(made.base.addresses()) for u in unit} & {
    "h.3.mlp.up.weight", "norm.weight",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("stored", "dtype", "out", "base", "donor"),
  [
    (F32, None, None, F32, F32),
    (BF16, None, None, BF16, BF16),
    (BF16, "float32", None, F32, BF16),
    (BF16, "float32", "bfloat16", BF16, BF16),  # rounded once, to the output's dtype
    (F32, "bfloat16", None, BF16, BF16),
    (F32, "float32", "bfloat16", F32, F32),
    (F16, "bfloat16", "float32", BF16, BF16),
  ],
)
def test_inputs_are_cast_only_where_the_result_asks_for_it(stored, dtype, out, base, donor):
  models = {m: Raw(dtype=stored) for m in "oab"}
  made = plan(models, **TASK, dtype=dtype, out_dtype=out)
  assert made.base.struct("wte.weight").dtype == base
  assert made.donors["a"].struct("wte.weight").dtype == donor
  assert made.base.leaf("wte.weight").dtype == base and made.out_dtype == out


def test_mixed_dtypes_are_promoted():
  made = plan({"o": Raw(dtype=BF16), "a": Raw(dtype=F16)}, **TASK)
  assert made.base.struct("wte.weight").dtype == np.float32


def test_integers_are_kept_apart():
  ids = np.arange(3)
  models = {m: Raw(position_ids=ids) for m in "ab"}
  made = plan(models, **LINEAR)
  (one,) = made.transform
  assert "position_ids" in made.base.addresses()
  assert not re.fullmatch(one.info["arguments"]["select"], "position_ids")
  assert made.base.leaf("position_ids").dtype == ids.dtype


@pytest.mark.parametrize(
  ("document", "want"),
  [
    ({"parameters": {"t": 0.1}}, "'t' has no effect on linear, as in mergekit"),
    ({"models": [entry("a", weight=1, normalize=False), entry("b", weight=1)]}, "of one model"),
    ({"base_model": "o", "parameters": {"weight": 1}}, "linear takes the base_model for one more"),
    ({**TASK, "merge_method": "ties", "models": [entry("a", weight=-1)]}, "cancels itself"),
    (
      {"merge_method": "arcee_fusion", "base_model": "o", "models": [entry("a")],
       "dtype": "bfloat16"},
      "arcee_fusion is saved in bfloat16, as dtype says",
    ),
  ],
)  # fmt: skip
def test_traps_are_told_in_a_sentence(document, want):
  (note,) = [n for n in plan(**{**LINEAR, **document}).notes if want in n]
  assert "\n" not in note


@pytest.mark.parametrize(
  ("method", "mergekit_says", "paper_says"),
  [
    ("ties", "density=(1.0,)", "granularity='global'"),
    ("breadcrumbs", "gamma", "granularity='row'"),
    ("dare_linear", "rescale='l1'", "merge.dare_linear("),
    ("della", "rescale='l1'", "merge.della("),
  ],
)
def test_compat_picks_granularity_and_rescaling(method, mergekit_says, paper_says):
  document = {**TASK, "merge_method": method, "models": [entry("a", weight=1)]}
  spellings = [
    step.spell(plan(**document, compat=c).transform) for c in ("mergekit", "paper")
  ]  # fmt: skip
  assert mergekit_says in spellings[0] and paper_says in spellings[1]
  assert spellings[0] != spellings[1]
  with pytest.raises(ValueError, match="compat='fusion'; valid: mergekit, paper"):
    plan(**document, compat="fusion")


def test_every_method_of_the_table_can_be_built():
  for name, method in mergekit.METHODS.items():
    needed = {"weight": 0.5} if "weight" in method.parameters else {}
    count = int(min(2, method.inputs[1] - (method.base == "required")))
    listed = [entry(m, **needed) for m in "ab"[:count]]
    shared = {"t": 0.5} if name in ("slerp", "nearswap") else {}
    base = "o" if method.base == "required" else None
    text = spelled(merge_method=name, models=listed, base_model=base, parameters=shared)
    assert text.startswith(f"{method.name}("), text


def test_our_own_methods_go_by_the_registrys_names():
  document = {**TASK, "merge_method": "tsv_merge", "models": [entry("a"), entry("b")]}
  assert spelled(**document).startswith("merge.tsv_merge(models=('a', 'b')")
  assert spelled(**document | {"merge_method": "merge.ties", "parameters": {"weight": 1}})
  with pytest.raises(ValueError, match="merge_method='tsv_mrege' is not known"):
    plan(**document | {"merge_method": "tsv_mrege"})


def test_a_head_that_only_one_model_has():
  tied = {"b": Raw(2.0, drop=("lm_head.weight",))}
  made = plan(tied, **LINEAR)
  assert made.donors["b"].leaf("lm_head.weight")[0, 0] == 2
  assert made.notes[0].startswith("b ties its head: wte.weight stands in for lm_head.weight")
  back = {**LINEAR, "models": [entry("b", weight=1), entry("a", weight=1)]}
  assert "lm_head.weight" in plan(tied, **back).base.addresses()
  both = tied | {"a": Raw(1.0, drop=("lm_head.weight",))}
  assert "lm_head.weight" not in plan(both, **LINEAR).base.addresses()


def test_names_may_differ_by_what_a_backbone_leaves_out():
  inner = Raw(2.0)
  inner.tensors = {
    n if n.startswith("lm_head") else f"transformer.{n}": x for n, x in inner.tensors.items()
  }
  made = plan({"b": inner}, **LINEAR)
  assert made.base.addresses() == Raw().addresses()
  assert made.donors["b"].leaf("h.1.mlp.up.weight")[0, 0] == 2


@pytest.mark.parametrize(
  ("models", "document", "message"),
  [
    ({"b": Raw(layers=2)}, {}, "their number of layers: a has 3, b has 2; 'slices' with"),
    ({"b": Raw(extra=np.zeros(2))}, {}, "extra: b has it, a lacks it (nearest there: "),
    ({"b": Raw(drop=("norm.weight",))}, {}, "norm.weight: a has it, b lacks it"),
    ({"b": Raw(drop=("h.1.mlp.up.weight",))}, {}, "h.1.mlp.up.weight: a has it, b lacks it"),
    (
      {"b": Raw(**{"wte.weight": np.zeros((5, 2), F32)})}, {},
      "wte.weight: b has shape (5, 2), a has (4, 2); different vocabularies",
    ),
    (
      {"b": Raw(**{f"v.{i}.w": np.zeros(2) for i in range(3)})}, {},
      "b has layers named 'v.', a has none",
    ),
    ({}, {"models": None, "slices": [{"sources": [source("a", 0, 4, weight=1)]}]},
     "slices[0]: layer_range [0, 4] of a goes past its 3 layers"),
    ({}, {"parameters": {"weigth": 1}}, "linear has no parameter 'weigth'; did you mean 'weight'?"),
    ({}, {"models": [entry("a", weight=1), entry("b")]}, "models (b) lacks the parameter 'weight'"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_named(models, document, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    plan(models, **{**LINEAR, **document})


def towers(**kinds):
  tensors = {f"{p}.{i}.w": np.full(2, v, F32) for p, v in kinds.items() for i in range(2)}
  config = {"num_hidden_layers": 2, "vision_config": {"depth": 2}}
  made = Raw(config=config)
  made.tensors = tensors | {"visual.merger.w": np.ones(2, F32), "lm_head.weight": np.ones(2, F32)}
  return made


def test_modules_say_what_each_tower_is_made_of():
  models = {m: towers(**{"model.layers": v, "visual.blocks": v}) for v, m in enumerate("oab")}
  twice = [{"sources": [source("a", 0, 2)]}, {"sources": [source("b", 0, 1)]}]
  modules = {
    "text_decoder": {"slices": twice}, "vision_tower": {"models": [entry("o")]},
    "multi_modal_projector": {"models": [entry("b")]},
  }  # fmt: skip
  made = plan(models, merge_method="passthrough", modules=modules)
  assert made.base.leaf("model.layers.2.w")[0] == 2 and made.base.leaf("visual.blocks.1.w")[0] == 0
  assert sorted(made.base.addresses())[-3:] == [
    "visual.blocks.0.w", "visual.blocks.1.w", "visual.merger.w",
  ]  # fmt: skip
  assert made.config == {"num_hidden_layers": 3, "vision_config": {"depth": 2}}
  with pytest.raises(ValueError, match="found 'model.layers.', 'visual.blocks.'; use 'modules'"):
    plan(models, merge_method="passthrough", slices=twice)
  with pytest.raises(ValueError, match="modules: text_decoder do not fit the model's stacks"):
    plan(models, merge_method="passthrough", modules={"text_decoder": {"slices": twice}})
  by_prefix = {"model.layers": {"slices": twice}, "visual": {"models": [entry("o")]}}
  assert len(plan(models, merge_method="passthrough", modules=by_prefix).base.addresses()) == 7
