# SPDX-License-Identifier: Apache-2.0
"""Bias correction: take back by how much compression shifts the mean outputs of linear layers.

Where W became Q the outputs shift by (Q - W)ᵀ E[x] in the mean, and the bias takes that back. E[x]
is of the original model's inputs over the calibration data, which the earlier layers give again
once their own biases are corrected (Nagel et al., section 4.2; they take it from batch norms where
they have no data). The original is the step's donor. Layers without a bias are left as they are.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon.core import leaves, model, needs, paths, programs, step


def corrected(
  bias: Float[Array, " cols"],
  w: Float[Array, "rows cols"],
  x: Float[Array, " rows"],
  q: Float[Array, "rows cols"],
  *,
  strength: float = 1.0,
) -> Float[Array, " cols"]:
  """Correct one bias.

  Args:
    bias: the compressed layer's.
    w: the original's weights, input dimension first.
    x: mean of the original's inputs.
    q: what the compressed weights stand for.
    strength: fraction of the shift to take back.

  Returns:
    The bias, in its dtype.

  Example:
    >>> one = jnp.ones((1, 1))
    >>> corrected(jnp.zeros(1), one, jnp.ones(1), 0.5 * one).tolist()
    [0.5]
  """
  wrong = q.astype(jnp.float32) - w.astype(jnp.float32)
  shift = jnp.matmul(x, wrong, precision="highest")
  return (bias.astype(jnp.float32) - strength * shift).astype(bias.dtype)


@step.method("compress.quantize.bias_correction")
def bias_correction(
  *, models: tuple[str, ...] = (), strength: float = 1.0, select: str | None = None
) -> step.Step:
  """Correct biases after compression, against the original model.

  Args:
    models: the original's directory, one name; empty takes the donor that was brought.
    strength: fraction of the shift to take back; 0 is the neutral setting.
    select: which kernels' layers; None is every kernel inside the layers.

  Returns:
    The transform.

  Raises:
    ValueError: for a strength outside 0 to 1, or if no selected layer has a bias.

  Example:
    >>> bias_correction(models=("original",))
    (compress.quantize.bias_correction(models=('original',)),)

  Reference:
    Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019,
    arXiv:1906.04721.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f"strength={strength}: valid is 0 (nothing) to 1 (all of the shift)")
  return _step(models, strength, step.both(select or step.BLOCK_KERNELS, step.KERNELS))


def _step(models: tuple[str, ...], strength: float, pattern: str) -> step.Step:
  wants = {
    "donors": needs.Donors(models=models),
    "inputs": needs.Statistic("sum", select=pattern, of="donors"),
  }

  def apply(m: model.Model, evidence: needs.Evidence, key: jax.Array) -> model.Model:
    del key
    call = programs.compiled(_bias, (("strength", strength),))
    changes = {}
    for kernel, bias in _pairs(m.addresses(), pattern):
      w, x = (evidence[n][kernel][0] for n in ("donors", "inputs"))
      changes[bias] = call(m.leaf(bias), {"w": w, "x": x, "q": m.leaf(kernel)})
    return m.update(changes)

  def units(names: Sequence[str]) -> step.Units:
    paths.select([n for n in names if n.endswith("kernel")], pattern)
    found = _pairs(names, pattern)
    if not found:
      raise ValueError("bias_correction: no selected layer has a bias that could be corrected")
    return found

  def reselect(narrower: str) -> step.Step:
    return _step(models, strength, step.both(narrower, pattern))

  return step.Step(wants, apply, "block", {}, units, reselect)


def _pairs(names: Sequence[str], pattern: str) -> list[tuple[str, ...]]:
  """List (kernel, bias) of the layers that are selected and have both."""
  held = set(names)
  found = [(n, n.removesuffix("kernel") + "bias") for n in names if re.fullmatch(pattern, n)]
  return [(kernel, bias) for kernel, bias in found if bias in held]


def _bias(bias: Any, *, w: Any, x: Any, q: Any, strength: float) -> Any:
  return corrected(bias, leaves.dense(w), x.mean(), leaves.dense(q), strength=strength)
