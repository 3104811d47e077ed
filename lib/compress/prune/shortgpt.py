# SPDX-License-Identifier: Apache-2.0
"""ShortGPT: drop the layers that turn the residual stream least.

A layer's Block Influence is 1 - mean cos(h_in, h_out) over the tokens of the calibration data: a
layer that leaves the direction of its input alone has 0. The layers of lowest influence are dropped
at once, their influences all measured in the full model (Men et al., arXiv:2403.03853). Of equal
ones the earlier goes. Neutral at drop=0.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.compress.prune import layer_drop
from treesurgeon.core import model as model_lib
from treesurgeon.core import needs, paths, programs, step, tuning
from treesurgeon.grow import take_layers


def influence(
  before: Float[Array, "*places dim"],
  after: Float[Array, "*places dim"],
  weights: Float[Array, "*places"],
) -> Float[Array, ""]:
  """Add up 1 - cos between what enters and leaves a layer.

  Args:
    before: hidden states that enter.
    after: those that leave.
    weights: 1 where a token counts.

  Returns:
    The sum, float32. A state of length 0 has no direction, and counts 1.

  Example:
    >>> x = jnp.eye(2)
    >>> influence(x, jnp.stack([x[0], x[0]]), jnp.ones(2)).item()
    1.0
  """
  a, b = before.astype(jnp.float32), after.astype(jnp.float32)
  lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  cos = (a * b).sum(axis=-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
  return jnp.sum((1 - cos) * weights)


def influences(m: model_lib.Model, batches: Iterable[Any]) -> Float[Array, " layers"]:
  """Measure the Block Influence of every layer, one layer's activations at a time.

  Args:
    m: the model.
    batches: token batches (`models.losses`); padding, as a "mask" says, does not count.

  Returns:
    float32; zeros without a batch.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> influences(m, [np.array([[1, 2, 3]])]).shape
    (2,)
  """
  total: list[Any] = [jnp.float32(0)] * paths.num_layers(m.params)
  count = jnp.float32(0)
  enter, through = (programs.compiled(f, (("spec", m.spec),)) for f in (_embed, _through))
  for batch in batches:
    x = models.inputs(batch)
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    weights = jnp.ones(x.shape, jnp.float32) if mask is None else jnp.asarray(mask) != 0
    weights = weights.astype(jnp.float32)
    h = enter({"embed": m.params["embed"]}, {"x": x})
    for start, stop, tree in paths.segments(m.params):
      for i in range(start, stop):
        at = {"h": h, "index": jnp.int32(i - start), "layer": jnp.int32(i), "weights": weights}
        h, more = through(tree, at)
        total[i] = total[i] + more
    count = count + weights.sum()
  return jnp.stack(total) / jnp.maximum(count, 1.0)


def least(scores: Float[Array, " layers"], count: int) -> list[int]:
  """Name the layers of lowest score.

  Args:
    scores: one a layer. Traced ones cannot be compared, as in a dry run: then the first layers are
      named, which is as good where all have equal shapes.
    count: how many.

  Returns:
    Indices, ascending.

  Example:
    >>> least(jnp.array([3.0, 1.0, 2.0]), 2)
    [1, 2]
  """
  if isinstance(scores, jax.core.Tracer):
    return list(range(count))
  return sorted(np.argsort(np.asarray(scores), kind="stable")[:count].tolist())


def check(drop: int, count: int) -> None:
  """Refuse to drop a number of layers that a model has not.

  Args:
    drop: how many to drop.
    count: how many there are.

  Raises:
    ValueError: naming both.

  Example:
    >>> check(1, 2)
  """
  if not 0 <= drop < count:
    raise ValueError(f"drop={drop} of {count} layers; valid: 0 to {count - 1}")


@step.method("compress.prune.shortgpt")
def shortgpt(*, drop: int) -> step.Step:
  """Drop the layers of lowest Block Influence.

  Args:
    drop: how many; 0 is the neutral setting.

  Returns:
    A transform of whole models; it rewrites the architecture too. Its lineage tells every layer's
    influence and which were dropped.

  Raises:
    ValueError: for a negative number; when applied, for as many layers as there are.

  Example:
    >>> shortgpt(drop=2)
    (compress.prune.shortgpt(drop=2),)

  Reference:
    Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
    arXiv:2403.03853.
  """
  if drop < 0:
    raise ValueError(f"drop={drop} must not be negative")

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del key
    count = paths.num_layers(m.params)
    check(drop, count)
    if not drop:
      return m
    scores = influences(m, evidence["batches"])
    gone = least(scores, drop)
    out = take_layers.reassemble(m, layer_drop.kept(count, gone))
    return out if isinstance(scores, jax.core.Tracer) else tuning.noted(out, told(scores, gone))

  return tuning.over_model(apply, {"batches": needs.Batches()})


def told(scores: Float[Array, " layers"], gone: Sequence[int]) -> dict[str, Any]:
  """Say for the lineage why layers went.

  Args:
    scores: one a layer.
    gone: which went.

  Returns:
    JSON values by name.

  Example:
    >>> told(jnp.array([0.5, 0.25]), [1])
    {'influence': [0.5, 0.25], 'dropped': [1]}
  """
  return {"influence": [float(x) for x in np.asarray(scores)], "dropped": [int(i) for i in gone]}


def _embed(outer: Any, x: jax.Array, *, spec: Any) -> jax.Array:
  return models.embed(spec, outer, x)


def _through(
  tree: Any, h: jax.Array, index: jax.Array, layer: jax.Array, weights: jax.Array, *, spec: Any
) -> tuple[jax.Array, jax.Array]:
  one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)
  out, _ = models.block(spec, one, h, layer=layer)
  return out, influence(h, out, weights)
