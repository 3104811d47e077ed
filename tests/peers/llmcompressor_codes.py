# SPDX-License-Identifier: Apache-2.0
"""Quantize fixed problems with llm-compressor and save its codes.

llm-compressor pins an older transformers than the other peers, so it has an environment of its
own (`make test-peers` makes it) and this script runs there:

  python tests/peers/llmcompressor_codes.py tests/peers/gptq_codes.npz

wrote the committed file, with llmcompressor 0.14.0.1, compressed-tensors 0.19.0 and torch 2.13.0 on
a CPU.
`gptq_test.py` runs it again where the environment is there and reads the file otherwise.
"""

import itertools
import sys

import numpy as np

CASES = [
  {"bits": bits, "symmetric": symmetric, "act_order": act_order, "problem": problem}
  for problem, bits, symmetric, act_order in itertools.product(
    ("random", "correlated"), (4, 3), (True, False), (False, True)
  )
]
GROUP = 128


def name(case):
  """Names a case in the file."""
  return "{problem}-{bits}-{symmetric}-{act_order}".format(**case)


def problem(kind):
  """Draws weights (in, out) and a Hessian; "correlated" is as ill-conditioned as trained layers."""
  rows, cols = (384, 96) if kind == "random" else (256, 128)
  rng = np.random.default_rng(len(kind))
  w = (rng.standard_normal((rows, cols)) / rows**0.5).astype(np.float32)
  x = rng.standard_normal((4 * rows, rows))
  if kind == "correlated":
    low = rng.standard_normal((rows, rows // 8)) @ rng.standard_normal((rows // 8, rows))
    x = (x @ (low / rows**0.5 + 0.2 * np.eye(rows))) * np.exp(rng.standard_normal(rows))
  return w, (2 * x.T @ x / len(x)).astype(np.float32)


def quantize(case):
  """Returns llm-compressor's unsigned codes (in, out), scales and zero points (groups, out)."""
  import torch
  from compressed_tensors.quantization import QuantizationArgs
  from compressed_tensors.quantization.utils import calculate_qparams
  from llmcompressor.modifiers.gptq import gptq_quantize

  w, h = problem(case["problem"])
  weight = torch.tensor(w.T.copy())
  args = QuantizationArgs(
    num_bits=case["bits"], type="int", symmetric=case["symmetric"], strategy="group",
    group_size=GROUP, actorder="weight" if case["act_order"] else None,
  )  # fmt: skip
  groups = weight.reshape(weight.shape[0], -1, GROUP)
  scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
  dense, _, fell_back = gptq_quantize.quantize_weight(
    weight[None].clone(), torch.tensor(h)[None].clone(), scale[None], zero[None], None, args
  )
  assert not fell_back.any()
  half = 2 ** (case["bits"] - 1)
  scale, zero = scale.numpy().T, zero.numpy().T.astype(np.int64) + half
  wide_scale, wide_zero = np.repeat(scale, GROUP, 0), np.repeat(zero, GROUP, 0)
  codes = np.round(dense[0].numpy().T / wide_scale).astype(np.int64) + wide_zero
  return codes.astype(np.uint8), scale, zero.astype(np.uint8)


def main(path):
  """Writes every case's codes to one compressed file."""
  found = {}
  for case in CASES:
    for part, value in zip(("codes", "scales", "zeros"), quantize(case), strict=True):
      found[f"{name(case)}/{part}"] = value
  np.savez_compressed(path, **found)


if __name__ == "__main__":
  main(sys.argv[1])
