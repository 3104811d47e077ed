# SPDX-License-Identifier: Apache-2.0
"""The table of the contract suite: how each registered transform is built and brought to rest.

A new method adds a row of three lines: its name, arguments that fit the tiny model, and the
arguments at which it is the identity. Donors and calibration text come with every row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import models, registry
from treesurgeon.adapt import adapters
from treesurgeon.core import leaves, model, paths, step
from treesurgeon.edit import tokens
from treesurgeon.run import collect


@dataclasses.dataclass(frozen=True)
class Row:
  """One registered transform under test.

  Attributes:
    name: its name in the registry.
    arguments: what fits the tiny model.
    neutral: arguments (beside `arguments`) at which it is the identity.
    prepare: makes the model at which `neutral` is the identity.
    commutes: whether the order of the donors does not matter.
    reduces: whether it sums over axes that a mesh splits, which reorders float sums.
    within: how much that may change, as a share of the largest weight; training and eigenvectors
      amplify it.
    searches: whether it chooses among codes so alike that rounding decides; the distance from the
      given weights must then be the same within 2 %.
    requests: makes what needs edit requests.
    still: the transform's evidence at rest, in place of `neutral` (no requests).
    count: how many donors it is given.
    batches: makes its calibration data.
    adapts: whether what is stored depends on the weights, so that shapes alone cannot tell it.
  """

  name: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  prepare: Callable[[model.Model], model.Model] = lambda m: m
  commutes: bool = False
  reduces: bool = False
  within: float = 1e-4
  searches: bool = False
  requests: Callable[[], tuple] = tuple
  still: bool = False
  count: int = 2
  batches: Callable[[], list] = lambda: TEXT
  adapts: bool = False

  def build(self, **more: Any) -> step.Transform:
    """Return the transform."""
    return registry.load(self.name)(**{**self.arguments, **more})

  def materials(self, m: model.Model) -> collect.Materials:
    """Return everything a transform may ask for."""
    return collect.Materials(
      batches=self.batches(),
      donors=donors(m, self.count),
      donor_batches=[
        [np.random.default_rng(200 + i).integers(0, 32, (4, 16))] for i in range(self.count)
      ],
      requests=self.requests(),
    )


def pairs() -> list[dict[str, np.ndarray]]:
  """Return texts, of each of which one version is preferred."""
  rng = np.random.default_rng(7)
  return [{side: rng.integers(0, 32, (4, 16)) for side in ("chosen", "rejected")}]


WISH = tokens.Tokenized(
  lead=(),
  prompt=tokens.Prompt((3, 4, 5, 6), 1, 2),
  new=(7, 8),
  essence=(tokens.Prompt((4, 5, 9), 0, 1),),
  separator=(1,),
)


def quantized(m: model.Model) -> model.Model:
  """Return the model in 4 bits: the fixed point of a quantizer is its own format."""
  (one,) = registry.load("compress.quantize.rtn")(bits=4, group_size=8)
  return one.apply(m, {}, jax.random.key(0))


def biased(m: model.Model) -> model.Model:
  """Return a model whose feed-forward blocks have biases."""
  spec = dataclasses.replace(m.spec, mlp_bias=True)
  return tiny(spec, dtype=m.leaf("embed/tokens/embedding").dtype.name)


def done(name: str, **arguments: Any) -> Callable[[model.Model], model.Model]:
  """Return what brings a model to a method's own result, its fixed point."""

  def prepare(m: model.Model) -> model.Model:
    row = Row(name, arguments)
    (one,) = row.build()
    return one.apply(m, collect.evidence(one, m, row.materials(m)), jax.random.key(0))

  return prepare


# What searches for every kernel does so for one a layer: each shape compiles anew.
VQ = {"length": 4, "entries": 8, "select": "layers/.*/mlp/up/kernel"}


STACK = {"blocks": 3, "rank": 1, "select": "layers/.*/mlp/up/kernel"}
stacked = done("compress.quantize.bitstack", **{**STACK, "blocks": 2})


def adapted(m: model.Model) -> model.Model:
  """Return the model with adapters that are not zero, whose sum with the base a merge keeps."""
  (one,) = registry.load("adapt.lora")(rank=4)
  fresh = one.apply(m, {}, jax.random.key(0))
  trained = {
    a: leaves.LowRank(low.a, jnp.full_like(low.b, 0.1), low.scale)
    for a, low in adapters.extract(fresh).items()
  }
  return adapters.attach(m, trained)


