# SPDX-License-Identifier: Apache-2.0
"""ROME: write one association into a feed-forward layer by a rank-one change of its output matrix.

Meng, Bau, Andonian and Belinkov, "Locating and Editing Factual Associations in GPT", NeurIPS 2022,
arXiv:2202.05262. The layer's W maps a key, the activation at the subject's last token, to a value.
A value v* is sought that makes the model give the new object; then W changes the least, as
measured by the uncentred covariance C of all keys, such that the key gives v*.

Where we differ from the paper's code: the step of the search is relative to rms(v0), since an
absolute one overshoots in narrow models (hence 40 steps of 0.2 instead of 20 of 0.5); KL is read at
the last token of an essence prompt, as the paper says (the code reads it at the subject); C gets a
relative ridge, because with fewer tokens than features it is singular; random contexts start from a
random token instead of fixed words. The edit is returned as a `delta.Delta`. As in the code, u uses
the key averaged over contexts, the constraint the key of the plain prompt.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models, stats
from treesurgeon.core import leaves, linalg, meshes, needs, paths, step
from treesurgeon.core import model as model_lib
from treesurgeon.edit import delta as deltas
from treesurgeon.edit import tokens, value

LENGTHS = (5, 10)  # of random contexts, as in the paper


@jax.jit
def rank_one_update(
  w: Float[Array, "f d"],
  c: Float[Array, "f f"],
  k: Float[Array, " f"],
  k0: Float[Array, " f"],
  v: Float[Array, " d"],
  *,
  ridge: float | Float[Array, ""] = 1e-4,
) -> tuple[Float[Array, " f"], Float[Array, " d"]]:
  """Change W the least such that k0 (W + u r) = v, for keys distributed as C.

  u = C^-1 k / (k0 C^-1 k), r = v - k0 W. With k = k0 this minimizes tr(dW' C dW) under the
  constraint (Lagrange), since every dW with k0 dW = r costs at least |r|^2 / (k0 C^-1 k0).

  Args:
    w: kernel, input first.
    c: uncentred second moment of the layer's inputs, a mean.
    k: key averaged over contexts.
    k0: key of the plain prompt.
    v: value wanted, without the layer's bias.
    ridge: added to C's diagonal, relative to its mean; raised until C factors.

  Returns:
    (u, r), float32: the update is their outer product.

  Example:
    >>> k = jnp.array([1.0, 0.0])
    >>> u, r = rank_one_update(jnp.zeros((2, 2)), jnp.eye(2), k, k, jnp.array([3.0, 4.0]))
    >>> (k @ jnp.outer(u, r)).tolist()
    [3.0, 4.0]
  """
  w, k, k0, v = (x.astype(jnp.float32) for x in (w, k, k0, v))
  low, _ = linalg.damped_cholesky(c.astype(jnp.float32), ridge)
  u = jax.scipy.linalg.cho_solve((low, True), k)
  r = v - jnp.matmul(k0, w, precision="highest")
  return u / jnp.dot(k0, u, precision="highest"), r


@step.method("edit.rome")
def rome(
  *,
  layer: int = 0,
  requests: str = "",
  steps: int = 40,
  rate: float = 0.2,
  kl: float = 0.0625,
  decay: float = 0.5,
  clamp: float = 4.0,
  stop: float = 0.05,
  contexts: int = 10,
  covariance: bool = True,
  ridge: float = 1e-4,
) -> step.Step:
  """Write associations into one feed-forward layer, each by a rank-one change.

  Neutral: without requests the model stays as it is. Several requests are edits one after another.

  Args:
    layer: which layer; causal tracing tells (`edit.tracing`).
    requests: JSON file of requests; "" takes those handed to the driver.
    steps, rate, kl, decay, clamp, stop: see `value.solve_value`.
    contexts: random texts of each length (5 and 10 tokens) put before the prompt.
    covariance: whether to protect other keys; False is C = I, which needs no text.
    ridge: see `rank_one_update`.

  Returns:
    The transform. The edited model's `aux["delta"]` holds the change alone, `aux["notes"]` what
    each edit attained.

  Raises:
    ValueError: for arguments out of range; when applied, for a layer that the model lacks, a
      compressed leaf, or a prompt that does not fit into the context.

  Example:
    >>> rome(layer=5)
    (edit.rome(layer=5),)

  Reference:
    Meng et al., NeurIPS 2022, arXiv:2202.05262.
  """
  if layer < 0 or steps < 0 or contexts < 0:
    raise ValueError(f"edit.rome: layer={layer}, steps={steps}, contexts={contexts} must be >= 0")
  if rate <= 0 or clamp <= 0 or ridge < 0:
    raise ValueError(f"edit.rome: rate={rate} and clamp={clamp} must be > 0, ridge={ridge} >= 0")
  address = f"layers/{layer}/mlp/down/kernel"
  search = {"steps": steps, "rate": rate, "kl": kl, "decay": decay, "clamp": clamp, "stop": stop}

  def apply(m: model_lib.Model, evidence: needs.Evidence, key: jax.Array) -> model_lib.Model:
    wanted: Sequence[tokens.Tokenized] = evidence["requests"]
    if not wanted:
      return m
    deltas.editable(m, address)
    c = evidence["covariance"][address] if covariance else None
    length = _length(m.spec, wanted, contexts)
    changes, notes = [], []
    for i, request in enumerate(wanted):
      change, note = edit(
        m, request, c, jax.random.fold_in(key, i), layer=layer, contexts=contexts,
        length=length, ridge=ridge, **search,
      )  # fmt: skip
      m = deltas.apply(m, change)
      changes.append(change)
      notes.append(note)
    made = deltas.compose(*changes)
    if not any(isinstance(x, jax.core.Tracer) for n in notes for x in n.values()):
      plain = [{k: v if isinstance(v, str) else float(v) for k, v in n.items()} for n in notes]
      made = deltas.Delta(made.parts, tuple(plain))
      old = dict(m.aux.get("notes", {}))
      m = m.replace(aux={**m.aux, "notes": {**old, "edits": plain}, "delta": made})
    return m

  def units(names: Sequence[str]) -> step.Units:
    return [(n,) for n in paths.select(names, re.escape(address))]

  wants: dict[str, needs.Need] = {"requests": needs.Requests(requests)}
  if covariance:
    wants["covariance"] = needs.Statistic("second_moment", re.escape(address))
  return step.Step(wants, meshes.with_auto_axes(apply), "model", {}, units)


def edit(
  m: model_lib.Model,
  request: tokens.Tokenized,
  covariance: stats.SecondMoment | None,
  key: jax.Array,
  *,
  layer: int,
  contexts: int = 10,
  length: int | None = None,
  ridge: float = 1e-4,
  **search: float,
) -> tuple[deltas.Delta, dict[str, Any]]:
  """Compute the change for one request.

  Args:
    m: the model; not modified.
    request: what to write.
    covariance: of the layer's keys; None is the identity.
    key: random key of the contexts.
    layer: which layer.
    contexts: random contexts of each length.
    length: tokens a row, so that several requests share one program; None fits this one.
    ridge: see `rank_one_update`.
    **search: see `value.solve_value`.

  Returns:
    (the change, what it attained: `nll` before, at the value found and after, steps, clamp).

  Example:
    >>> spec = models.Spec(vocab_size=9, d_model=8, num_layers=2, num_heads=1, d_ff=8, gated=False)
    >>> m = model_lib.Model(spec, models.init(spec, jax.random.key(0)))
    >>> wish = tokens.Tokenized((), tokens.Prompt((1, 2, 3), 0, 1), (4,))
    >>> change, note = edit(m, wish, None, jax.random.key(1), layer=0, contexts=0)
    >>> list(change.parts), change.parts["layers/0/mlp/down/kernel"].rank
    (['layers/0/mlp/down/kernel'], 1)
  """
  address = f"layers/{layer}/mlp/down/kernel"
  length = _length(m.spec, [request], contexts) if length is None else length
  drawn = [
    value.contexts(m.spec, m.params, jax.random.fold_in(key, n), count=contexts, length=n)
    for n in LENGTHS
    if contexts
  ]
  rows = value.in_contexts(request, drawn, length=length)
  keep = tokens.statements(
    [(p, ()) for p in request.essence or (request.prompt,)], before=request.lead, length=length
  )
  found = value.solve_value(m.spec, m.params, rows, keep, jnp.int32(layer), **search)
  keys = value.at_subject(m.spec, m.params, rows, jnp.int32(layer), tap="mlp/down/in")
  w = deltas.editable(m, address).astype(jnp.float32)
  c = jnp.eye(w.shape[0]) if covariance is None else covariance.mean()
  v = jnp.matmul(keys[0], w, precision="highest") + found.delta
  u, r = rank_one_update(w, c, keys.mean(axis=0), keys[0], v, ridge=ridge)
  change = deltas.Delta({address: leaves.LowRank(u[:, None], r[None, :])})
  after = deltas.apply(m, change)
  first = jax.tree.map(lambda x: x[:1], rows)
  nll = value.attained(m.spec, after.params, first)
  note = {
    "request": request.label,
    "nll_before": found.start,
    "nll_value": found.nll,
    "nll_after": nll,
    "steps": found.steps,
    "clamped": found.clamped,
    "norm": jnp.linalg.norm(u) * jnp.linalg.norm(r),
  }
  return change, note


def _length(spec: models.Spec, wanted: Sequence[tokens.Tokenized], contexts: int) -> int:
  """Find one row length for all requests, a multiple of 8 where the context allows."""
  longest = 0
  for r in wanted:
    room = max(LENGTHS) + len(r.separator) if contexts else 0
    texts = [len(r.prompt.ids) + len(r.new) - 1 + room, *(len(p.ids) for p in r.essence)]
    longest = max(longest, len(r.lead) + max(texts))
  limit = spec.max_positions if spec.positions == "learned" else longest + 8
  if longest > limit:
    raise ValueError(
      f"edit.rome: a prompt in its context takes {longest} tokens, the model has {limit} positions;"
      " shorten the prompt, or set contexts=0"
    )
  return min(-(-longest // 8) * 8, limit)
