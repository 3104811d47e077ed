# SPDX-License-Identifier: Apache-2.0
"""Named operands that tests and benchmarks share, and programs to compile ahead of time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.kernels.attention_lowbit import api
from treesurgeon.kernels.attention_lowbit import cache as caches


def decode(
  bits: int,
  length: int,
  *,
  many: int = 4,
  rows: int = 8,
  channels: int = 128,
  group_size: int = 128,
  residual: int = 128,
  implementation: str | None = "tpu",
  traced: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Describe the attention of one new token for `static_cost`, in bfloat16.

  Args:
    bits: of the cache: 2, 4 or 8; 16 is a cache in bfloat16.
    length: tokens in the cache, all of them visible.
    many: sequences times heads of keys and values.
    rows: queries to each of these heads.
    channels: width of a head.
    group_size, residual: of the cache.
    implementation: of `api.attend`.
    traced: whether the number of tokens is an argument; the compiler costs only kernels where it is
      not.

  Returns:
    (function, shapes of its arguments).

  Example:
    >>> decode(2, 32768)[1][0].shape
    (1, 1, 32, 128)
  """
  shape = lambda heads, tokens=1: jax.ShapeDtypeStruct((1, tokens, heads, channels), jnp.bfloat16)
  q, new = shape(many * rows), shape(many)
  if bits == 16:
    past = jax.ShapeDtypeStruct((1, many, length, channels), jnp.bfloat16)
    return _dense, (q, past, past)
  make = functools.partial(
    caches.init, 1, many, length, channels, bits=bits, group_size=group_size, residual=residual
  )
  attend = functools.partial(api.attend, scale=channels**-0.5, implementation=implementation)
  operands = (q, new, new, jax.eval_shape(make))
  if traced:
    return attend, (*operands, jax.ShapeDtypeStruct((), jnp.int32))
  return lambda q, k, v, cache: attend(q, k, v, cache, length - 1), operands


def _dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  rows = q.reshape(k.shape[1], -1, q.shape[-1])
  s = jnp.einsum("hrd,htd->hrt", rows, k[0], preferred_element_type=jnp.float32)
  p = jax.nn.softmax(s * q.shape[-1] ** -0.5, axis=-1).astype(q.dtype)
  return jnp.einsum("hrt,htd->hrd", p, v[0], preferred_element_type=jnp.float32).astype(q.dtype)
