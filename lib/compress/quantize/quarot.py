# SPDX-License-Identifier: Apache-2.0
"""QuaRot: turn what is quantized by Hadamard matrices, which spread outliers; no output changes.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv 2404.00456). Two
turns hide in the weights, so that any quantizer can follow and a checkpoint stays what it is, and
one takes place in every forward pass:

* "stream": norms are folded into the kernels behind them and hidden states h become h Q, with Q a
  Hadamard matrix whose rows have random signs (`compress.residual`). A tied head is untied. Layer
  norms become RMS norms of centred states, which families with layer norms have no files for.
* "heads": the values of every head are turned by a Hadamard matrix, and the rows of o back;
  attention mixes positions, not channels. Query heads that share a value head share its turn.
* "down", on request: the inputs of down, which have the worst outliers, by a `leaves.Rotated`, in
  which RTN, HQQ, GPTQ and `activations` quantize what it holds. Any other method, and files for
  other programs, take the turn off again, which changes no output either.

Widths that are no power of two: see `core.hadamard`. Left out of what the paper turns at run time:
across heads before o, and queries and keys, which only a quantized cache needs.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.compress import residual
from treesurgeon.core import hadamard, leaves, needs, paths, programs, step, tuning
from treesurgeon.core import model as model_lib

PLACES = ("stream", "heads")  # what hides in the weights
EVERY = (*PLACES, "down")
DOWN = "down/kernel"  # ends its name, of each expert's too


def start(
  m: model_lib.Model, key: jax.Array, places: Sequence[str] = PLACES
) -> dict[str, Float[Array, "..."]]:
  """Draw the turns of a network.

  Args:
    m: the model.
    key: decides on the signs of the stream's.
    places: which of `EVERY`; "down" has but one turn and is not in the result.

  Returns:
    "stream", (d_model, d_model), and "heads", (layers, head_dim, head_dim), all alike; float32.

  Raises:
    ValueError: as `residual.check`; for heads alone, only for another kind of network or
      compressed leaves.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=2, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> {n: q.shape for n, q in start(m, jax.random.key(0)).items()}
    {'heads': (2, 2, 2), 'stream': (4, 4)}
  """
  spec = m.spec
  if not isinstance(spec, models.Spec):
    raise ValueError(f"a {type(spec).__name__} cannot be turned; valid: a models.Spec")
  if "stream" in places:
    residual.check(m)
  packed = [a for a, x in paths.walk(m.params).items() if leaves.is_leaf(x)]
  if packed:
    raise ValueError(f"{packed[0]} is compressed; turn the network before that")
  made = _start(key, width=spec.d_model, layers=spec.num_layers, head=spec.head_dim)
  return {n: q for n, q in made.items() if n in places}


def turn_heads(
  params: Mapping[str, Any], r: Float[Array, "layers head_dim head_dim"]
) -> dict[str, Any]:
  """Turn the values of all heads, and back what reads them.

  Args:
    params: nested parameters of a transformer.
    r: an orthogonal matrix a layer.

  Returns:
    Nested parameters of the same function, in their dtypes.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=2, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> same = turn_heads(params, jnp.eye(2)[None])["layers"]["0:1"]["attn"]["v"]["kernel"]
    >>> bool((same == params["layers"]["0:1"]["attn"]["v"]["kernel"]).all())
    True
  """
  product = functools.partial(jnp.einsum, precision="highest")
  layers = {}
  for first, last, tree in paths.segments(params):
    flat, own = paths.walk(tree), r[first:last].astype(jnp.float32)
    for name in ("attn/v/kernel", "attn/v/bias"):
      if name in flat:
        w = flat[name].astype(jnp.float32)
        heads = w.reshape(last - first, -1, w.shape[-1] // own.shape[-1], own.shape[-1])
        turned = product("lrgd,lde->lrge", heads, own).reshape(w.shape)
        flat[name] = turned.astype(flat[name].dtype)
    w = flat["attn/o/kernel"].astype(jnp.float32)
    heads = w.reshape(last - first, -1, own.shape[-1], w.shape[-1])
    back = product("lde,lgdc->lgec", own, heads).reshape(w.shape)
    flat["attn/o/kernel"] = back.astype(flat["attn/o/kernel"].dtype)
    layers[f"{first}:{last}"] = paths.nest(flat)
  return {**params, "layers": layers}


def turned(
  m: model_lib.Model, turns: Mapping[str, jax.Array], *, down: bool = False
) -> model_lib.Model:
  """Write a network in another basis.

  Args:
    m: the model; not modified.
    turns: as `start` returns, or some of them.
    down: turn the inputs of down at run time.

  Returns:
    A model of the same function, in its dtypes.

  Example:
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=1, num_heads=2, d_ff=8)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> turned(m, {}) is m
    True
  """
  if "stream" in turns:
    m = residual.rotate(m, turns["stream"])
  if "heads" in turns:
    m = m.replace(params=programs.compiled(turn_heads, ())(m.params, {"r": turns["heads"]}))
  if down:
    m = m.replace(params=programs.compiled(_hold, ())(m.params, {}))
  return m


def check(places: Sequence[str]) -> None:
  """Refuse places that are not known.

  Args:
    places: names.

  Raises:
    ValueError: naming the first.

  Example:
    >>> check(("heads",))
  """
  for place in places:
    if place not in EVERY:
      raise ValueError(f"places={tuple(places)}: {place!r} is none; valid: {', '.join(EVERY)}")


@step.method("compress.quantize.quarot")
def quarot(*, places: tuple[str, ...] = PLACES) -> step.Step:
  """Turn a network's stream and heads by Hadamard matrices; to be followed by a quantizer.

  Args:
    places: of "stream", "heads" and "down"; none is the neutral setting.

  Returns:
    A transform of whole models; it folds norms, and unties a tied head.

  Raises:
    ValueError: for another place; when applied, for a network whose norms stay where they are, or
      that is compressed.

  Example:
    >>> quarot()
    (compress.quantize.quarot(),)

  Reference:
    Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, 2024, arXiv:2404.00456.
  """
  check(places)

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    del evidence
    return m if not places else turned(m, start(m, key, places), down="down" in places)

  return tuning.over_model(apply, {})


@functools.partial(jax.jit, static_argnames=("width", "layers", "head"))
def _start(key: jax.Array, *, width: int, layers: int, head: int) -> dict[str, jax.Array]:
  signs = jax.random.rademacher(key, (width, 1), jnp.float32)
  heads = jnp.broadcast_to(hadamard.matrix(head), (layers, head, head))
  return {"stream": signs * hadamard.matrix(width), "heads": heads}


def _hold(params: Mapping[str, Any]) -> dict[str, Any]:
  def hold(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {n: leaves.Rotated.of(x) if n.endswith(DOWN) else x for n, x in flat.items()}

  return residual.over_layers(params, hold)
