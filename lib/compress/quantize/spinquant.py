# SPDX-License-Identifier: Apache-2.0
"""SpinQuant: learn the turns of stream and heads, for some are better than others by far.

Liu et al., "SpinQuant: LLM quantization with learned rotations" (arXiv 2405.16406). One matrix for
the stream and one a layer for its heads start as QuaRot's Hadamard matrices and descend the loss of
the quantized network: weights rounded to nearest and inputs rounded token by token, both straight
through. They stay orthogonal by Cayley steps (Li et al., arXiv 2002.01113): with the skew matrix
Y = (R Gᵀ - G Rᵀ) / 2 of the gradient G,  R <- (I - a/2 Y)⁻¹ (I + a/2 Y) R.

As in the published code a is at most 1 / |Y|_1, momentum is none and weights have a scale a column.
Differences: the inverse is solved for, not iterated; inputs are symmetric, as those of
`compress.quantize.activations`; ranges of weights are not searched; the rate falls linearly, as in
the paper, not by a cosine. Turns that do no better than the start on all the batches are dropped
for it. The inputs of down are turned by a Hadamard matrix on request; of the rest see `quarot`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.compress import residual
from treesurgeon.compress.distill import losses
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import quarot
from treesurgeon.core import descend, hadamard, leaves, needs, step, tuning
from treesurgeon.core import model as model_lib

INPUTS = ("attn/in", "attn/o/in", "mlp/in", "mlp/down/in")


def move(
  r: Float[Array, "*batch n n"], slope: Float[Array, "*batch n n"], *, rate: Any
) -> Float[Array, "*batch n n"]:
  """Take a Cayley step down a slope.

  Args:
    r: orthogonal matrices.
    slope: gradients.
    rate: step size; each matrix takes less where its slope is steep.

  Returns:
    Orthogonal matrices, to float32's rounding.

  Example:
    >>> r = move(jnp.eye(2), jnp.array([[0.0, 1.0], [0.0, 0.0]]), rate=1.0)
    >>> bool(jnp.allclose(r @ r.T, jnp.eye(2), atol=1e-6)), float(r[0, 1]) < 0
    (True, True)
  """
  product = functools.partial(jnp.matmul, precision="highest")
  turned = product(r, jnp.swapaxes(slope, -1, -2))
  skew = (turned - jnp.swapaxes(turned, -1, -2)) / 2
  norm = jnp.abs(skew).sum(axis=-2).max(axis=-1)[..., None, None]
  half = jnp.minimum(rate, 1 / (norm + 1e-8)) / 2 * skew
  eye = jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape)
  new = jnp.linalg.solve(eye - half, product(eye + half, r))
  gram = product(jnp.swapaxes(new, -1, -2), new)
  return product(new, 1.5 * eye - 0.5 * gram)  # one step of Newton takes rounding errors away


@functools.lru_cache(maxsize=32)
def cayley(rate: float, steps: int) -> optax.GradientTransformation:
  """Make the optimizer once for each setting, for compiled steps are kept by it.

  Args:
    rate: of the first step; it falls linearly to 0.
    steps: how many.

  Returns:
    An optimizer of orthogonal matrices.

  Example:
    >>> cayley(1.5, 100) is cayley(1.5, 100)
    True
  """

  def init(params: Any) -> jax.Array:
    del params
    return jnp.float32(0)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    now = rate * (1 - state / max(1, steps))
    return jax.tree.map(lambda r, g: move(r, g, rate=now) - r, params, updates), state + 1

  return optax.GradientTransformation(init, update)


def loss(
  plan: tuple[Any, int | None, int | None, bool],
  turns: Mapping[str, jax.Array],
  batch: Any,
  key: Any,
  params: Any,
) -> jax.Array:
  """Compute the loss of a turned and quantized network, whose rounding lets gradients through.

  Args:
    plan: (architecture, width of weights, width of inputs, whether those of down are turned); None
      does not round.
    turns: as `quarot.start` returns.
    batch: tokens.
    key: unused.
    params: parameters, norms folded where the stream is turned.

  Returns:
    Nats a token.
  """
  del key
  spec, bits, inputs, down = plan
  if "stream" in turns:
    params = residual.turn(params, turns["stream"], spec=spec)
  if "heads" in turns:
    params = quarot.turn_heads(params, turns["heads"])
  if bits is not None:
    params = residual.over_layers(params, functools.partial(_rounded, bits=bits, down=down))
  patch = None if inputs is None else functools.partial(_round_inputs, bits=inputs, down=down)
  return losses.cross_entropy(*models.predictions(spec, params, batch, patch=patch))


@step.method("compress.quantize.spinquant")
def spinquant(
  *,
  bits: int | None = 4,
  inputs: int | None = 4,
  places: tuple[str, ...] = quarot.PLACES,
  steps: int = 100,
  rate: float = 1.5,
) -> step.Step:
  """Learn how to turn a network's stream and heads; to be followed by a quantizer.

  Args:
    bits: width of weights while learning, 1 to 8; None leaves them, which the paper does before
      GPTQ.
    inputs: width of the kernels' inputs while learning, 2 to 8, or None.
    places: as for `quarot`; none is the neutral setting.
    steps: updates, a batch each; with 0 it is `quarot`.
    rate: of the first step.

  Returns:
    A transform of whole models.

  Raises:
    ValueError: for an argument out of range; when applied, as `quarot`, and for no data.

  Example:
    >>> spinquant(bits=None)
    (compress.quantize.spinquant(bits=None),)

  Reference:
    Liu et al., SpinQuant: LLM Quantization with Learned Rotations, 2024, arXiv:2405.16406.
  """
  quarot.check(places)
  tuning.check(steps=steps, rate=rate)
  if bits is not None and bits not in range(1, 9):
    raise ValueError(f"bits={bits}: the width of a weight is a whole number from 1 to 8, or None")
  if inputs is not None and inputs not in range(2, 9):
    raise ValueError(f"inputs={inputs}: their width is a whole number from 2 to 8, or None")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    if not places:
      return m
    turns, told, down = quarot.start(m, key, places), {}, "down" in places
    batches = list(evidence["batches"])
    if turns and steps and tuning.learnable(m, batches):
      folded = residual.fold_norms(m) if "stream" in places else m
      plan = (folded.spec, bits, inputs, down)
      learned, _ = descend.minimize(
        loss, turns, batches, folded.params, optimizer=cayley(rate, steps), steps=steps, spec=plan
      )
      first, last = (_mean(plan, x, batches, folded.params) for x in (turns, learned))
      better = last < first
      turns = {n: jnp.where(better, q, turns[n]) for n, q in learned.items()}
      if not isinstance(first, jax.core.Tracer):
        told = {"first_loss": float(first), "last_loss": float(last)}
    return tuning.noted(quarot.turned(m, turns, down=down), {"steps": steps, **told})

  return tuning.over_model(apply, {"batches": needs.Batches()})


def _rounded(flat: Mapping[str, jax.Array], *, bits: int, down: bool) -> dict[str, jax.Array]:
  """Round kernels to nearest on a grid a column; gradients pass as if nothing were rounded."""
  out = dict(flat)
  for name, w in flat.items():
    if name.endswith("kernel") and "/router/" not in name:
      held, turned = jax.lax.stop_gradient(w), down and name.endswith(quarot.DOWN)
      inner = leaves.Rotated.of(held).weight if turned else held
      fitted = grids.fit(inner, bits=bits, group_size=w.shape[-2], symmetric=True)
      near = grids.dequantize(grids.round_to(inner, fitted, bits=bits), fitted, bits=bits)
      near = leaves.Rotated(near).dense() if turned else near
      out[name] = w + (near - held).astype(w.dtype)
  return out


def _round_inputs(name: str, x: jax.Array, layer: jax.Array, *, bits: int, down: bool) -> jax.Array:
  """Round what kernels read, token by token, as `compress.quantize.activations` does."""
  del layer
  into_down = name.endswith("down/in")
  if name not in INPUTS and not into_down:  # what enters the experts was rounded once at "mlp/in"
    return x
  held, turned = jax.lax.stop_gradient(x), down and into_down
  inner = hadamard.transform(held) if turned else held
  how = leaves.ActivationQuantized(None, None, bits=bits)
  scales = how.scales_of(inner)
  near = how.codes_of(inner, scales) * scales
  near = hadamard.transform(near, back=True) if turned else near
  return x + (near - held).astype(x.dtype)


def _mean(plan: tuple[Any, ...], turns: Any, batches: Sequence[Any], params: Any) -> jax.Array:
  """Compute the mean loss over batches."""
  return jnp.stack([_loss(plan, turns, b, None, params) for b in batches]).mean()


_loss = jax.jit(loss, static_argnums=0)
