# SPDX-License-Identifier: Apache-2.0
"""What training costs, from the architecture alone: the clock by which runs are compared.

Kaplan et al. (arXiv:2001.08361, section 2.1) count 6 operations a weight and token. We count the
weights that multiply activations, so the head (also a tied one) but no table that is only looked
up, and of experts as many as a token goes to; and add attention's two products as Chowdhery et al.
(arXiv:2204.02311, appendix B) do.
"""

from typing import Any

from treesurgeon import models


def train_flops(spec: Any, tokens: int, seq: int) -> float:
  """Count the floating-point operations of training on tokens: forward, and backward twice that.

  Causal attention counts in full, half of it being masked; a window counts as far as it reaches.
  Recomputed activations do not count, since they are no progress.

  Args:
    spec: the architecture.
    tokens: how many tokens, or images.
    seq: tokens in a sequence; of no account for an image classifier.

  Returns:
    Operations, a multiplication and an addition being two.

  Example:
    >>> spec = models.Spec(vocab_size=8, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> train_flops(spec, 10, 5)
    25920.0
  """
  if isinstance(spec, models.VisionSpec):
    return float(tokens) * _image(spec)
  attention = 0
  for heads, window in zip(spec.per_layer("num_heads"), spec.per_layer("window"), strict=True):
    reach = min(seq, window) if window else seq
    attention += 12 * heads * spec.head_dim * reach
  return float(tokens) * (6 * weights(spec) + attention)


def weights(spec: Any) -> int:
  """Count the weights that multiply activations once a token.

  Args:
    spec: the architecture.

  Returns:
    The entries of all kernels, and of the embedding where it is the head too.

  Example:
    >>> weights(models.Spec(vocab_size=8, d_model=4, num_layers=2, num_heads=1, d_ff=8))
    352
  """
  total, experts = 0, 0
  for address, shape in models.addresses(spec).items():
    if address.endswith("/kernel") and not address.startswith("pooler"):
      if "/experts/" in address:
        experts += shape[0] * shape[1]
      else:
        total += shape[0] * shape[1]
  total += experts * spec.experts_per_token // max(1, spec.num_experts)  # all are alike
  tied_head = spec.tied and (spec.kind == "decoder" or spec.mlm_head)
  return total + (spec.vocab_size * spec.d_model if tied_head else 0)


def _image(spec: models.VisionSpec) -> int:
  """Count the operations of training on one image: kernels run at every place, the head once."""
  places, total = spec.num_positions, 0
  for address, shape in models.addresses(spec).items():
    if address.endswith("/kernel"):
      total += 6 * shape[0] * shape[1] * (1 if address == "head/kernel" else places)
  if spec.kind == "vit":
    total += sum(12 * h * spec.head_dim * places**2 for h in spec.per_layer("num_heads"))
  return total
