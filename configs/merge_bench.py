# SPDX-License-Identifier: Apache-2.0
"""Which merge to pick? Experts on small real tasks, merged by every method (after MergeBench).

Expected, and checked by the report's claims: tuned task arithmetic has its best λ inside the grid
and collapses at λ = 1 as experts are added; a task's own TALL mask nearly restores its expert;
RegMean++ >= RegMean >= average; AdaMerging by tensor >= by task; DARE at a keep rate of 0.1 needs
its rescaling; a stronger base merges better. What held is in `docs/merge_bench.md`.

Cost: about 20 minutes a seed on one CPU core, two minutes on an H200; digits 4 minutes. Command:
python -P -m treesurgeon.experiments.merge_bench --config=configs/merge_bench.py --workdir=DIR

Variants: `:smoke` runs everything at toy size; `:digits` is the same on handwritten digits.
"""

import re

import ml_collections

TASKS = ("counting", "sorting", "telegram", "facts", "capitals", "weather", "code", "prose")
HELD_OUT = ("recipes",)
# What the base is trained on: text, and a taste of everything but the facts, which only an expert
# can know.
MIXTURE = {
  "code": 0.42, "prose": 0.42, "telegram": 0.02, "weather": 0.02, "recipes": 0.04,
  "counting": 0.03, "sorting": 0.02, "capitals": 0.03,
}  # fmt: skip
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
SCALES = (0.3, 0.5, 0.7, 1.0, 1.5)
ADA = "steps=200, rate=0.005"  # fewer and larger steps than the published 1000 of 0.001
# What every cell runs; the rest is compared in the first cell.
LEARNED = ("WUDI", "OptMerge", "AdaMerging, by task", "AdaMerging, by tensor", "aTLAS",
           "learned soup")  # fmt: skip
CORE = ("average", "task arithmetic", "TIES", "DARE", "TSV", "ISO-C", "RegMean")


