# SPDX-License-Identifier: Apache-2.0
"""Tune the rounding of fixed problems with auto-round's own parts and save what comes out.

  python tests/peers/autoround_steps.py tests/peers/autoround_steps.npz

wrote the committed file in the environment of llm-compressor (see `llmcompressor_codes.py`), with
auto-round 0.15.1 and torch 2.13.0 on a CPU. Its quantization functions and its optimizer run in the
loop of its `quantize_layer`, on all the data at each step.
"""

import sys

import numpy as np

STEPS, GROUP = 200, 32
CASES = [(4, False), (2, False), (4, True), (2, True)]


def name(case):
  """Names a case in the file."""
  return f"{case[0]}-{'symmetric' if case[1] else 'asymmetric'}"


def problem():
  """Draws weights (in, out) and correlated inputs."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((192, 12)) @ rng.standard_normal((12, 64)) / 3
  x = x + 0.3 * rng.standard_normal((192, 64))
  return (rng.standard_normal((64, 24)) / 8).astype(np.float32), x.astype(np.float32)


def tune(case):
  """Returns the weights (in, out) that auto-round arrives at."""
  import torch
  from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
  from auto_round.data_type import int as kinds

  bits, symmetric = case
  quantize = kinds.quant_tensor_sym_gptq if symmetric else kinds.quant_tensor_asym
  w, x = (torch.tensor(a) for a in problem())
  w = w.T.contiguous()
  groups = w.numel() // GROUP
  v = torch.zeros(groups, GROUP, requires_grad=True)
  low, high = (torch.ones(groups, requires_grad=True) for _ in range(2))
  optimizer = SignSGD([v, low, high], lr=torch.tensor(1.0 / STEPS), weight_decay=0)
  falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
  best, least = None, np.inf
  for _ in range(STEPS):
    for bound in (low, high):
      bound.data.clamp_(0, 1)
    made, _, _ = quantize(
      w, bits=bits, group_size=GROUP, v=v, min_scale=low, max_scale=high,
      scale_dtype=torch.float32, q_scale_thresh=1e-8,
    )  # fmt: skip
    loss = torch.nn.functional.mse_loss(x @ made.T, x @ w.T)
    if loss.item() < least:
      best, least = made.detach().numpy().T.copy(), loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    falling.step()
  return best


if __name__ == "__main__":
  np.savez_compressed(sys.argv[1], **{name(c): tune(c) for c in CASES})
