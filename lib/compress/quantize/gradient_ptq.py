# SPDX-License-Identifier: Apache-2.0
"""Gradient-based rounding with its choices as arguments, so that they can be told apart.

Yvinec et al. compare, for methods that learn how to round: the loss, the degrees of freedom, the
variable that is learned, the optimizer, and a share of important weights in higher precision. Each
is an argument here; `experiments/ptq_study.py` measures them one at a time.

* variable: "shift" adds up to half a code before rounding (AutoRound), "free" any number of codes
  (AdaQuant), "division" divides (FlexRound), "sigmoid" adds a rectified sigmoid to the code below,
  pushed to 0 or 1 by a penalty that sharpens, beta from 20 to 2 after a fifth of the steps
  (AdaRound; it wants a rate of 0.1).
* scales: whether the grids' scales are learned too.
* loss: of a block's output, "mse", "mae" or "cosine", one minus it, token by token.
* optimizer: "adam", "adamax", "sgd" with momentum 0.9, or "sign", with a cosine schedule.
* keep: share of a kernel's weights kept as they are, by |w| times the input's norm.

Only the abstract was at hand: the factors are its, their levels are the methods it names, and the
defaults are what did best in our study and not the paper's. Importance is Wanda's score.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from treesurgeon.compress.quantize import learnable, reconstruct
from treesurgeon.core import leaves, lifting, needs, step

VARIABLES = ("shift", "free", "division", "sigmoid")
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
  "adam": (optax.adam, 3e-3),
  "adamax": (optax.adamax, 3e-3),
  "sgd": (functools.partial(optax.sgd, momentum=0.9), 1.0),
  "sign": (optax.sign_sgd, 5e-3),
}
STRETCH, BELOW = 1.2, -0.1  # the sigmoid reaches from -0.1 to 1.1 and is clipped to 0 and 1
LAMBDA, WARM, SHARP = 1.0, 0.2, (20.0, 2.0)


def absolute(out: jax.Array, target: jax.Array) -> jax.Array:
  """Compute the mean magnitude of a difference, row by row.

  Args:
    out: outputs.
    target: what they should be.

  Returns:
    One number a row.

  Example:
    >>> absolute(jnp.zeros((1, 2)), jnp.array([[1.0, -3.0]])).tolist()
    [2.0]
  """
  return jnp.abs(out - target).mean(axis=tuple(range(1, out.ndim)))


def turned(out: jax.Array, target: jax.Array) -> jax.Array:
  """Compute one minus the cosine of every token's output and target, the mean row by row.

  Args:
    out: (rows, ..., width).
    target: what it should be.

  Returns:
    One number a row.

  Example:
    >>> turned(jnp.eye(2), jnp.eye(2)[::-1]).tolist()
    [1.0, 1.0]
  """
  each = 1 - optax.losses.cosine_similarity(out, target, epsilon=1e-6)
  return each.mean(axis=tuple(range(1, each.ndim)))


DISTANCES: dict[str, reconstruct.Distance] = {
  "mse": reconstruct.squared, "mae": absolute, "cosine": turned,
}  # fmt: skip


def rounding(variable: str, *, scales: bool) -> learnable.Rounding:
  """Make a way to round.

  Args:
    variable: see above.
    scales: whether scales are learned.

  Returns:
    The rounding.

  Example:
    >>> form = learnable.Form(4, 2, True, "float32")
    >>> sorted(rounding("free", scales=True).start(jnp.ones((4, 2)), form))
    ['each', 'scale']
  """

  def start(w: jax.Array, form: learnable.Form) -> dict[str, jax.Array]:
    low, high = learnable.ranges(w, form)
    found = {"each": jnp.zeros_like(w), "scale": jnp.zeros_like(low)}
    if variable == "sigmoid":
      steps = w / learnable.spread(learnable.affine(low, high, form)[0], w.shape[-2], form)
      part = (steps - jnp.floor(steps) - BELOW) / STRETCH
      found["each"] = jnp.log(part) - jnp.log1p(-part)
    return found if scales else {"each": found["each"]}

  def codes(w: jax.Array, learned: Any, form: learnable.Form, hard: bool) -> tuple:
    found, zeros = learnable.affine(*learnable.ranges(w, form), form)
    if scales:
      found = learnable.stored(found * jnp.exp(learned["scale"]), form)
    wide = [learnable.spread(x, w.shape[-2], form) for x in (found, zeros)]
    steps, each = w / wide[0], learned["each"]
    if variable == "sigmoid":
      up = rise(each)
      below = jax.lax.stop_gradient(jnp.floor(steps))
      raw = below + (jnp.round(up) if hard else up) + wide[1]
      return jnp.clip(raw, 0, 2**form.bits - 1), found, zeros
    steps = steps * jnp.exp(-each) if variable == "division" else steps + each
    return learnable.rounded(steps, wide[1], form), found, zeros

  def project(learned: Any) -> Any:
    if variable != "shift":
      return learned
    return {**learned, "each": jnp.clip(learned["each"], -0.5, 0.5)}

  def penalty(learned: Any, done: jax.Array) -> Any:
    if variable != "sigmoid":
      return 0.0
    late = jnp.maximum(0.0, (done - WARM) / (1 - WARM))
    beta = SHARP[0] + (SHARP[1] - SHARP[0]) * late
    open_ = 1 - jnp.abs(2 * rise(learned["each"]) - 1) ** beta
    return jnp.where(done < WARM, 0.0, LAMBDA * open_.mean())

  return learnable.Rounding(start, codes, project, penalty)


def rise(v: jax.Array) -> jax.Array:
  """Compute the rectified sigmoid, the share of a step by which a weight is rounded up.

  Args:
    v: what is learned.

  Returns:
    Numbers from 0 to 1.

  Example:
    >>> rise(jnp.array([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
  """
  return jnp.clip(jax.nn.sigmoid(v) * STRETCH + BELOW, 0.0, 1.0)


def plan(
  *, steps: int, rate: float | None, variable: str, scales: bool, loss: str, optimizer: str
) -> tuple[learnable.Rounding, optax.GradientTransformation, reconstruct.Distance]:
  """Say what is learned, how, and for what.

  Args:
    steps: updates.
    rate: of the first; None is the optimizer's.
    variable, scales, loss, optimizer: see above.

  Returns:
    (rounding, optimizer, distance).

  Example:
    >>> how = {"variable": "shift", "scales": True, "loss": "cosine", "optimizer": "adam"}
    >>> _, _, distance = plan(steps=10, rate=None, **how)
    >>> distance(jnp.ones((1, 2)), 5 * jnp.ones((1, 2))).round(6).tolist()
    [0.0]
  """
  make, usual = OPTIMIZERS[optimizer]
  falling = optax.cosine_decay_schedule(usual if rate is None else rate, max(1, steps))
  return rounding(variable, scales=scales), make(falling), DISTANCES[loss]


@step.method("compress.quantize.gradient_ptq")
def gradient_ptq(
  *,
  bits: int = 4,
  group_size: int = 128,
  symmetric: bool = True,
  variable: str = "division",
  scales: bool = True,
  loss: str = "mse",
  optimizer: str = "adam",
  keep: float = 0.0,
  steps: int = 1000,
  rate: float | None = None,
  batch: int = 8,
  per: str = "block",
  scale_dtype: str | None = None,
  select: str | None = None,
) -> step.Step:
  """Quantize kernels, learning how to round in a way of one's choice.

  Args:
    bits: width of a code, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    variable: "shift", "free", "division" or "sigmoid".
    scales: whether scales are learned too.
    loss: of a block's output: "mse", "mae" or "cosine".
    optimizer: "adam", "adamax", "sgd" or "sign".
    keep: share of the weights that are not quantized.
    steps: updates; 0 is rounding to nearest.
    rate: of the first update, falling to 0 by a cosine; None is the optimizer's usual one.
    batch: calibration rows a step.
    per: "block" keeps the block's output, "kernel" each kernel's, by second moments.
    scale_dtype: float32, bfloat16 or float16; None is the weight's dtype.
    select: which addresses; None is every kernel inside the layers.

  Returns:
    The transform. Its fixed point is its own result: applied again it changes nothing.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> gradient_ptq(bits=3, variable="sigmoid")
    (compress.quantize.gradient_ptq(bits=3, variable='sigmoid'),)

  Reference:
    Yvinec et al., Gradient-Based Post-Training Quantization: Challenging the Status Quo, 2023,
    arXiv:2308.07662; Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization,
    ICML 2020, arXiv:2004.10568.
  """
  choices = {
    "variable": (variable, VARIABLES), "loss": (loss, tuple(DISTANCES)),
    "optimizer": (optimizer, tuple(OPTIMIZERS)),
  }  # fmt: skip
  for name, (value, valid) in choices.items():
    if value not in valid:
      raise ValueError(f"{name}={value!r}: valid are {', '.join(valid)}")
  if rate is not None and not rate > 0:
    raise ValueError(f"rate={rate}: valid is above 0, or None for the optimizer's usual one")
  if not 0 <= keep < 1:
    raise ValueError(f"keep={keep}: valid is 0 to below 1, a share of the weights")
  if per == "kernel" and loss != "mse":
    raise ValueError(f"loss={loss!r} is of a block's output; per='kernel' has loss='mse'")
  hyper = {
    "bits": bits, "group_size": group_size, "symmetric": symmetric, "steps": steps, "rate": rate,
    "batch": batch, "scale_dtype": scale_dtype, "variable": variable, "scales": scales,
    "loss": loss, "optimizer": optimizer,
  }  # fmt: skip
  made = reconstruct.lift(plan, per=per, select=select, **hyper)
  if not keep:
    return made
  hyper = {"plan": plan, "keep": keep, **hyper}
  if per == "block":
    wants = {"norms": needs.Statistic("sum_squares")}
    return lifting.over_blocks(_block, hyper=hyper, wants=wants, select=select, random=True)
  wants = {"hessian": needs.Statistic("second_moment")}
  return lifting.over_leaves(_kernel, hyper=hyper, select=select, wants=wants, scope="block")


def important(w: jax.Array, squares: jax.Array, *, keep: float) -> leaves.Outliers:
  """Pick the weights whose removal would change the output most, each by itself.

  Args:
    w: (..., rows, cols).
    squares: sum of squares of every input, (..., rows).
    keep: share of the weights.

  Returns:
    They, and where they are.

  Example:
    >>> w = jnp.array([[3.0, 1.0], [2.0, 2.5]])
    >>> important(w, jnp.array([1.0, 4.0]), keep=0.25).values.tolist()
    [[2.5]]
  """
  *batch, rows, cols = w.shape
  score = jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(squares)[..., :, None]
  _, at = jax.lax.top_k(score.reshape(*batch, 1, rows * cols), max(1, round(keep * rows * cols)))
  values = jnp.take_along_axis(w.reshape(*batch, 1, rows * cols), at, axis=-1)
  return leaves.Outliers(values, at.astype(jnp.int32), rows, cols)


def _kernel(w: jax.Array, hessian: Any, *, keep: float, **how: Any) -> leaves.Sum:
  squares = jnp.diagonal(hessian.moment, axis1=-2, axis2=-1)
  kept = important(w, squares, keep=keep)
  return leaves.Sum((reconstruct.kernel(w - kept.dense(), hessian, **how), kept))


def _block(
  w: Mapping[str, jax.Array], *, norms: Any, forward: Any, keep: float, **how: Any
) -> dict[str, leaves.Sum]:
  kept = {n: important(x, norms[n].value, keep=keep) for n, x in w.items()}

  def whole(made: Mapping[str, Any], h: jax.Array) -> jax.Array:
    return forward({n: x + kept[n].dense() for n, x in made.items()}, h)

  rest = {n: x - kept[n].dense() for n, x in w.items()}
  found = reconstruct.block(rest, forward=whole, **how)
  return {n: leaves.Sum((x, kept[n])) for n, x in found.items()}
