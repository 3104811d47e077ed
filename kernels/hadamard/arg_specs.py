# SPDX-License-Identifier: Apache-2.0
"""Programs to compile ahead of time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from treesurgeon.kernels.hadamard import api


def transform(
  tokens: int, n: int, *, dtype: str = "bfloat16", implementation: str | None = "tpu"
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Describe a transform for `static_cost`.

  Args:
    tokens: number of vectors.
    n: their length.
    dtype: of them.
    implementation: of `api.transform`.

  Returns:
    (function, shapes of its arguments).

  Example:
    >>> transform(16, 256)[1][0].shape
    (16, 256)
  """
  x = jax.ShapeDtypeStruct((tokens, n), jnp.dtype(dtype))
  return functools.partial(api.transform, implementation=implementation), (x,)
