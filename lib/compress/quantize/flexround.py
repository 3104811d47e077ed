# SPDX-License-Identifier: Apache-2.0
"""FlexRound: learn by what each weight is divided before it is rounded.

W̃ = s₁ (clip(round(W / (s₁ S₂ s₃)) + z, 0, 2ᵇ - 1) - z): s₁ is the grid's scale, S₂ one factor a
weight, s₃ one an output. They are positive, learned as logarithms by Adam with a cosine schedule,
and begin at the grid of rounding to nearest and at 1. A weight's factor has the gradient
-W ∂L/∂W̃ there: large weights move further, across several codes if that pays. Zero points stay.

Defaults are the published code's for 4-bit Llama-2-7B: 5000 steps of two rows at 3e-3. It mixes
hidden states of the original and of the quantized prefix at random (QDrop); here all are of the
quantized prefix. s₁ has one entry a group where it has one an output.
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
    Logarithms of factors: "scale" of the fitted scale, which together are s₁, "each" S₂ and
    "output" s₃.

  Example:
    >>> sorted(start(jnp.ones((4, 2)), learnable.Form(4, 2, True, "float32")))
    ['each', 'output', 'scale']
  """
  groups = jnp.zeros_like(learnable.ranges(w, form)[0])
  return {"scale": groups, "each": jnp.zeros_like(w), "output": jnp.zeros_like(w[..., :1, :])}


def codes(
  w: jax.Array, learned: learnable.Learned, form: learnable.Form, hard: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Round W / (s₁ S₂ s₃).

  Args:
    w: (..., rows, cols) float32.
    learned: as `start` makes it.
    form: the grids.
    hard: of no consequence.

  Returns:
    (codes, scales, zeros), float32.

  Example:
    >>> w, form = jnp.array([[7.5], [-2.4]]), learnable.Form(4, 2, True, "float32")
    >>> learned = {**start(w, form), "each": jnp.array([[0.0], [-0.2]])}
    >>> codes(w, learned, form, True)[0][:, 0].tolist()
    [15.0, 5.0]
  """
  del hard
  scales, zeros = learnable.affine(*learnable.ranges(w, form), form)
  scales = learnable.stored(scales * jnp.exp(learned["scale"]), form)
  wide = [learnable.spread(x, w.shape[-2], form) for x in (scales, zeros)]
  steps = w / (wide[0] * jnp.exp(learned["each"] + learned["output"]))
  return learnable.rounded(steps, wide[1], form), scales, zeros


DIVISION = learnable.Rounding(start, codes)


def plan(
  *, steps: int, rate: float
) -> tuple[learnable.Rounding, optax.GradientTransformation, reconstruct.Distance]:
  """Say what is learned, how, and for what.

  Args:
    steps: updates.
    rate: of Adam's first; a cosine takes it to 0.

  Returns:
    (rounding, optimizer, distance).

  Example:
    >>> _, adam, _ = plan(steps=4, rate=0.5)
    >>> round(adam.update(jnp.array(-3.0), adam.init(jnp.zeros(())))[0].item(), 3)
    0.5
  """
  falling = optax.cosine_decay_schedule(rate, max(1, steps))
  return DIVISION, optax.adam(falling), reconstruct.squared


@step.method("compress.quantize.flexround")
def flexround(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = True,
  steps: int = 5000,
  rate: float = 3e-3,
  batch: int = 2,
  per: str = "block",
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels, learning a factor a weight that divides it before it is rounded.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    steps: updates; 0 is rounding to nearest.
    rate: Adam's, to begin with.
    batch: calibration rows a step.
    per: "block" keeps the block's output, "kernel" each kernel's, by second moments.
    scale_dtype: float32, bfloat16 or float16; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> flexround(bits=3, steps=1000)
    (compress.quantize.flexround(bits=3, steps=1000),)

  Reference:
    Lee et al., FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
    Quantization, ICML 2023, arXiv:2306.00317.
  """
  if not rate > 0:
    raise ValueError(f"rate={rate}: valid is above 0, usually 3e-3")
  return reconstruct.lift(
    plan, per=per, select=select, bits=bits, group_size=group_size, symmetric=symmetric,
    steps=steps, rate=rate, batch=batch, scale_dtype=scale_dtype,
  )  # fmt: skip
