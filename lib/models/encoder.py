# SPDX-License-Identifier: Apache-2.0
"""What a bidirectional encoder adds: token types, the masked-token head, sentence vectors.

BERT (Devlin et al., arXiv:1810.04805) and the MiniLM models distilled from it (Wang et al.,
arXiv:2002.10957). The blocks are the decoder's, with `norm_place="residual"` and no causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.models import layers
from treesurgeon.models import spec as specs


def add_types(
  spec: specs.Spec,
  tree: Mapping[str, Any],
  h: Float[Array, "batch seq dim"],
  types: Int[ArrayLike, "batch seq"] | None = None,
) -> Float[Array, "batch seq dim"]:
  """Add the embedding of each token's type.

  Args:
    spec: the architecture.
    tree: `params["embed"]`.
    h: token embeddings.
    types: token types; None means type 0.

  Returns:
    The sum.
  """
  del spec
  table = leaves.dense(tree["types"]["embedding"])
  return h + (table[0][None, None, :] if types is None else jnp.take(table, types, axis=0))


def transform(
  spec: specs.Spec, tree: Mapping[str, Any], h: Float[Array, "batch seq dim"]
) -> Float[Array, "batch seq dim"]:
  """Apply the masked-token head's own layer: linear, activation, norm.

  Args:
    spec: the architecture.
    tree: `params["mlm_head"]`.
    h: last hidden state.

  Returns:
    What the tied embedding is multiplied with.
  """
  h = layers.ACTIVATIONS[spec.activation](_linear(tree["dense"], h))
  norm = tree["norm"]
  return layers.normalize(h, norm["scale"], norm.get("bias"), kind=spec.norm, eps=spec.norm_eps)


def pool(
  spec: specs.Spec, params: Mapping[str, Any], hidden: Float[Array, "batch seq dim"]
) -> Float[Array, "batch dim"]:
  """Summarize a sequence by its first token, as BERT's next-sentence head reads it.

  Args:
    spec: the architecture.
    params: parameters; only `pooler` is read.
    hidden: `Output.hidden`.

  Returns:
    tanh(linear(first token)).

  Raises:
    ValueError: if the architecture has no pooler.
  """
  if not spec.pooler:
    raise ValueError("this encoder has no pooler (Spec.pooler is False)")
  return jnp.tanh(_linear(params["pooler"], hidden[:, :1])[:, 0])


def mean_pool(
  hidden: Float[Array, "batch seq dim"], mask: Int[ArrayLike, "batch seq"]
) -> Float[Array, "batch dim"]:
  """Average the real tokens, the sentence vector of the MiniLM sentence encoders.

  Args:
    hidden: `Output.hidden`.
    mask: nonzero at real tokens.

  Returns:
    Sentence vectors, float32, not normalized.

  Example:
    >>> import jax.numpy as jnp
    >>> from treesurgeon.models import encoder
    >>> encoder.mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]])).item()
    2.0
  """
  weight = (jnp.asarray(mask) != 0).astype(jnp.float32)[:, :, None]
  total = (hidden.astype(jnp.float32) * weight).sum(axis=1)
  return total / jnp.maximum(weight.sum(axis=1), 1.0)


def _linear(tree: Mapping[str, Any], x: jax.Array) -> jax.Array:
  y = kernels.matmul(x, tree["kernel"]).astype(x.dtype)
  return y + tree["bias"].astype(x.dtype)[None, None, :]
