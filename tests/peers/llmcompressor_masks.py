# SPDX-License-Identifier: Apache-2.0
"""Prune fixed problems with llm-compressor and save what it keeps, and at what error.

It runs in llm-compressor's own environment, as `llmcompressor_codes.py`, whose problems these are:

  python tests/peers/llmcompressor_masks.py tests/peers/prune_masks.npz

wrote the committed file, with the versions named there. `prune_test.py` runs it again where the
environment is there and reads the file otherwise.
"""

import itertools
import pathlib
import runpy
import sys

import numpy as np

CASES = [
  {"method": method, "problem": problem, "sparsity": sparsity, "pattern": pattern}
  for method, problem, (sparsity, pattern) in itertools.product(
    ("sparsegpt", "wanda"),
    ("random", "correlated"),
    ((0.5, None), (0.8, None), (0.5, (2, 4)), (0.5, (4, 8))),
  )
]
problem = runpy.run_path(str(pathlib.Path(__file__).parent / "llmcompressor_codes.py"))["problem"]


def name(case):
  """Names a case in the file."""
  return "{method}-{problem}-{sparsity}-{pattern}".format(**case).replace(" ", "")


def error(w, h, pruned):
  """Computes tr(dWᵀ H dW) / tr(Wᵀ H W) in float64."""
  w, h = w.astype(np.float64), h.astype(np.float64)
  wrong = np.asarray(pruned, np.float64) - w
  return np.einsum("ic,ij,jc->", wrong, h, wrong) / np.einsum("ic,ij,jc->", w, h, w)


def prune(case):
  """Returns llm-compressor's pruned weights (in, out)."""
  import torch
  from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
  from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

  w, h = problem(case["problem"])
  layer = torch.nn.Linear(*w.shape, bias=False)
  layer.weight.data = torch.tensor(w.T.copy())
  n, m = case["pattern"] or (0, 0)
  common = {"sparsity": case["sparsity"], "prune_n": m - n, "prune_m": m}
  with torch.no_grad():
    if case["method"] == "wanda":
      pruned = wanda_sparsify.sparsify_weight(layer, {layer: torch.tensor(np.diag(h))}, **common)
    else:
      _, pruned = sgpt_sparsify.sparsify_weight(
        layer, {layer: torch.tensor(h)}, **common, block_size=128, dampening_frac=0.01,
        preserve_sparsity_mask=False,
      )  # fmt: skip
  return pruned.numpy().T


def main(path):
  """Writes every case's mask, as bits, and error to one compressed file."""
  found = {}
  for case in CASES:
    pruned = prune(case)
    found[f"{name(case)}/kept"] = np.packbits(pruned != 0)
    found[f"{name(case)}/error"] = error(*problem(case["problem"]), pruned)
  np.savez_compressed(path, **found)


if __name__ == "__main__":
  main(sys.argv[1])
