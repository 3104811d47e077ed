# SPDX-License-Identifier: Apache-2.0
"""Does each method show its paper's direction here? The quickstart with more arms, three seeds.

The claims are linear forms in held-out bits per byte that are negative where a claim holds; one is
counted as reproduced if it holds for every seed. Expect: all of them, see `docs/methods.md`.

Cost: about ten minutes a seed on two CPU cores. Command:
python -P -m treesurgeon.experiments.directions --config=configs/directions.py --workdir=DIR

Variants: `configs/directions.py:smoke` runs every arm at toy size, where no claim need hold.
"""

import ml_collections

from treesurgeon.configs import quickstart


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    The quickstart's config with more stages, "seeds" and "claims".
  """
  config = quickstart.get_config(arg)
  config.seeds = (0,) if arg == "smoke" else (0, 1, 2)
  plain = config.to_dict()
  stages = {name: plain["stages"][name] for name in plain["order"] if name != "edited"}
  calibrated = {"calibration": quickstart.TEXTS, "driver": "blockwise"}

  def prune(expression: str, **rest: object) -> dict:
    return {"kind": "transform", "model": "merged", "transform": expression, **rest}

  expert = stages["code_expert"]
  stages |= {
    "interpolated": {**stages["grown"], "transform": "grow.interpolate(growth=2)"},
    "lora": {**expert, "transform": "adapt.lora(rank=8)", "types": ("LowRank",)},
    "negated": {
      "kind": "transform", "model": "grown", "donors": ("code_expert",),
      "transform": "edit.unlearn.task_negation()",
    },
    "arithmetic": {
      "kind": "transform", "model": "grown", "donors": ("code_expert", "prose_expert"),
      "transform": "merge.task_arithmetic(lam=0.5)",
    },
    "rtn_2bit": prune("compress.quantize.rtn(bits=2, group_size=32)"),
    "gptq_2bit": prune("compress.quantize.gptq(bits=2, group_size=32)", **calibrated),
    "magnitude": prune("compress.prune.magnitude(sparsity=0.5)"),
    "wanda": prune("compress.prune.wanda(sparsity=0.5)", **calibrated),
    "wanda_2_4": prune("compress.prune.wanda(pattern='2:4')", **calibrated),
  }  # fmt: skip
  config.stages, config.order = stages, tuple(n for n in stages if n != "export")
  config.claims = tuple(_claims().items())  # names hold dots, which no key may
  return config


def _claims() -> dict[str, list[tuple[float, str, str]]]:
  """Name each claim: terms (coefficient, stage, text) whose sum is below zero where it holds."""

  def less(a: str, b: str, text: str = "code") -> list[tuple[float, str, str]]:
    return [(1.0, a, text), (-1.0, b, text)]

  def both(a: str, b: str) -> list[tuple[float, str, str]]:
    return less(a, b) + less(a, b, "prose")

  return {
    "grow.g_stack: beats training from scratch at equal FLOPs": both("grown", "scratch"),
    "grow.g_stack: beats never growing at equal FLOPs": both("grown", "never_grown"),
    "grow.g_stack: beats interpolation": both("grown", "interpolated"),
    "merge.linear: the average beats the worse expert on code": less("average", "prose_expert"),
    "merge.linear: the average beats the worse expert on prose": (
      less("average", "code_expert", "prose")
    ),
    "merge.ties: the merge beats the worse expert on code": less("merged", "prose_expert"),
    "merge.ties: the merge beats the worse expert on prose": less("merged", "code_expert", "prose"),
    "merge.ties: beats the plain average over both texts": both("merged", "average"),
    "merge.task_arithmetic: beats the model before specialising": both("arithmetic", "grown"),
    "compress.quantize.gptq: beats RTN at 4 bits": both("gptq_4bit", "rtn_4bit"),
    "compress.quantize.gptq: beats RTN at 3 bits": both("gptq_3bit", "rtn_3bit"),
    "compress.quantize.gptq: beats RTN at 2 bits": both("gptq_2bit", "rtn_2bit"),
    "compress.prune.wanda: beats magnitude at 50 %": both("wanda", "magnitude"),
    "compress.prune.wanda: 50 % anywhere beats 2:4": both("wanda", "wanda_2_4"),
    "adapt.lora: learns the task": less("lora", "grown"),
    "adapt.lora: loses less of the other text than full fine-tuning": (
      less("lora", "code_expert", "prose")
    ),
    "edit.unlearn.task_negation: forgets": less("grown", "negated"),
    "edit.unlearn.task_negation: forgets the target more than the rest": (
      less("grown", "negated") + less("negated", "grown", "prose")
    ),
  }
