# SPDX-License-Identifier: Apache-2.0
"""AutoRound (SignRound): learn which way each weight rounds, and each group's range, by signs.

W̃ = s (clip(round(W / s + V) + z, 0, 2ᵇ - 1) - z) with V in [-½, ½] and the range of a group
[α min, β max], α and β in [0, 1]; V begins at 0 and α, β at 1, which is rounding to nearest. Signed
gradient descent, 200 steps, from a rate of 1/200 linearly to 0, so that V can just reach ½.

Where we differ from the published code: V is clipped, as in the paper; symmetric grids are those of
`grid.fit` and not the newer ones whose scale may be negative; the best step is chosen by the loss
over all calibration data, not over the step's own eight rows. `per="kernel"` takes the exact loss
of each kernel by itself from second moments, where the paper takes the block's output.
"""

import jax
import jax.numpy as jnp
import optax

from treesurgeon.compress.quantize import learnable, reconstruct
from treesurgeon.core import step


def start(w: jax.Array, form: learnable.Form) -> dict[str, jax.Array]:
  """Begin at rounding to nearest.

  Args:
    w: (..., rows, cols) float32.
    form: the grids.

  Returns:
    "shift" V, "low" α and "high" β.

  Example:
    >>> sorted(start(jnp.ones((4, 2)), learnable.Form(4, 2, True, "float32")))
    ['high', 'low', 'shift']
  """
  low, high = learnable.ranges(w, form)
  return {"shift": jnp.zeros_like(w), "low": jnp.ones_like(low), "high": jnp.ones_like(high)}


def codes(
  w: jax.Array, learned: learnable.Learned, form: learnable.Form, hard: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Round W / s + V to the grid of the shrunk range.

  Args:
    w: (..., rows, cols) float32.
    learned: as `start` makes it.
    form: the grids.
    hard: of no consequence.

  Returns:
    (codes, scales, zeros), float32.

  Example:
    >>> w, form = jnp.array([[7.5], [-2.4]]), learnable.Form(4, 2, True, "float32")
    >>> learned = {**start(w, form), "shift": jnp.array([[0.0], [-0.2]])}
    >>> codes(w, learned, form, True)[0][:, 0].tolist()
    [15.0, 5.0]
  """
  del hard
  low, high = learnable.ranges(w, form)
  scales, zeros = learnable.affine(low * learned["low"], high * learned["high"], form)
  wide = [learnable.spread(x, w.shape[-2], form) for x in (scales, zeros)]
  return learnable.rounded(w / wide[0] + learned["shift"], wide[1], form), scales, zeros


def project(learned: learnable.Learned) -> learnable.Learned:
  """Clip what is learned to where it may be.

  Args:
    learned: as `start` makes it.

  Returns:
    The same, V in [-½, ½], α and β in [0, 1].

  Example:
    >>> project({"shift": jnp.array(0.7), "low": jnp.array(1.1)})["shift"].item()
    0.5
  """
  half = {"shift": (-0.5, 0.5)}
  return {n: jnp.clip(x, *half.get(n, (0.0, 1.0))) for n, x in learned.items()}


SHIFT = learnable.Rounding(start, codes, project)


def plan(
  *, steps: int, rate: float | None
) -> tuple[learnable.Rounding, optax.GradientTransformation, reconstruct.Distance]:
  """Say what is learned, how, and for what.

  Args:
    steps: updates.
    rate: of the first; None is one over the steps.

  Returns:
    (rounding, optimizer, distance).

  Example:
    >>> _, signs, _ = plan(steps=4, rate=None)
    >>> signs.update(jnp.array(-3.0), signs.init(jnp.zeros(())))[0].item()
    0.25
  """
  first = 1.0 / max(1, steps) if rate is None else rate
  falling = optax.linear_schedule(first, 0.0, max(1, steps))
  return SHIFT, optax.sign_sgd(falling), reconstruct.squared


@step.method("compress.quantize.autoround")
def autoround(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = True,
  steps: int = 200,
  rate: float | None = None,
  batch: int = 8,
  per: str = "block",
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels, learning by signed gradients which way each weight rounds.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    steps: updates; 0 is rounding to nearest.
    rate: of the first update, falling linearly to 0; None is one over the steps.
    batch: calibration rows a step.
    per: "block" keeps the block's output, "kernel" each kernel's, by second moments.
    scale_dtype: float32, bfloat16 or float16; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> autoround(bits=2, steps=1000)
    (compress.quantize.autoround(bits=2, steps=1000),)

  Reference:
    Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs,
    2023, arXiv:2309.05516.
  """
  if rate is not None and not rate > 0:
    raise ValueError(f"rate={rate}: valid is above 0, or None for one over the steps")
  return reconstruct.lift(
    plan, per=per, select=select, bits=bits, group_size=group_size, symmetric=symmetric,
    steps=steps, rate=rate, batch=batch, scale_dtype=scale_dtype,
  )  # fmt: skip
