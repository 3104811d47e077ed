# SPDX-License-Identifier: Apache-2.0
"""Principal components of the residual stream, place by place or of all places together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.core import model as model_lib
from treesurgeon.core import paths, programs


def components(h: Float[Array, "dim dim"], *, width: int) -> Float[Array, "dim width"]:
  """Find the principal components.

  Args:
    h: second moment.
    width: how many.

  Returns:
    Eigenvectors of the largest eigenvalues, largest first, as columns.

  Example:
    >>> jnp.abs(components(jnp.diag(jnp.array([1.0, 4.0])), width=1)).tolist()
    [[0.0], [1.0]]
  """
  found = jnp.linalg.eigh(h.astype(jnp.float32))[1][:, ::-1][:, :width]
  # The sign of an eigenvector is arbitrary and changes with the order of sums: let the largest
  # entry be positive.
  largest = jnp.take_along_axis(found, jnp.abs(found).argmax(axis=0, keepdims=True), axis=0)
  return jnp.where(largest < 0, -found, found)


def by_place(m: model_lib.Model, batches: Iterable[Any], *, width: int) -> list[jax.Array]:
  """Find the components at every place, the stream cut at each before going on.

  Args:
    m: a model whose norms are folded.
    batches: token batches (`models.losses`); padding, as a "mask" says, does not count.
    width: how many components.

  Returns:
    (dim, width) each: after the embeddings, then after every branch, of parallel ones after both.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> len(by_place(m, [], width=2))
    5
  """
  prepared = [_begin(m, b) for b in batches]
  states, weights = [h for h, _ in prepared], [w for _, w in prepared]
  dim = m.spec.d_model
  find = programs.compiled(components, (("width", width),))
  keep = programs.compiled(_project, ())

  def at(moments: Iterable[jax.Array]) -> jax.Array:
    return find(sum(moments, jnp.zeros((dim, dim))), {})

  def moments(states: Sequence[jax.Array]) -> list[jax.Array]:
    pair = zip(states, weights, strict=True)
    return [programs.compiled(_moment, ())(h, {"weights": w}) for h, w in pair]

  turns = [at(moments(states))]
  states = [keep(h, {"q": turns[-1]}) for h in states]
  through = {
    stop: programs.compiled(_through, (("spec", m.spec), ("stop", stop))) for stop in ("mid", "out")
  }
  for start, stop, tree in paths.segments(m.params):
    for i in range(start, stop):
      given = {"index": jnp.int32(i - start), "layer": jnp.int32(i), "q": jnp.eye(dim)}
      if not m.spec.parallel:
        middle = [through["mid"](tree, {**given, "h": h}) for h in states]
        turns.append(at(moments(middle)))
        given["q"] = turns[-1]
      states = [through["out"](tree, {**given, "h": h}) for h in states]
      turns.append(at(moments(states)))
      states = [keep(h, {"q": turns[-1]}) for h in states]
  return turns


def of_all(m: model_lib.Model, batches: Iterable[Any], *, width: int) -> jax.Array:
  """Find the components of the normalized stream at all places together.

  Args:
    m: a model whose norms are folded.
    batches: token batches.
    width: how many components.

  Returns:
    (dim, width).

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> of_all(m, [], width=2).shape
    (4, 2)
  """
  through = programs.compiled(_normalized, (("spec", m.spec),))
  total = jnp.zeros((m.spec.d_model,) * 2)
  for h, w in (_begin(m, b) for b in batches):
    total = total + through(m.params, {"h": h, "weights": w})
  return programs.compiled(components, (("width", width),))(total, {})


def _begin(m: model_lib.Model, batch: Any) -> tuple[jax.Array, jax.Array]:
  """Embed a batch; tell which places count."""
  x = models.inputs(batch)
  mask = batch.get("mask") if isinstance(batch, Mapping) else None
  weights = jnp.ones(x.shape, jnp.float32) if mask is None else jnp.asarray(mask) != 0
  enter = programs.compiled(_embed, (("spec", m.spec),))
  return enter({"embed": m.params["embed"]}, {"x": x}), weights.astype(jnp.float32)


def _embed(outer: Any, x: jax.Array, *, spec: models.Spec) -> jax.Array:
  return models.embed(spec, outer, x)


def _project(h: jax.Array, q: jax.Array) -> jax.Array:
  turned = jnp.matmul(h.astype(jnp.float32), q, precision="highest")
  return jnp.matmul(turned, q.T, precision="highest").astype(h.dtype)


def _moment(h: jax.Array, weights: jax.Array) -> jax.Array:
  flat = h.astype(jnp.float32).reshape(-1, h.shape[-1]) * weights.reshape(-1, 1)
  return jnp.matmul(flat.T, flat, precision="highest")


def _through(
  tree: Any, h: jax.Array, index: jax.Array, layer: jax.Array, q: jax.Array, *, spec: Any, stop: str
) -> jax.Array:
  """Run a layer up to a place, the stream between its branches projected on the way."""

  def patch(name: str, value: jax.Array, at: jax.Array) -> jax.Array:
    del at
    return _project(value, q) if name == "mid" and stop == "out" else value

  one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)
  out, seen = models.block(
    spec, one, h, layer=layer, patch=patch, observe=lambda n, x: x if n == stop else None
  )
  return out if stop == "out" else seen[stop]


def _normalized(
  params: Any, h: jax.Array, weights: jax.Array, *, spec: models.Spec
) -> Float[Array, "dim dim"]:
  """Add up the second moments of what the norms give, each of which counts the same."""

  def observe(name: str, value: jax.Array) -> jax.Array | None:
    return _moment(value, weights) if name in ("attn/in", "mlp/in") else None

  total = jnp.zeros((spec.d_model,) * 2)
  for start, stop, tree in paths.segments(params):

    def body(h: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
      one, layer = xs
      h, seen = models.block(spec, one, h, layer=layer, observe=observe)
      return h, sum(seen.values(), jnp.zeros((spec.d_model,) * 2))

    h, found = jax.lax.scan(body, h, (tree, jnp.arange(start, stop, dtype=jnp.int32)))
    total = total + found.sum(axis=0)
  if not spec.final_norm:
    return total
  wide = h.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + spec.norm_eps)
  return total + _moment(wide * scale, weights)
