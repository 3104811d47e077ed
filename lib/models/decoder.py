# SPDX-License-Identifier: Apache-2.0
"""The network as a function: embed, run the layers, read out.

One pass serves decoders and encoders; `encoder.py` holds the parts only an encoder has.
Parameters are a plain tree, every leaf of which may be compressed. Activations have the dtype of
the token embeddings unless told otherwise; logits are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from treesurgeon import kernels
from treesurgeon.core import leaves
from treesurgeon.models import encoder, layers, shapes, stack, taps
from treesurgeon.models import spec as specs


class Output(NamedTuple):
  """Hold the result of a forward pass.

  Attributes:
    logits: [batch, seq, vocab] float32; None for an encoder without a language-model head.
    observed: what `observe` returned, by tap; block taps are stacked over layers, or a tuple over
      layers where unequal layers make the shapes differ. Index it by layer in either case.
    hidden: [batch, seq, d_model], the last block's output, before any final norm.
  """

  logits: Any
  observed: dict[str, Any]
  hidden: Any = None


def forward(
  spec: specs.Spec,
  params: Mapping[str, Any],
  tokens: Int[ArrayLike, "batch seq"],
  *,
  positions: Int[ArrayLike, "batch seq"] | None = None,
  mask: ArrayLike | None = None,
  types: Int[ArrayLike, "batch seq"] | None = None,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
  remat: bool = False,
  dtype: Any = None,
) -> Output:
  """Run the network on a batch of token sequences.

  Args:
    spec: the architecture.
    params: parameters; leaves may be compressed.
    tokens: token ids; an id outside the vocabulary makes its sequence NaN.
    positions: absolute positions; None counts from 0 (OPT: real tokens, as `mask` says).
    mask: [batch, seq], nonzero at real tokens, or [batch, seq, seq], nonzero where allowed;
      combined with the causal and window masks.
    types: token types of an encoder; None means type 0.
    observe: called as observe(tap, value); what it returns is gathered unless None.
    patch: called as patch(tap, value, layer), layer -1 outside blocks; returns the value to use.
    remat: recompute each block in the backward pass.
    dtype: dtype of the activations; None keeps that of the embeddings.

  Returns:
    Logits, observations and the last hidden state.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from treesurgeon import models
    >>> spec = models.Spec(vocab_size=5, d_model=4, num_layers=2, num_heads=1, d_ff=8)
    >>> params = models.init(spec, jax.random.key(0))
    >>> out = models.forward(spec, params, jnp.array([[1, 2, 3]]), observe=lambda n, x: x.mean())
    >>> out.logits.shape, out.observed["attn/in"].shape
    ((1, 3, 5), (2,))
  """
  mask = None if mask is None else jnp.asarray(mask)
  if positions is None and spec.position_offset and mask is not None and mask.ndim == 2:
    positions = jnp.maximum(jnp.cumsum(mask != 0, axis=1) - 1, 0)
  outer = taps.Tap(observe, patch)
  h = embed(spec, params, tokens, positions, types=types)
  h = outer("embed/out", h if dtype is None else h.astype(dtype))
  h, seen, _ = stack.run(
    spec,
    params,
    h,
    positions=positions,
    mask=mask,
    observe=observe,
    patch=patch,
    remat=remat,
  )
  logits = _read(spec, params, h, outer) if shapes.has_head(spec) else None
  return Output(logits, {**outer.gathered, **seen}, h)


def embed(
  spec: specs.Spec,
  params: Mapping[str, Any],
  tokens: Int[ArrayLike, "batch seq"],
  positions: Int[ArrayLike, "batch seq"] | None = None,
  *,
  types: Int[ArrayLike, "batch seq"] | None = None,
) -> Float[Array, "batch seq dim"]:
  """Look the tokens up and add whatever positions and types the architecture has.

  Args:
    spec: the architecture.
    params: parameters; only `embed` is read.
    tokens: token ids.
    positions: absolute positions; None counts from 0.
    types: token types of an encoder; None means type 0.

  Returns:
    The residual stream before the first block, in the dtype of the embeddings.

  Raises:
    ValueError: if a sequence is longer than the table of learned positions.
  """
  tree = params["embed"]
  h = jnp.take(leaves.dense(tree["tokens"]["embedding"]), tokens, axis=0)
  if spec.embed_scale != 1.0:
    # Rounded to the storage dtype first, as the reference implementations of Gemma do.
    h = h * jnp.asarray(spec.embed_scale, h.dtype)
  if spec.positions == "learned":
    if positions is None:
      length = jnp.shape(tokens)[1]
      if length > spec.max_positions:
        raise ValueError(
          f"a sequence of {length} tokens exceeds max_positions={spec.max_positions}"
        )
      positions = jnp.arange(length)[None, :]
    table = leaves.dense(tree["positions"]["embedding"])
    h = h + jnp.take(table, positions + spec.position_offset, axis=0)
  if spec.num_types:
    h = encoder.add_types(spec, tree, h, types)
  if spec.embed_norm:
    h = norm(spec, tree["norm"], h)
  return h


def head(
  spec: specs.Spec,
  params: Mapping[str, Any],
  h: Float[Array, "batch seq dim"],
  *,
  observe: taps.Observe | None = None,
  patch: taps.Patch | None = None,
) -> Float[Array, "batch seq vocab"]:
  """Turn the last block's output into logits: final norm, projection, soft cap.

  Args:
    spec: the architecture.
    params: parameters; the layers are not read.
    h: output of the last block.
    observe: as for `forward`, called for effect: what it returns is dropped.
    patch: as for `forward`.

  Returns:
    float32 logits.

  Raises:
    ValueError: for an encoder without a language-model head.
  """
  return _read(spec, params, h, taps.Tap(observe, patch))


def norm(
  spec: specs.Spec, leaf: Mapping[str, jax.Array], h: Float[Array, "batch seq dim"]
) -> Float[Array, "batch seq dim"]:
  """Apply the norm whose leaves are given, with the switches of the spec.

  Args:
    spec: the architecture.
    leaf: {"scale"[, "bias"]}.
    h: activations.

  Returns:
    Normalized activations.
  """
  return layers.normalize(
    h,
    leaf["scale"],
    leaf.get("bias"),
    kind=spec.norm,
    eps=spec.norm_eps,
    plus_one=spec.norm_plus_one,
  )


def _read(
  spec: specs.Spec, params: Mapping[str, Any], h: jax.Array, tap: taps.Tap
) -> Float[Array, "batch seq vocab"]:
  if not shapes.has_head(spec):
    raise ValueError("this encoder has no language-model head (Spec.mlm_head is False)")
  if spec.final_norm:
    h = norm(spec, params["final_norm"], h)
  if spec.mlm_head:
    h = encoder.transform(spec, params["mlm_head"], tap("mlm_head/in", h))
  h = tap("lm_head/in", h)
  if spec.tied:
    table = leaves.dense(params["embed"]["tokens"]["embedding"]).astype(h.dtype)
    logits = jnp.einsum("bsd,vd->bsv", h, table, preferred_element_type=jnp.float32)
  else:
    logits = kernels.matmul(h, params["lm_head"]["kernel"]).astype(jnp.float32)
  if spec.head_bias:
    logits = logits + params["lm_head"]["bias"].astype(jnp.float32)[None, None, :]
  if spec.final_softcap is not None:
    logits = spec.final_softcap * jnp.tanh(logits / spec.final_softcap)
  return logits
