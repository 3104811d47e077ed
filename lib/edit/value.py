# SPDX-License-Identifier: Apache-2.0
"""Search for the value that a layer should give at the subject, and the contexts it is sought in.

The first half of ROME (Meng et al. 2022, arXiv:2202.05262, section 3.1) and of its successors; see
`rome.py` for where we differ from the paper's code.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from treesurgeon import models
from treesurgeon.edit import tokens


class Value(NamedTuple):
  """Hold the outcome of the search for a value.

  Attributes:
    delta: (d,) change of the layer's output at the subject.
    nll: mean negative log-likelihood of the new object over the contexts, at `delta`.
    start: the same without a change.
    steps: steps taken.
    clamped: whether the clamp bound.
  """

  delta: Float[Array, " d"]
  nll: Float[Array, ""]
  start: Float[Array, ""]
  steps: Int[Array, ""]
  clamped: Any


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def solve_value(
  spec: models.Spec,
  params: Mapping[str, Any],
  edit: tokens.Statements,
  keep: tokens.Statements,
  layer: int | Int[Array, ""],
  *,
  steps: int = 40,
  rate: float | Float[Array, ""] = 0.2,
  kl: float | Float[Array, ""] = 0.0625,
  decay: float | Float[Array, ""] = 0.5,
  clamp: float | Float[Array, ""] = 4.0,
  stop: float | Float[Array, ""] = 0.05,
) -> Value:
  """Seek the change of a layer's output at the subject that makes the model give the new object.

  Minimizes mean NLL(o*) + kl * KL(edited || original) + decay * |delta| / |v0|^2 by Adam.

  Args:
    spec: architecture.
    params: parameters.
    edit: prompt in several contexts, the first one plain, with the new object as labels.
    keep: essence prompts.
    layer: which layer.
    steps: at most so many.
    rate: Adam's step, relative to rms(v0).
    kl: weight of the divergence on the essence prompts, at their last token.
    decay: weight of the change's norm.
    clamp: largest |delta| / |v0|.
    stop: stop once the loss is below it, in nats.

  Returns:
    The change and how the search went.

  Example:
    >>> spec = models.Spec(vocab_size=9, d_model=8, num_layers=2, num_heads=1, d_ff=8, gated=False)
    >>> params = models.init(spec, jax.random.key(0))
    >>> edit = tokens.statements([(tokens.Prompt((1, 2, 3), 0, 1), (4,))])
    >>> found = solve_value(spec, params, edit, edit, 0, clamp=100.0, decay=0.0)
    >>> bool(found.nll < found.start)
    True
  """
  v0 = at_subject(spec, params, edit, layer, tap="mlp/out")[0]
  base = _last_logprobs(models.forward(spec, params, keep.ids).logits, keep)
  size = jnp.maximum(jnp.linalg.norm(v0), jnp.finfo(jnp.float32).tiny)

  def loss(d: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    nll = _nll(models.forward(spec, params, edit.ids, patch=_add(edit, layer, d)).logits, edit)
    now = models.forward(spec, params, keep.ids, patch=_add(keep, layer, d)).logits
    now = _last_logprobs(now, keep)
    drift = jnp.sum(jnp.exp(now) * (now - base), axis=-1).mean()
    # The norm has no gradient at 0, where the search starts.
    norm = jnp.sqrt(jnp.sum(jnp.square(d)) + 1e-12)
    return nll + kl * drift + decay * norm / jnp.square(size), nll

  adam = optax.adam(rate * size / jnp.sqrt(v0.size))
  gradient = jax.value_and_grad(loss, has_aux=True)

  def body(state: tuple) -> tuple:
    d, memory, i, _, _ = state
    (total, nll), g = gradient(d)
    change, memory = adam.update(g, memory)
    new = d + change
    new = new * jnp.minimum(1.0, clamp * size / jnp.linalg.norm(new))
    done = total < stop
    return jnp.where(done, d, new), memory, i + 1, done, nll

  def going(state: tuple) -> jax.Array:
    return (state[2] < steps) & ~state[3]

  zero = jnp.zeros_like(v0)
  start = loss(zero)[1]
  d, _, taken, _, _ = jax.lax.while_loop(
    going, body, (zero, adam.init(zero), 0, jnp.asarray(False), start)
  )
  clamped = jnp.linalg.norm(d) >= 0.999 * clamp * size
  return Value(d, loss(d)[1], start, jnp.asarray(taken), clamped)


@functools.partial(jax.jit, static_argnames=("spec", "count", "length"))
def contexts(
  spec: models.Spec, params: Mapping[str, Any], key: jax.Array, *, count: int, length: int
) -> Int[Array, "count length"]:
  """Sample texts from the model, each from a random first token.

  Args:
    spec: architecture.
    params: parameters.
    key: random key.
    count: how many.
    length: tokens each.

  Returns:
    Token ids.

  Example:
    >>> spec = models.Spec(vocab_size=9, d_model=8, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> contexts(spec, params, jax.random.key(1), count=2, length=3).shape
    (2, 3)
  """
  first = jax.random.randint(jax.random.fold_in(key, 0), (count,), 0, spec.vocab_size)
  ids = jnp.zeros((count, length), jnp.int32).at[:, 0].set(first)

  def body(i: jax.Array, ids: jax.Array) -> jax.Array:
    logits = models.forward(spec, params, ids).logits
    logits = jax.lax.dynamic_index_in_dim(logits, i - 1, axis=1, keepdims=False)
    return ids.at[:, i].set(jax.random.categorical(jax.random.fold_in(key, i), logits))

  return jax.lax.fori_loop(1, length, body, ids)


@functools.partial(jax.jit, static_argnames="spec")
def attained(
  spec: models.Spec, params: Mapping[str, Any], rows: tokens.Statements
) -> Float[Array, ""]:
  """Compute the mean negative log-likelihood of the labels.

  Args:
    spec: architecture.
    params: parameters.
    rows: prompts with labels.

  Returns:
    Nats a label, averaged within a row first.

  Example:
    >>> spec = models.Spec(vocab_size=9, d_model=8, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> bool(attained(spec, params, tokens.statements([(tokens.Prompt((1,), 0, 0), (2,))])) > 0)
    True
  """
  return _nll(models.forward(spec, params, rows.ids).logits, rows)


@functools.partial(jax.jit, static_argnames=("spec", "tap"))
def at_subject(
  spec: models.Spec,
  params: Mapping[str, Any],
  rows: tokens.Statements,
  layer: int | Int[Array, ""],
  *,
  tap: str,
) -> Float[Array, "n width"]:
  """Read a layer's activation at the subject's last token.

  Args:
    spec: architecture.
    params: parameters.
    rows: prompts.
    layer: which layer.
    tap: which place in the layer: "mlp/down/in" for keys, "mlp/out" for values.

  Returns:
    float32, one vector a prompt.

  Example:
    >>> spec = models.Spec(vocab_size=9, d_model=4, num_layers=1, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> rows = tokens.statements([(tokens.Prompt((1,), 0, 0), (2,))])
    >>> at_subject(spec, params, rows, 0, tap="mlp/down/in").shape
    (1, 8)
  """

  def observe(name: str, x: jax.Array) -> jax.Array | None:
    return _pick(x, rows.subject) if name == tap else None

  return models.forward(spec, params, rows.ids, observe=observe).observed[tap][layer]


def in_contexts(
  request: tokens.Tokenized, drawn: Sequence[Int[Array, "_ _"]], *, length: int
) -> tokens.Statements:
  """Put a request's prompt and new object behind each of several contexts.

  Args:
    request: the request.
    drawn: random contexts, by length.
    length: tokens a row.

  Returns:
    Rows, the first one without a context.

  Raises:
    ValueError: if a row does not fit.

  Example:
    >>> wish = tokens.Tokenized((), tokens.Prompt((1, 2), 0, 1), (3,))
    >>> in_contexts(wish, [jnp.array([[7, 7]])], length=4).ids.tolist()
    [[1, 2, 0, 0], [7, 7, 1, 2]]
  """
  row = (request.prompt, request.new)
  groups = [tokens.statements([row], before=request.lead, length=length)]
  lead = len(request.lead)
  for texts in drawn:
    count, n = texts.shape
    before = (*request.lead, *[0] * n, *request.separator)
    made = tokens.statements([row] * count, before=before, length=length)
    ids = jnp.asarray(made.ids).at[:, lead : lead + n].set(texts)
    groups.append(dataclasses.replace(made, ids=ids))
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *groups)


def _pick(x: Float[Array, "n s w"], place: Int[Array, " n"]) -> Float[Array, "n w"]:
  return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def _last_logprobs(logits: jax.Array, rows: tokens.Statements) -> Float[Array, "n vocab"]:
  return jax.nn.log_softmax(_pick(logits, rows.last))


def _nll(logits: Float[Array, "n s vocab"], rows: tokens.Statements) -> Float[Array, ""]:
  asked = rows.labels >= 0
  each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked, rows.labels, 0))
  return (jnp.sum(each * asked, axis=1) / jnp.maximum(asked.sum(axis=1), 1)).mean()


def _add(rows: tokens.Statements, layer: Any, d: Float[Array, " d"]) -> Any:
  """Add a vector to one layer's feed-forward output at the subject's last token."""

  def patch(name: str, x: jax.Array, at: jax.Array) -> jax.Array:
    if name != "mlp/out":
      return x
    here = (jnp.arange(x.shape[1])[None, :] == rows.subject[:, None]) & (at == layer)
    return x + (here[:, :, None] * d[None, None, :]).astype(x.dtype)

  return patch