ROWS = (
  Row("adapt.lora", {"rank": 4}),
  Row("adapt.merge", prepare=adapted, reduces=True),
  # A rate so small that rounding, which Adam turns into whole steps, stays within the tolerance.
  Row(
    "compress.distill.logits",
    {"steps": 2, "rate": 1e-5},
    {"steps": 0},
    count=1,
    reduces=True,
  ),
  Row("compress.low_rank.asvd", {"rank": 4}, {"rank": 16}, reduces=True),
  Row("compress.low_rank.eora", {"rank": 2}, {"rank": 0}, quantized, count=1, reduces=True),
  Row("compress.low_rank.lorc", {"rank": 2}, {"rank": 0}, quantized, count=1, reduces=True),
  Row(
    "compress.low_rank.lq_lora",
    {"rank": 2, "group_size": 8},
    {"bits": 3},
    done("compress.low_rank.lq_lora", rank=2, bits=3, group_size=8),
    reduces=True,
  ),
  Row(
    "compress.low_rank.pela",
    {"rank": 4, "steps": 2, "rate": 1e-6},
    {"rank": 16, "steps": 0},
    reduces=True,
  ),
  Row("compress.low_rank.svd", {"rank": 4}, {"rank": 16}, reduces=True),
  Row("compress.low_rank.svd_llm", {"rank": 4}, {"rank": 16}, reduces=True),
  Row("compress.prune.d_pruner", neutral={"sparsity": 0.0}),
  Row("compress.prune.ecoflap", neutral={"sparsity": 0.0}),
  Row(
    "compress.prune.gradual",
    {"sparsity": 0.5, "steps": 3, "every": 1, "rate": 1e-5},
    {"sparsity": 0.0, "steps": 0},
    reduces=True,
  ),
  Row("compress.prune.layer_drop", {"layers": (0,)}, {"layers": ()}),
  Row("compress.prune.magnitude", neutral={"sparsity": 0.0}),
  Row(
    "compress.prune.minitron",
    {"layers": 1, "d_model": 8, "d_ff": 16, "heads": 1},
    {"layers": None, "d_model": None, "d_ff": None, "heads": None},
    reduces=True,
  ),
  Row("compress.prune.obert", {"block": 8}, {"sparsity": 0.0}, reduces=True),
  Row("compress.prune.shortgpt", {"drop": 1}, {"drop": 0}),
  Row("compress.prune.slicegpt", {"slicing": 0.5}, {"slicing": 0.0}, reduces=True, within=1e-3),
  Row("compress.prune.sparsegpt", neutral={"sparsity": 0.0}, reduces=True),
  Row("compress.prune.wanda", neutral={"sparsity": 0.0}),
  # The least that a model can be, which a dry run, ignorant of errors, finds too.
  Row(
    "compress.prune.ziplm",
    {"speedup": 4.5, "search": 0},
    {"speedup": 1.0},
    reduces=True,
  ),
  Row(
    "compress.quantize.activations",
    {"bits": 6},
    {"bits": 8},
    done("compress.quantize.activations", bits=8),
  ),
  Row(
    "compress.quantize.adadim",
    {"bits": 3, "group_size": 8},
    {"bits": 4},
    done("compress.quantize.adadim", bits=4, group_size=8),
    reduces=True,
    adapts=True,
  ),
  Row(
    "compress.quantize.agile_quant",
    {"group_size": 8, "act_bits": 6},
    {"act_bits": 8},
    done("compress.quantize.agile_quant", group_size=8),
    reduces=True,
  ),
  Row(
    "compress.quantize.aligned",
    {"bits": 2, "group_size": 4, "wide": 0.25, "align": 3, "outliers": 0.02},
    {"bits": 3},
    done("compress.quantize.aligned", bits=3, group_size=4, wide=0.25, align=3, outliers=0.02),
  ),
  Row(
    "compress.quantize.aqlm",
    {**VQ, "length": 2, "tables": 2, "epochs": 1, "rate": 1e-6},
    {"length": 4, "tables": 1, "epochs": 0},
    done("compress.quantize.aqlm", **VQ, epochs=0),
    reduces=True,
    searches=True,
  ),
  Row(
    "compress.quantize.autoround",
    {"bits": 3, "group_size": 8, "steps": 2},
    {"bits": 4},
    quantized,
    reduces=True,
  ),
  # A group clipped on both sides has its zero point halfway between two codes, where the order of
  # sums decides.
  Row(
    "compress.quantize.awq",
    {"bits": 3, "group_size": 8, "clip": False},
    {"bits": 4},
    done("compress.quantize.awq", bits=4, group_size=8),
    reduces=True,
  ),
  Row("compress.quantize.bias_correction", {}, {"strength": 0.0}, biased, reduces=True, count=1),
  Row("compress.quantize.bitstack", STACK, {"blocks": 2}, stacked, reduces=True),
  Row("compress.quantize.bitstack_cut", {"budget": 0.995}, {"budget": 1.0}, stacked, adapts=True),
  Row("compress.quantize.bitstack_sort", {"select": STACK["select"]}, {}, stacked, reduces=True),
  Row(
    "compress.quantize.cptquant",
    {"average": 2.5, "choices": (2, 3), "group_size": 8},
    {"choices": (2, 4)},
    quantized,
    reduces=True,
    adapts=True,
  ),
  Row(
    "compress.quantize.decoupleq",
    {"bits": 2, "group_size": 8, "rounds": 1, "epochs": 0, "select": VQ["select"]},
    {"bits": 3},
    done("compress.quantize.hqq", bits=3, group_size=8),
    reduces=True,
    within=1e-3,
  ),
  Row("compress.quantize.deepshape", neutral={"shape": 1.0, "scale": 1.0}, reduces=True),
  Row("compress.quantize.dequantize", prepare=quantized),
  Row(
    "compress.quantize.equalize",
    {"kind": "log"},
    {"kind": "cross"},
    done("compress.quantize.equalize"),
    reduces=True,
  ),
  Row(
    "compress.quantize.finequant",
    {"bits": 3, "smallest": 4, "shrink": 0.9},
    {"bits": 4},
    quantized,
    adapts=True,
  ),
  Row(
    "compress.quantize.flexround",
    {"bits": 3, "group_size": 8, "steps": 2, "per": "kernel"},
    {"bits": 4},
    quantized,
    reduces=True,
  ),
  Row("compress.quantize.gptq", {"bits": 3, "group_size": 8}, {"bits": 4}, quantized, reduces=True),
  Row(
    "compress.quantize.gqsa",
    {"group": 8, "bits": 3, "epochs": 1, "rate": 1e-5, "scale_rate": 1e-6, "select": VQ["select"]},
    {"bits": 4},
    done("compress.quantize.gqsa", group=8, epochs=0, select=VQ["select"]),
    reduces=True,
  ),
  Row(
    "compress.quantize.gradient_ptq",
    {"bits": 3, "group_size": 8, "steps": 2, "per": "kernel"},
    {"bits": 4},
    quantized,
    reduces=True,
  ),
  Row(
    "compress.quantize.gwq",
    {"bits": 3, "group_size": 8, "outliers": 0.02},
    {"outliers": 1.0},
  ),
  Row(
    "compress.quantize.hqq",
    {"bits": 3, "group_size": 8},
    {"bits": 4},
    done("compress.quantize.hqq", bits=4, group_size=8),
    reduces=True,
  ),
  Row(
    "compress.quantize.minifloat",
    {"bits": 5, "group_size": 8},
    {"bits": 4},
    quantized,
    adapts=True,
  ),
  Row(
    "compress.quantize.olive",
    {"bits": 8},
    {"bits": 4},
    done("compress.quantize.olive"),
    reduces=True,
  ),
  Row(
    "compress.quantize.outliertune",
    {"bits": 6},
    {"bits": 8},
    done("compress.quantize.outliertune"),
    reduces=True,
  ),
  Row(
    "compress.quantize.ptq161",
    {"salient": 0.4, "epochs": 1, "rate": 1e-6, "scale_rate": 1e-6, "select": VQ["select"]},
    {"salient": 0.2},
    done("compress.quantize.ptq161", epochs=0, select=VQ["select"]),
    reduces=True,
  ),
  # Neutral where nothing is turned.
  Row("compress.quantize.quarot", {}, {"places": ()}, reduces=True),
  Row("compress.quantize.rtn", {"bits": 3, "group_size": 8}, {"bits": 4}, quantized),
  Row(
    "compress.quantize.smoothquant",
    {"alpha": 0.8},
    {"alpha": 0.5},
    done("compress.quantize.smoothquant"),
    reduces=True,
  ),
  # At a larger rate the order of sums decides what is rounded how, and so the turns.
  Row(
    "compress.quantize.spinquant",
    {"steps": 2, "rate": 1e-5},
    {"places": ()},
    reduces=True,
  ),
  Row(
    "compress.quantize.spqr",
    {"bits": 3, "group_size": 8, "outliers": 0.02},
    {"bits": 4},
    done("compress.quantize.spqr", bits=4, group_size=8, outliers=0.02),
    reduces=True,
  ),
  Row(
    "compress.quantize.tune_scales",
    {"steps": 2, "rate": 1e-5},
    {"steps": 0},
    quantized,
    reduces=True,
  ),
  Row("compress.quantize.untie", still=True),
  Row(
    "compress.quantize.vptq",
    {**VQ, "length": 2},
    {"length": 4},
    done("compress.quantize.vptq", **VQ),
    reduces=True,
  ),
  Row(
    "compress.quantize.vq4dit",
    {**VQ, "length": 2, "epochs": 1, "table_rate": 1e-6},
    {"length": 4},
    done("compress.quantize.vq4dit", **VQ, epochs=0),
    reduces=True,
  ),
  Row(
    "compress.quantize.vq_logits",
    {"clusters": 8, "select": VQ["select"]},
    {"clusters": 64},
    reduces=True,
  ),
  Row(
    "edit.rome",
    {"steps": 3, "contexts": 2},
    requests=lambda: (WISH, WISH),
    still=True,
    reduces=True,
  ),
  Row("edit.unlearn.task_negation", neutral={"scale": 0.0}, commutes=True),
  Row("grow.g_stack", {"growth": 2}, {"growth": 1}),
  Row("grow.interpolate", {"growth": 2}, {"growth": 1}),
  Row(
    "merge.adamerging",
    {"steps": 2},
    {"init": 0.0, "steps": 0},
    commutes=True,
    reduces=True,
  ),
  Row("merge.arcee_fusion", neutral={"lam": 0.0}, count=1, reduces=True),
  Row(
    "merge.atlas",
    {"steps": 2, "rate": 0.01},
    {"steps": 0},
    commutes=True,
    reduces=True,
  ),
  # A step so small that rounding, which Adam turns into whole steps, stays within the tolerance.
  Row("merge.bang", {"steps": 2, "rate": 1e-5}, {"alpha": 0.0}, reduces=True),
  Row("merge.breadcrumbs", {"density": 0.3}, {"lam": 0.0}, commutes=True),
  Row("merge.breadcrumbs_ties", {"density": 0.3}, {"lam": 0.0}, commutes=True),
  Row("merge.consensus", {"lam": 0.3}, {"alpha": 0.0}, commutes=True),
  Row(
    "merge.dam",
    {"mask_steps": 2, "mask_rate": 1e-5, "steps": 2},
    {"init": 0.0, "mask_steps": 0, "steps": 0},
    commutes=True,
    reduces=True,
  ),
  Row("merge.dare_linear", {"density": 0.5}, {"lam": 0.0}),
  Row("merge.dare_ties", {"rescale": "l1"}, {"lam": 0.0}, reduces=True),
  Row("merge.della", neutral={"lam": 0.0}),
  Row("merge.della_linear", {"rescale": "l1"}, {"lam": 0.0}, reduces=True),
  Row("merge.emr", {"task": 1}, {"alpha": 0.0}, reduces=True),
  Row("merge.fisher", {"floor": 1e-9}, {"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.iso_c", {"lam": 0.5}, {"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.iso_cts", {"common": 0.5}, {"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.karcher", neutral={"weights": (1.0, 0.0, 0.0)}, commutes=True, reduces=True),
  Row("merge.knots", {"density": 0.3}, {"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.layer_swap", {"bottom": 1, "top": 0}, {"bottom": 0}, count=1),
  Row("merge.linear", {"weights": (1.0, 0.5, 0.5)}, {"weights": (1.0, 0.0, 0.0)}, commutes=True),
  Row("merge.magmax", neutral={"lam": 0.0}, commutes=True),
  Row("merge.model_stock", neutral={"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.multislerp", neutral={"weights": (1.0, 0.0, 0.0)}, commutes=True, reduces=True),
  Row("merge.nearswap", {"t": 0.01}, {"t": 0.0}, count=1),
  Row("merge.nuslerp", neutral={"weights": (1.0, 0.0)}, count=1, reduces=True),
  Row("merge.opcm", {"alpha": 0.4}, {"lam": 0.0}, reduces=True),
  Row("merge.optmerge", {"steps": 2}, {"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.passthrough", {"scale": 0.5}, {"scale": 1.0}),
  Row("merge.pcb", {"density": 0.3}, {"lam": 0.0}, commutes=True, reduces=True),
  Row(
    "merge.pleas",
    {"ratio": ((".*/mlp", 0.5), (".*", 0.0)), "ridge": 0.05},
    {"ratio": 0.0, "weights": (1.0, 0.0)},
    reduces=True,
    count=1,
  ),
  Row("merge.ram", {"epsilon": 0.01}, {"epsilon": 1e9}, commutes=True),
  Row("merge.ramplus_tl", {"epsilon": 0.01}, {"epsilon": 1e9}, commutes=True),
  Row("merge.rebasin", {"weights": (1.0, 0.5, 0.5)}, {"weights": (1.0, 0.0, 0.0)}),
  Row("merge.regmean", neutral={"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.regmean_pp", neutral={"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.robust_weight_signatures", {"layers": 1}, {"alpha": 0.0}, reduces=True),
  Row(
    "merge.salsa",
    {"steps": 2, "optimizer": "sgd", "rate": 0.01},
    {"steps": 0},
    commutes=True,
    reduces=True,
    batches=pairs,
  ),
  Row("merge.sce", {"select_topk": 0.3}, {"select_topk": 0.0}, commutes=True, reduces=True),
  Row("merge.slerp", {"t": 0.3}, {"t": 0.0}, count=1, reduces=True),
  Row("merge.soup_greedy", neutral={"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.soup_learned", {"steps": 2}, {"lam": 0.0}, commutes=True, reduces=True),
  Row(
    "merge.sparse_model_soups",
    {"sparsity": 0.5, "copies": 2, "steps": 2, "rate": 1e-5},
    {"sparsity": 0.0, "steps": 0},
    reduces=True,
  ),
  Row("merge.tall_masks", {"task": 1}, {"alpha": 0.0}),
  Row("merge.task_arithmetic", {"lam": 0.3}, {"lam": 0.0}, commutes=True),
  Row("merge.ties", {"density": 0.3}, {"lam": 0.0}, commutes=True),
  Row("merge.tsv_merge", {"lam": 0.5}, {"lam": 0.0}, commutes=True, reduces=True),
  Row(
    "merge.twin",
    {"router": (1.0, 0.5), "rank": 0.5},
    {"lam": 0.0, "router": (0.0, 0.0)},
    reduces=True,
  ),
  Row(
    "merge.unconstrained",
    {"methods": ("task_arithmetic", "dare"), "budget": 2},
    {"init": 0.0, "budget": 1},
    reduces=True,
  ),
  Row("merge.wise_ft", {"alpha": 0.3}, {"alpha": 0.0}, count=1),
  Row("merge.wudi", {"steps": 2}, {"lam": 0.0}, commutes=True, reduces=True),
)
EXTRA = (
  # Settings whose code path differs enough to hold the laws by itself.
  Row("compress.prune.magnitude", {"per": "model"}, {"sparsity": 0.0}),
  Row("compress.prune.wanda", {"pattern": "2:4", "packed": True}, {"pattern": "4:4"}),
  Row("compress.quantize.quarot", {"places": ("down",)}, {"places": ()}, reduces=True),
  Row(
    "merge.breadcrumbs",
    {"density": 0.3, "gamma": 0.1, "granularity": "row"},
    {"lam": 0.0},
    commutes=True,
  ),
  Row("merge.fisher", {"normalize": True}, {"lam": 0.0}, commutes=True, reduces=True),
  Row("merge.nuslerp", {"flatten": False}, {"weights": (1.0, 0.0)}, count=1, reduces=True),
  Row("merge.ties", {"density": 0.3, "granularity": "global"}, {"lam": 0.0}, commutes=True),
  Row(
    "merge.optmerge",
    {"steps": 2, "variant": "lora"},
    {"lam": 0.0},
    commutes=True,
    reduces=True,
  ),
  Row(
    "merge.wudi",
    {"solver": "closed", "time": 10.0},
    {"lam": 0.0},
    commutes=True,
    reduces=True,
  ),
  Row("merge.opcm", {"granularity": "tensor"}, {"lam": 0.0}, reduces=True),
)

# What `make test` runs of the suite; `make test-all` runs all of it. Rows of FULL hold every law in
# both. The others share their lift with one of these and run the laws in LIGHT; compression and
# what learns or searches, which have tests of their outcomes, of those the ones that need none.
FULL = {
  "adapt.lora", "adapt.merge", "compress.prune.magnitude", "compress.prune.wanda",
  "compress.quantize.gptq", "compress.quantize.rtn", "edit.rome", "edit.unlearn.task_negation",
  "grow.g_stack", "grow.interpolate", "merge.dare_linear", "merge.fisher", "merge.layer_swap",
  "merge.linear", "merge.opcm", "merge.regmean", "merge.slerp", "merge.task_arithmetic",
  "merge.ties", "merge.tsv_merge",
}  # fmt: skip
LEARN = {
  "compress.distill.logits", "compress.low_rank.pela", "compress.prune.gradual",
  "compress.prune.minitron", "compress.prune.slicegpt", "compress.prune.ziplm",
  "compress.quantize.aqlm", "compress.quantize.autoround", "compress.quantize.bitstack",
  "compress.quantize.bitstack_sort", "compress.quantize.decoupleq", "compress.quantize.flexround",
  "compress.quantize.gqsa", "compress.quantize.gradient_ptq", "compress.quantize.ptq161",
  "compress.quantize.spinquant", "compress.quantize.tune_scales", "compress.quantize.vptq",
  "compress.quantize.vq4dit", "merge.adamerging", "merge.arcee_fusion", "merge.atlas", "merge.bang",
  "merge.dam", "merge.optmerge", "merge.pcb", "merge.pleas", "merge.rebasin", "merge.salsa",
  "merge.soup_learned", "merge.sparse_model_soups", "merge.unconstrained", "merge.wudi",
}  # fmt: skip
LIGHT = {
  "test_eval_shape_agrees", "test_it_changes_something", "test_spelling_and_info_round_trip",
  "test_the_neutral_setting_is_the_identity",
}  # fmt: skip
OUTCOMES = {"test_eval_shape_agrees", "test_it_changes_something"}
DEAR = {"test_compilations_do_not_grow_with_depth", "test_the_storage_dtype_is_kept"}
# Whose programs take many seconds to compile leave these laws too.
LARGE = {
  "compress.quantize.gptq": {"test_compilations_do_not_grow_with_depth"},
  "edit.rome": DEAR,
  "merge.dam": {"test_eval_shape_agrees"},
  "merge.sparse_model_soups": {"test_eval_shape_agrees"},
}


def slow(row: Row, law: str) -> bool:
  """Tell whether `make test` leaves a law out for a row."""
  if law in LARGE.get(row.name, ()):
    return True
  if row.name not in FULL:
    light = row.name not in LEARN and not row.name.startswith("compress.")
    return law not in (LIGHT if light else LIGHT - OUTCOMES)
  return law in DEAR and row in EXTRA


SPEC = models.Spec(vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=32, max_positions=32)
# Of other shapes, so that nothing is compiled yet; few different ones, to keep the suite quick.
WIDER = models.Spec(vocab_size=48, d_model=24, num_layers=3, num_heads=2, d_ff=48, max_positions=32)
TEXT = [np.random.default_rng(0).integers(0, 32, (4, 16))]


@functools.lru_cache(maxsize=32)
def tiny(spec: models.Spec = SPEC, *, seed: int = 0, dtype: str = "float32") -> model.Model:
  """Return a tiny model; drawn by numpy, which compiles nothing."""
  rng = np.random.default_rng(seed)

  def draw(x: Any) -> jax.Array:
    return jnp.asarray((0.1 * rng.standard_normal(x.shape) + (x.ndim == 2)).astype(dtype))

  shapes = jax.eval_shape(lambda: models.init(spec, jax.random.key(0)))
  return model.Model(spec, jax.tree.map(draw, shapes))


def donors(base: model.Model, count: int) -> list[model.Model]:
  """Return models near the base, as fine-tuned ones are."""
  made = []
  for seed in range(1, count + 1):
    rng = np.random.default_rng(100 + seed)

    def near(x: Any, rng: np.random.Generator = rng) -> jax.Array:
      step = 0.02 * rng.standard_normal(x.shape)
      return jnp.asarray((np.asarray(x, np.float32) + step).astype(x.dtype))

    flat = {k: near(leaves.dense(x)) for k, x in paths.walk(base.params).items()}
    made.append(base.replace(params=paths.nest(flat)))
  return made
