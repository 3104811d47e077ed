# SPDX-License-Identifier: Apache-2.0
"""Causal tracing: where, by layer, a fact is recalled from its subject.

Meng et al. 2022, arXiv:2202.05262, section 2: corrupt the subject's embeddings by noise, restore
one hidden state from the clean run, and see how much of the answer's probability comes back. Run it
before an edit: in a model that knows every fact but recalls it at the prompt's last token instead
of at the subject, rank-one edits fail at every layer, and this is what foretells it.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from treesurgeon import models
from treesurgeon.edit import tokens

EDITABLE = (
  0.3  # effect of the subject's last token, below which edits should not be expected to hold
)


class Trace(NamedTuple):
  """Hold probabilities of the answer, averaged over noise.

  Attributes:
    clean: [n] of the untouched model.
    corrupted: [n] with noise on the subject.
    subject: [layers, n] with the clean output of one layer put back at the subject's last token.
    last: [layers, n] the same at the prompt's last token.
  """

  clean: Float[Array, " n"]
  corrupted: Float[Array, " n"]
  subject: Float[Array, "layers n"]
  last: Float[Array, "layers n"]

  def effect(self) -> tuple[Float[Array, " layers"], Float[Array, " layers"]]:
    """Return the mean restored probability by layer: at the subject's last token, at the last."""
    corrupted = self.corrupted[None, :]
    return (self.subject - corrupted).mean(axis=1), (self.last - corrupted).mean(axis=1)


@functools.partial(jax.jit, static_argnames=("spec", "samples"))
def trace(
  spec: models.Spec,
  params: Mapping[str, Any],
  rows: tokens.Statements,
  key: jax.Array,
  *,
  noise: float | Float[Array, ""] = 3.0,
  samples: int = 10,
) -> Trace:
  """Trace the first token of each answer.

  Args:
    spec: architecture.
    params: parameters.
    rows: prompts with their subjects' places, answered correctly, the answers as labels.
    key: random key of the noise.
    noise: standard deviation of the noise, in standard deviations of the subjects' embeddings.
    samples: draws of the noise.

  Returns:
    Clean, corrupted and restored probabilities.

  Example:
    >>> spec = models.Spec(vocab_size=9, d_model=8, num_layers=2, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> rows = tokens.statements([(tokens.Prompt((1, 2, 3), 0, 1), (4,))])
    >>> trace(spec, params, rows, jax.random.key(1)).subject.shape
    (2, 1)
  """
  place = jnp.arange(rows.ids.shape[1])[None, :]
  inside = (place >= rows.first[:, None]) & (place <= rows.subject[:, None])

  def keep(name: str, x: jax.Array) -> jax.Array | None:
    return x if name in ("embed/out", "out") else None

  out = models.forward(spec, params, rows.ids, observe=keep)
  embedded = out.observed["embed/out"].astype(jnp.float32)
  weight = inside[:, :, None] / (inside.sum() * embedded.shape[-1])
  mean = (embedded * weight).sum()
  sigma = jnp.sqrt((jnp.square(embedded - mean) * weight).sum())

  def answer(patch: Any) -> Float[Array, " n"]:
    return _answer(models.forward(spec, params, rows.ids, patch=patch).logits, rows)

  def sample(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    shift = noise * sigma * jax.random.normal(key, embedded.shape) * inside[:, :, None]

    def corrupt(name: str, x: jax.Array, layer: jax.Array) -> jax.Array:
      del layer
      return x + shift.astype(x.dtype) if name == "embed/out" else x

    def restored(at: jax.Array, where: jax.Array) -> Float[Array, " n"]:
      here = (place == where[:, None])[:, :, None]

      def patch(name: str, x: jax.Array, layer: jax.Array) -> jax.Array:
        if name != "out":
          return corrupt(name, x, layer)
        return jnp.where(here & (layer == at), out.observed["out"][at], x)

      return answer(patch)

    layers = jnp.arange(spec.num_layers)
    subject = jax.lax.map(lambda at: restored(at, rows.subject), layers)
    last = jax.lax.map(lambda at: restored(at, rows.last), layers)
    return answer(corrupt), subject, last

  draws = jax.lax.map(sample, jax.random.split(key, samples))
  corrupted, subject, last = jax.tree.map(lambda x: x.mean(axis=0), draws)
  return Trace(_answer(out.logits, rows), corrupted, subject, last)


def _answer(logits: Float[Array, "n s vocab"], rows: tokens.Statements) -> Float[Array, " n"]:
  """Read the probability of the first label at the prompt's last token."""
  row = jnp.arange(rows.ids.shape[0])
  at = logits[row, rows.last]
  return jax.nn.softmax(at)[row, rows.labels[row, rows.last]]
