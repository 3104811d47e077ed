# SPDX-License-Identifier: Apache-2.0
"""Quantize what kernels read, when they read it: the A8 of W8A8.

Nothing about the weights changes; the leaf says how its inputs are rounded in every forward pass.
Scales are dynamic, from each token's or the whole input's largest magnitude, or static, from the
calibration data's. Kernels of fewer bits come first: a weight quantizer takes this off again.
"""

from typing import Any

import jax.numpy as jnp

from treesurgeon.core import formats, leaves, lifting, needs, step

PER = ("token", "tensor")


@step.method("compress.quantize.activations")
def activations(
  *,
  bits: int = 8,
  format: str = "int",
  per: str = "token",
  static: bool = False,
  select: str | None = None,
) -> step.Step:
  """Quantize the inputs of kernels at run time.

  Args:
    bits: width of an input, 2 to 8.
    format: "int" (symmetric), or a table of `core.formats`, such as "e4m3fn".
    per: what shares a scale: each "token", or the whole "tensor".
    static: take the scale from calibration; needs per="tensor".
    select: which kernels; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range, or static scales of tokens.

  Example:
    >>> activations(format="e4m3fn")
    (compress.quantize.activations(format='e4m3fn'),)

  Reference:
    Yao et al., ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale
    Transformers, 2022, arXiv:2206.01861.
  """
  if bits not in range(2, 9):
    raise ValueError(f"bits={bits}: the width of an input is a whole number from 2 to 8")
  formats.width(format, bits)
  if per not in PER:
    raise ValueError(f"per={per!r}: valid are {', '.join(PER)}")
  if static and per != "tensor":
    raise ValueError("static=True: a token's scale is known when it comes; use per='tensor'")
  return lifting.over_leaves(
    _leaf,
    hyper={"bits": bits, "format": format, "per": per, "static": static},
    select=select,
    wants={"inputs": needs.Statistic("absmax")} if static else {},
    raw=True,
  )


def _leaf(w: Any, *, bits: int, format: str, per: str, static: bool, inputs: Any = None) -> Any:
  if isinstance(w, leaves.Rotated) and not static:  # the largest of turned inputs is not known
    return leaves.Rotated(_leaf(w.weight, bits=bits, format=format, per=per, static=static))
  form = {"bits": bits, "format": format, "per": per}
  if isinstance(w, leaves.ActivationQuantized):
    if static == (w.scale is not None) and all(getattr(w, k) == v for k, v in form.items()):
      return w
    w = w.weight
  scale = None
  if static:
    top = inputs.value.max() / formats.divisor(format, bits)
    scale = jnp.where(top > 0, top, 1.0).astype(jnp.float32).reshape(1, 1)
  return leaves.ActivationQuantized(w, scale, **form)
