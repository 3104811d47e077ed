# SPDX-License-Identifier: Apache-2.0
"""Do networks trained apart lie in one basin, up to the order of their units? (Git Re-Basin)

Multilayer perceptrons of three widths and a conv net on scikit-learn's handwritten digits, and
small language models on a grammar of weather reports, each pair from two seeds or from one base;
and digit classifiers that saw mostly half of the classes each, merged at several widths (PLeaS).
The claims are numbers that are negative where a claim holds; one is counted as reproduced if it
holds for every seed. What held is noted in the registry's rows of `merge.rebasin`, `merge.pleas`.

Cost: about two minutes a seed on two CPU cores. Needs scikit-learn (the extra "eval"). Command:
python -P -m treesurgeon.experiments.connectivity --config=configs/connectivity.py --workdir=DIR

Variants: `configs/connectivity.py:smoke` runs every cell at toy size, where no claim need hold.
"""

import ml_collections

ALL = ("weight", "activation", "ste")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Build the config.

  Args:
    arg: None, or "smoke" for toy size.

  Returns:
    "seeds"; "cells", by name in "order": a pair of networks and what is done to it; "claims".

  Raises:
    ValueError: for another variant.
  """
  if arg not in (None, "smoke"):
    raise ValueError(f"configs/connectivity.py has no variant {arg!r}; valid: smoke")
  smoke = arg == "smoke"
  steps = 5 if smoke else 400
  digits = {
    "data": "digits", "steps": steps, "batch": 128, "rate": 1e-3, "branch": 0, "methods": ALL[:2],
    "points": 3 if smoke else 11, "ste": 2 if smoke else 100,
  }  # fmt: skip

  def mlp(width: int) -> dict:
    return {"kind": "mlp", "d_model": 16 if smoke else width, "num_layers": 2}

  text = {
    **digits, "data": "weather", "batch": 16, "rate": 3e-3, "methods": ALL[:1],
    "spec": {"d_model": 16 if smoke else 64, "num_layers": 2, "num_heads": 2,
             "d_ff": 32 if smoke else 256},
  }  # fmt: skip
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if smoke else (0, 1, 2)
  config.cells = {
    "mlp 32": {**digits, "spec": mlp(32)},
    "mlp 128": {**digits, "spec": mlp(128), "methods": ALL},
    "mlp 512": {**digits, "spec": mlp(512)},
    "conv": {**digits, "spec": {"kind": "conv", "d_model": 8 if smoke else 48, "num_layers": 2,
                                "patch_size": 2}},
    "language models, two seeds": text,
    "language models, one base": {**text, "branch": steps // 2, "steps": steps // 2},
    "halves of the classes": {**digits, "spec": mlp(128), "split": 0.9,
                              "ratios": (0.0, 0.5) if smoke else (0.0, 0.25, 0.5, 1.0)},
  }  # fmt: skip
  config.order = tuple(config.cells)
  config.claims = tuple(_claims().items())
  return config


def _claims() -> dict[str, list[tuple[float, str, str, str]]]:
  """Name each claim: terms (coefficient, cell, arm, quantity), their sum below zero if it holds."""

  def less(cell: str, a: str, b: str, quantity: str = "barrier") -> list:
    return [(1.0, cell, a, quantity), (-1.0, cell, b, quantity)]

  def more(cell: str, a: str, b: str, quantity: str = "accuracy") -> list:
    return less(cell, b, a, quantity)

  plain, weight = "as trained", "weight"
  nets = ("mlp 32", "mlp 128", "mlp 512", "conv", "language models, two seeds")
  half = "halves of the classes"
  claims = {
    f"merge.rebasin: weight matching lowers the barrier, {n}": less(n, weight, plain) for n in nets
  }
  for n in ("mlp 32", "mlp 128", "mlp 512", "conv"):
    claims[f"merge.rebasin: activation matching lowers it too, {n}"] = less(n, "activation", plain)
  claims |= {
    "merge.rebasin: the straight-through estimator lowers it too, mlp 128": (
      less("mlp 128", "ste", plain)
    ),
    "merge.rebasin: wider networks are nearer to one basin, 512 against 32": [
      (1.0, "mlp 512", weight, "barrier"), (-1.0, "mlp 32", weight, "barrier"),
    ],
    "merge.rebasin: the large singular vectors turn to each other, mlp 512": (
      more("mlp 512", weight, plain, "R 0.3")
    ),
    "merge.rebasin: the L2 distance falls by less than a quarter, mlp 512": [
      (-1.0, "mlp 512", weight, "distance"), (0.75, "mlp 512", plain, "distance"),
    ],
    "merge.pleas: at equal width better than averaging": more(half, "pleas 0", "average"),
    "merge.pleas: at equal width better than matching alone": more(half, "pleas 0", "activation"),
    "merge.pleas: better half as wide again": more(half, "pleas 0.5", "pleas 0"),
    "merge.pleas: better than either network": [
      (0.5, half, "first", "accuracy"), (0.5, half, "second", "accuracy"),
      (-1.0, half, "pleas 0", "accuracy"),
    ],
  }  # fmt: skip
  return claims
