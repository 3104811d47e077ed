# SPDX-License-Identifier: Apache-2.0
"""CPTQuant: a width for each layer by how sensitive it is, measured in one of three ways.

Nanda et al., "CPTQuant: a novel mixed precision post-training quantization techniques for large
language models", 2024 (arXiv 2412.03599). A layer is the more sensitive

* "cmpq": the less what leaves it is a linear image of what enters it: 1 less the mean canonical
  correlation between its input and its output, over tokens;
* "pmpq": the more the loss rises when the 30 % smallest weights of its kernels are zero;
* "tdmpq": the more the loss changes, to first order, when its input is perturbed: the standard
  deviation over random perturbations of every token's state, of its own length.

Widths then solve: least sum of sensitivity * 4^-bits, for rounding errors fall by 4 with a bit,
weights times bits within the budget (`compress.allocate`); kernels are rounded to nearest.

Where we differ from the published code (amitashnanda/Mixed_Precision_Quantization): it clusters
layers by sensitivity into 16, 8 and 4 bits, and the size is what comes of it. Its correlations are
the first ones alone, of the means over sequences, with the outputs of all other layers; its PMPQ
takes perplexity like accuracy, so that harm counts as insensitivity; its TDMPQ perturbs a layer's
first parameter and takes the loss itself, no change of it. Fixed point: kernels that are quantized
in one of the widths are left alone, and count no more. Computed in float32.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.compress import allocate
from treesurgeon.compress.prune import magnitude
from treesurgeon.compress.quantize import grid as grids
from treesurgeon.compress.quantize import rtn
from treesurgeon.core import leaves, linalg, meshes, needs, paths, programs, step, tuning
from treesurgeon.core import model as model_lib

SPARSITY = 0.3  # pmpq: of a layer's kernels
READ = ("attn/in", "attn/o/in", "mlp/in", "mlp/down/in")  # tdmpq: what kernels multiply
DAMPING = 1e-5  # cmpq: of covariances, relative to their mean variance


def correlation(moment: Float[Array, "n n"]) -> Float[Array, ""]:
  """Compute the mean canonical correlation of two vectors of one length.

  Args:
    moment: second moment of both and a 1 behind one another, as a sum.

  Returns:
    0 to 1; it is 1 where each is an affine image of the other.

  Example:
    >>> x = jnp.array([[1.0, 3.0, 1.0], [2.0, 5.0, 1.0], [3.0, 7.0, 1.0]])
    >>> round(correlation(x.T @ x).item(), 3)
    1.0
  """
  width = moment.shape[0] // 2
  mean = moment[-1, :-1] / moment[-1, -1]
  spread = moment[:-1, :-1] / moment[-1, -1] - jnp.outer(mean, mean)
  first, _ = linalg.damped_cholesky(spread[:width, :width], DAMPING)
  second, _ = linalg.damped_cholesky(spread[width:, width:], DAMPING)
  half = jax.scipy.linalg.solve_triangular(first, spread[:width, width:], lower=True)
  both = jax.scipy.linalg.solve_triangular(second, half.T, lower=True)
  return jnp.clip(jnp.linalg.svd(both, compute_uv=False), 0, 1).mean()


def widths(
  sensitivity: Sequence[float], sizes: Sequence[int], *, average: float, choices: Sequence[int]
) -> list[int]:
  """Choose a width for every layer.

  Args:
    sensitivity: of each layer; what is not positive counts as none.
    sizes: weights of each.
    average: bits that a weight may take in the mean.
    choices: widths to choose from.

  Returns:
    Bits, a layer.

  Raises:
    ValueError: if the budget cannot be met, or a sensitivity is not finite.

  Example:
    >>> widths([1.0, 9.0], [10, 10], average=3, choices=(2, 3, 4))
    [2, 4]
  """
  known = [max(float(s), 0.0) if np.isfinite(s) else float(s) for s in sensitivity]
  known = known if any(known) else [1.0] * len(known)
  costs = [[n * b for b in choices] for n in sizes]
  losses = [[s * 4.0**-b for b in choices] for s in known]
  picks = allocate.solve(costs, losses, average * sum(sizes), unit="bits")
  return [choices[i] for i in picks]


def cmpq(m: model_lib.Model, batches: Sequence[Any]) -> list[float]:
  """Measure how little each layer's output is a linear image of its input.

  Args:
    m: a transformer.
    batches: token batches (`models.losses`); padding, as a "mask" says, does not count.

  Returns:
    1 less the mean canonical correlation, a layer.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> len(cmpq(m, [np.array([[1, 2, 3]])]))
    2
  """
  run = programs.compiled(_moments, (("spec", m.spec),))
  total = functools.reduce(
    lambda a, b: jax.tree.map(jnp.add, a, b), [run(m.params, {"batch": b}) for b in batches]
  )
  return [1 - float(x) for x in _correlations(total)]


def pmpq(m: model_lib.Model, batches: Sequence[Any], layers: Mapping[int, Any]) -> list[float]:
  """Measure how much the loss rises when a layer is pruned.

  Args:
    m: the model.
    batches: token batches.
    layers: layer to the addresses of its kernels.

  Returns:
    Nats, one for each of `layers`.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> len(pmpq(m, [np.array([[1, 2, 3]])], {1: ["layers/1/mlp/up/kernel"]}))
    1
  """
  prune = programs.compiled(magnitude.prune, (("sparsity", SPARSITY),))

  def loss(some: model_lib.Model) -> float:
    run = programs.compiled(_loss, (("spec", m.spec),))
    return float(np.mean([run(some.params, {"batch": b}) for b in batches]))

  whole = loss(m)
  return [
    loss(m.update({a: prune(leaves.dense(m.leaf(a)), {}) for a in names})) - whole
    for names in layers.values()
  ]


def tdmpq(m: model_lib.Model, batches: Sequence[Any]) -> list[float]:
  """Measure how much the loss changes to first order when a layer's input is perturbed.

  Args:
    m: a transformer.
    batches: token batches.

  Returns:
    Standard deviation in nats, a layer.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> len(tdmpq(m, [np.array([[1, 2, 3]])]))
    2
  """
  run = programs.compiled(_variances, (("spec", m.spec),))
  each = [np.asarray(run(m.params, {"batch": b})) for b in batches]
  return np.sqrt(np.mean(each, axis=0)).tolist()


WAYS: dict[str, Callable[..., list[float]]] = {"cmpq": cmpq, "pmpq": pmpq, "tdmpq": tdmpq}


@step.method("compress.quantize.cptquant")
def cptquant(
  *,
  sensitivity: str = "pmpq",
  average: float = 4.0,
  choices: tuple[int, ...] = (2, 3, 4, 6, 8),
  group_size: int = 128,
  symmetric: bool = True,
  select: str | None = None,
) -> step.Step:
  """Round kernels to nearest, to a width for each layer that follows its sensitivity.

  Args:
    sensitivity: "cmpq" (canonical correlation), "pmpq" (pruning) or "tdmpq" (Taylor).
    average: bits that a code may take in the mean, without scales.
    choices: widths to choose from, 1 to 8.
    group_size: input rows that share a scale; -1, or more than there are, is one a column.
    symmetric: whether there are no zero points.
    select: which addresses inside the layers; None is every kernel there.

  Returns:
    A transform of whole models. Its fixed point are kernels of these widths. Shapes alone do not
    tell what it stores: `jax.eval_shape` takes one width. Its lineage tells the sensitivities and
    widths.

  Raises:
    ValueError: for values out of range, a budget that cannot be met, and, when applied, without
      data or for a network without a residual stream.

  Example:
    >>> cptquant(sensitivity="cmpq", average=3.5)
    (compress.quantize.cptquant(sensitivity='cmpq', average=3.5),)

  Reference:
    Nanda et al., CPTQuant -- A Novel Mixed Precision Post-Training Quantization Techniques for
    Large Language Models, 2024, arXiv:2412.03599.
  """
  if sensitivity not in WAYS:
    raise ValueError(f"sensitivity={sensitivity!r}: valid are {', '.join(WAYS)}")
  for bits in choices:
    grids.check(bits=bits, group_size=group_size, symmetric=symmetric)
  if not choices or average < min(choices):
    raise ValueError(f"average={average}: the least of choices={choices} is more, or there is none")
  pattern = step.both(select or step.BLOCK_KERNELS, step.BLOCK_KERNELS)
  form: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric}

  def units(names: Sequence[str]) -> step.Units:
    return [tuple(paths.select(names, pattern))]

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    layers: dict[int, list[str]] = {}
    for a in paths.select(m.addresses(), pattern):
      if not any(grids.already(m.leaf(a), bits=b, **form) for b in choices):
        layers.setdefault(int(a.split("/")[1]), []).append(a)
    if not layers:
      return m
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(m.params))
    found = [] if traced else _measure(m, evidence["batches"], layers, sensitivity)
    sizes = [sum(m.struct(a).size for a in names) for names in layers.values()]
    bits = widths(found or [1.0] * len(sizes), sizes, average=average, choices=choices)
    out = m
    for width in sorted(set(bits)):
      mine = [
        a for b, names in zip(bits, layers.values(), strict=True) if b == width for a in names
      ]
      (one,) = rtn.rtn(bits=width, select="|".join(map(re.escape, mine)), **form)
      out = one.apply(out, {}, key)
    if traced:
      return out
    return tuning.noted(out, {
      "sensitivity": {str(i): x for i, x in zip(layers, found, strict=True)},
      "bits": {str(i): b for i, b in zip(layers, bits, strict=True)},
    })  # fmt: skip

  wants: dict[str, needs.Need] = {"batches": needs.Batches()}
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, units)


def _measure(
  m: model_lib.Model, batches: Sequence[Any], layers: Mapping[int, list[str]], how: str
) -> list[float]:
  if not batches:
    raise ValueError("cptquant measures sensitivities on calibration data; there is none")
  batches = [jax.tree.map(np.asarray, b) for b in batches]
  if how == "pmpq":
    return pmpq(m, batches, layers)
  if isinstance(m.spec, models.VisionSpec) and m.spec.kind != "vit":
    raise ValueError(f"sensitivity={how!r} needs a transformer; use 'pmpq'")
  found = WAYS[how](m, batches)
  return [found[i] for i in layers]


def _loss(params: Any, batch: Any, *, spec: Any) -> jax.Array:
  return models.nll(spec, params, batch)


def _moments(params: Any, batch: Any, *, spec: Any) -> list[jax.Array]:
  x = models.inputs(batch)
  mask = batch.get("mask") if isinstance(batch, Mapping) else None
  seen = models.forward(
    spec, params, x, observe=lambda name, value: value if name in ("in", "out") else None
  ).observed
  weights = jnp.ones(seen["in"][0].shape[:2]) if mask is None else (jnp.asarray(mask) != 0) * 1.0

  def moment(a: jax.Array, b: jax.Array) -> jax.Array:
    ends = (a.astype(jnp.float32), b.astype(jnp.float32), jnp.ones((*a.shape[:-1], 1)))
    both = jnp.where(weights[..., None] > 0, jnp.concatenate(ends, axis=-1), 0)
    both = both.reshape(-1, both.shape[-1])
    return jnp.matmul(both.T, both, precision="highest")

  return [moment(a, b) for a, b in zip(seen["in"], seen["out"], strict=True)]


@jax.jit
def _correlations(moments: Sequence[jax.Array]) -> list[jax.Array]:
  return [correlation(x) for x in moments]


def _variances(params: Any, batch: Any, *, spec: Any) -> jax.Array:
  """Compute the variance of the first-order change of the loss by perturbations of each layer."""
  shapes: dict[str, tuple[int, ...]] = {}

  def look(name: str, value: jax.Array, layer: jax.Array) -> jax.Array:
    if name in READ:
      shapes[name] = value.shape
    return value

  def loss(nudges: Mapping[str, jax.Array]) -> jax.Array:
    def patch(name: str, value: jax.Array, layer: jax.Array) -> jax.Array:
      if name not in nudges:
        return value
      size = jnp.sqrt(jnp.square(value.astype(jnp.float32)).mean(axis=-1, keepdims=True))
      return value + (nudges[name][layer] * jax.lax.stop_gradient(size)).astype(value.dtype)

    return models.nll(spec, params, batch, patch=patch)

  jax.eval_shape(lambda: models.nll(spec, params, batch, patch=look))
  count = paths.num_layers(params)
  nudges = {n: jnp.zeros((count, *shape), jnp.float32) for n, shape in shapes.items()}
  slopes = jax.grad(loss)(nudges)
  each = [jnp.square(g).reshape(count, -1).sum(axis=1) for g in slopes.values()]
  return jnp.stack(each).sum(axis=0)