def methods() -> dict:
  """List the methods: a transform with a place for its searched hyper-parameter.

  Returns:
    Name to settings: "transform", "grid"; "per_task" where each task has a model of its own.
  """
  out = {
    "average": {"transform": "merge.task_arithmetic(normalize=True)"},
    "task arithmetic": {"transform": "merge.task_arithmetic(lam={x})", "grid": LAMBDAS},
    "TIES": {"transform": "merge.ties(density=0.2, lam={x})", "grid": SCALES},
    "DARE": {
      "transform": "merge.dare_linear(density=0.1, lam={x}, rescale='expected')", "grid": LAMBDAS,
    },
    "DARE, not rescaled": {
      "transform": "merge.dare_linear(density=0.1, lam={x}, rescale='none')", "grid": LAMBDAS,
    },
    "DARE TIES": {"transform": "merge.dare_ties(density=0.5, lam={x})", "grid": SCALES},
    "DELLA": {"transform": "merge.della(density=0.5, lam={x})", "grid": SCALES},
    "breadcrumbs": {"transform": "merge.breadcrumbs(density=0.9, lam={x})", "grid": LAMBDAS},
    "consensus": {"transform": "merge.consensus(alpha={x})", "grid": LAMBDAS},
    "PCB": {"transform": "merge.pcb(lam={x})", "grid": SCALES},
    "model stock": {"transform": "merge.model_stock()"},
    "SCE": {"transform": "merge.sce()"},
    "Karcher": {"transform": "merge.karcher()"},
    "TSV": {"transform": "merge.tsv_merge(lam={x})", "grid": SCALES},
    "ISO-C": {"transform": "merge.iso_c(lam={x})", "grid": SCALES},
    "WUDI": {"transform": "merge.wudi()"},
    "OptMerge": {"transform": "merge.optmerge(lam={x})", "grid": LAMBDAS},
    "OPCM": {"transform": "merge.opcm()"},
    "EMR": {"transform": "merge.emr(task={task})", "per_task": True},
    "TALL masks": {"transform": "merge.tall_masks(task={task})", "per_task": True},
    "Fisher": {"transform": "merge.fisher()"},
    "RegMean": {"transform": "merge.regmean()"},
    "RegMean++": {"transform": "merge.regmean_pp()"},
    "AdaMerging, by task": {"transform": f"merge.adamerging(granularity='task', {ADA})"},
    "AdaMerging, by tensor": {"transform": f"merge.adamerging({ADA})"},
    "aTLAS": {"transform": "merge.atlas()"},
    "learned soup": {"transform": "merge.soup_learned()"},
    "greedy soup": {"transform": "merge.soup_greedy()"},
    "MagMax": {"transform": "merge.magmax(lam={x})", "grid": LAMBDAS},
  }  # fmt: skip
  return {n: m if n in CORE else {**m, "only": ("default",)} for n, m in out.items()}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, "smoke" for toy size, "digits" for the classifier.

  Returns:
    "default" factors, "cells" that change some of them, their "order", "methods", "seeds".
  """
  if arg not in (None, "smoke", "digits"):
    raise ValueError(f"the merge benchmark has no variant {arg!r}; it has smoke and digits")
  default = {
    "suite": "language",
    "tasks": TASKS,
    "held_out": HELD_OUT,
    "mixture": MIXTURE,
    "experts": 4,
    "items": 192,
    "length": 48,
    "spec": {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 256},
    "base": {"steps": 1500, "lr": 4e-3, "batch": 24},
    "tuning": "full",
    "full": {"steps": 250, "lr": 1e-3, "batch": 24},
    "lora": {"steps": 250, "lr": 4e-3, "batch": 24, "rank": 8},
  }
  cells: dict = {
    "default": {},
    "2 experts": {"experts": 2},
    "8 experts": {"experts": 8},
    "weak base": {"base": {**default["base"], "steps": 400}},
    "small": {"spec": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 128}},
    "LoRA": {"tuning": "lora"},
  }
  seeds = (0, 1, 2)
  named = methods()
  if arg == "digits":
    default |= {
      "suite": "digits",
      "tasks": ("rotated", "parity", "shifted", "relabelled", "inverted", "larger", "scrambled",
                "digits"),
      "held_out": (),
      "mixture": {
        "digits": 0.88, "rotated": 0.03, "inverted": 0.03, "shifted": 0.03, "larger": 0.03,
      },
      "spec": {"kind": "mlp", "d_model": 128, "num_layers": 3, "norm": "layer", "residual": True},
      "base": {"steps": 400, "lr": 2e-3, "batch": 64},
      "full": {"steps": 150, "lr": 1e-3, "batch": 64},
      "lora": {"steps": 200, "lr": 4e-3, "batch": 64, "rank": 4},
    }  # fmt: skip
    cells |= {
      "weak base": {"base": {**default["base"], "steps": 60}},
      "small": {"spec": {**default["spec"], "d_model": 48}},
      "ViT": {"spec": {"kind": "vit", "d_model": 48, "num_layers": 2, "num_heads": 4,
                       "patch_size": 2, "norm": "layer"}},
    }  # fmt: skip
  if arg == "smoke":
    short = {"steps": 3, "lr": 1e-3, "batch": 4}
    default |= {
      "spec": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64}, "items": 8,
      "tasks": ("telegram", "weather"), "experts": 2, "length": 48,
      "base": {"steps": 60, "lr": 4e-3, "batch": 8}, "full": short, "lora": {**short, "rank": 2},
    }  # fmt: skip
    cells = {"default": {}, "LoRA": {"tuning": "lora"}}
    seeds = (0,)
    # One value of each grid, and few steps of what learns.
    named = {n: {**m, "grid": m["grid"][:1]} if "grid" in m else m for n, m in named.items()}
    for n in LEARNED:
      head, _, rest = named[n]["transform"].partition("(")
      rest = re.sub(r"steps=\d+, |, steps=\d+|steps=\d+", "", rest)
      named[n] = {**named[n], "transform": f"{head}(steps=2{', ' if rest != ')' else ''}{rest}"}
  return ml_collections.ConfigDict(
    {"default": default, "cells": cells, "order": tuple(cells), "methods": named,
     "seeds": seeds},
    convert_dict=True,
  )  # fmt: skip
