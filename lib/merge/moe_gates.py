# SPDX-License-Identifier: Apache-2.0
"""Router rows for experts, from prompts or at random.

`hidden` takes the base model's hidden state at the last token of every positive prompt, averages
over prompts, subtracts that of the negative ones, and normalizes; a layer's row comes from the
layer's input. `cheap_embed` does so with the sum of token embeddings, for all layers alike. The
model is run one layer at a time in float32, so memory is that of a layer (mergekit loads it
whole, in bfloat16). Prompts are padded on the right, which a causal model does not see;
`hidden_avg` averages over the tokens of each prompt, where mergekit's average includes the padding.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from treesurgeon import models
from treesurgeon.core import needs, paths
from treesurgeon.io import blocks

MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
_EMBEDDING = "embed/tokens/embedding"
_SMALL = 1e-8


def hidden(
  source: needs.Source,
  prompts: Sequence[np.ndarray],
  *,
  average: bool = False,
) -> Float[np.ndarray, "prompts layers dim"]:
  """Run a model over prompts and keep what goes into each layer.

  Args:
    source: the model, by addresses.
    prompts: token ids.
    average: over a prompt's tokens; else the last one's state.

  Returns:
    float32.
  """
  spec = source.spec
  lengths = np.asarray([len(p) for p in prompts])
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  used, tokens = np.unique(tokens, return_inverse=True)
  outer = {"embed": {"tokens": {"embedding": _float32(source.leaf(_EMBEDDING)[used])}}}
  h = models.embed(spec, outer, jnp.asarray(tokens.reshape(len(prompts), -1)))
  rows = []
  for layer in range(spec.num_layers):
    rows.append(_pool(h, jnp.asarray(lengths), average=average))
    params = _tree(source, [a for a in source.addresses() if a.startswith(f"layers/{layer}/")])
    # Layers of one structure share a program: the index is data.
    h = _block(params["layers"][str(layer)], h, jnp.int32(layer), spec=spec)
  return np.stack([np.asarray(r) for r in rows], axis=1)


def rows(
  positive: Float[np.ndarray, "some layers dim"],
  negative: Float[np.ndarray, "others layers dim"] | None,
) -> Float[np.ndarray, "layers dim"]:
  """Make an expert's rows of the states at its prompts.

  Args:
    positive: states at prompts that should go to the expert.
    negative: states at prompts that should not, or None.

  Returns:
    Rows of norm one.

  Example:
    >>> rows(np.ones((3, 1, 4), np.float32), None).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
  """
  out = positive.mean(0)
  if negative is not None:
    out = out - negative.mean(0)
  return normalized(out)


def cheap(
  embedding: Float[np.ndarray, "vocab dim"], prompts: Sequence[np.ndarray]
) -> Float[np.ndarray, "1 dim"]:
  """Sum the embeddings of all tokens of some prompts.

  Args:
    embedding: any floating dtype; only the rows of the tokens are read.
    prompts: token ids.

  Returns:
    The sum, of norm one.
  """
  tokens = np.concatenate([np.asarray(p, np.int64) for p in prompts])
  return normalized(np.asarray(embedding[tokens]).astype(np.float32).sum(0, keepdims=True))


def draw(key: jax.Array, mode: str, shape: tuple[int, int, int]) -> np.ndarray:
  """Draw router rows.

  Args:
    key: random key.
    mode: "random", standard normal; or "uniform_random", as a linear layer is initialized.
    shape: (layers, experts, dim).

  Returns:
    float32.

  Example:
    >>> draw(jax.random.key(0), "uniform_random", (1, 2, 4)).shape
    (1, 2, 4)
  """
  if mode == "random":
    return np.asarray(jax.random.normal(key, shape))
  bound = 1 / math.sqrt(shape[-1])
  return np.asarray(jax.random.uniform(key, shape, minval=-bound, maxval=bound))


def normalized(x: np.ndarray) -> np.ndarray:
  """Scale vectors to norm one.

  Args:
    x: [..., dim].

  Returns:
    The same directions; zeros stay.

  Example:
    >>> normalized(np.array([3.0, 4.0])).tolist()
    [0.6, 0.8]
  """
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), _SMALL)


def degenerate(gates: Float[np.ndarray, "layers experts dim"], *, limit: float = 5.0) -> list[int]:
  """Find layers whose rows are nearly dependent, so that some expert is hardly ever chosen.

  Args:
    gates: router rows.
    limit: largest condition number that passes.

  Returns:
    Layer indices.

  Example:
    >>> degenerate(np.ones((1, 2, 4)))
    [0]
  """
  return [i for i, g in enumerate(gates) if not np.linalg.cond(g) <= limit]


def _tree(source: needs.Source, addresses: Sequence[str]) -> dict[str, Any]:
  return paths.nest({a: _float32(source.leaf(a)) for a in addresses})


def _float32(x: Any) -> jax.Array:
  out = np.empty(x.shape, x.dtype)
  blocks.copy(out, np.asarray(x))
  return jnp.asarray(out).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="spec")
def _block(
  params: Mapping[str, Any], h: Float[Array, "n s d"], layer: Int[Array, ""], *, spec: Any
) -> Float[Array, "n s d"]:
  return models.block(spec, params, h, layer=layer)[0]


@functools.partial(jax.jit, static_argnames="average")
def _pool(
  h: Float[Array, "n s d"], lengths: Int[Array, " n"], *, average: bool
) -> Float[Array, "n d"]:
  at = jnp.arange(h.shape[1])[None, :]
  real = (at < lengths[:, None]) if average else (at == lengths[:, None] - 1)
  weight = real / jnp.sum(real, axis=1, keepdims=True)
  return jnp.einsum("nsd,ns->nd", h.astype(jnp.float32), weight)
