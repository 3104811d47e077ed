# SPDX-License-Identifier: Apache-2.0
"""Walsh-Hadamard transform on a TPU, for powers of two: one product of order 128, then butterflies.

H_n is the Kronecker product of H_(n / 128) and H_128. The latter mixes the 128 lanes of a register,
which the matrix unit does without moving anything: +-1 is exact in bfloat16, as activations in
bfloat16 are, and sums are float32. The former mixes whole registers, by additions and subtractions.
So nothing is transposed, and only the additions round. Activations in float32 are three bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
LARGEST = 2**15
ROWS = 16  # that are mixed at a time
BLOCK = 2**20  # elements of a block
VMEM = 48 << 20


def unsupported(x: jax.Array) -> str:
  """Say why the kernel cannot transform vectors.

  Args:
    x: vectors.

  Returns:
    The reason, or "".

  Example:
    >>> unsupported(jnp.ones((1, 96)))
    'it takes powers of two from 128 to 32768, not 96'
  """
  n = x.shape[-1]
  if n & (n - 1) or not LANES <= n <= LARGEST:
    return f"it takes powers of two from {LANES} to {LARGEST}, not {n}"
  if x.dtype.name not in ("bfloat16", "float32"):
    return f"it takes bfloat16 or float32, not {x.dtype.name}"
  return "" if x.size else f"it takes at least one vector, not shape {list(x.shape)}"


@jax.custom_vjp
def transform(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
  """Multiply by `core.hadamard.matrix(n)`, which is its own inverse and transposed.

  Args:
    x: vectors of a power of two entries.

  Returns:
    x H in the dtype of `x`.
  """
  n = x.shape[-1]
  flat = x.reshape(-1, n)
  rows = min(-(-flat.shape[0] // ROWS) * ROWS, max(ROWS, BLOCK // n))
  spec = pl.BlockSpec((rows, n), lambda i: (i, 0))
  y = pl.pallas_call(
    functools.partial(_kernel, rows=rows),
    grid=(pl.cdiv(flat.shape[0], rows),),
    in_specs=[spec, pl.BlockSpec((LANES, LANES), lambda i: (0, 0))],
    out_specs=spec,
    out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
    scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM),
    name="hadamard",
  )(flat, jnp.asarray(_signs(), jnp.bfloat16))
  return y.reshape(x.shape)


def _forward(x: jax.Array) -> tuple[jax.Array, None]:
  return transform(x), None


def _backward(kept: None, g: jax.Array) -> tuple[jax.Array]:
  del kept
  return (transform(g),)


transform.defvjp(_forward, _backward)


@functools.lru_cache(maxsize=1)
def _signs() -> np.ndarray:
  return functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * 7)


def _kernel(x_ref: Any, signs_ref: Any, out_ref: Any, mixed_ref: Any, *, rows: int) -> None:
  n = x_ref.shape[1]
  count = n // LANES
  signs = signs_ref[...]
  for i in range(count):
    at = slice(i * LANES, (i + 1) * LANES)
    left, total = x_ref[:, at], None
    for _ in range(1 if x_ref.dtype == jnp.bfloat16 else 3):
      part = left.astype(jnp.bfloat16)
      y = jnp.dot(part, signs, preferred_element_type=jnp.float32)
      total = y if total is None else total + y
      left = left - part.astype(left.dtype)
    mixed_ref[:, at] = total

  def mix(step: jax.Array, carry: None) -> None:
    del carry
    chosen = pl.ds(pl.multiple_of(step * ROWS, ROWS), ROWS)
    y = [mixed_ref[chosen, i * LANES : (i + 1) * LANES] for i in range(count)]
    apart = 1
    while apart < count:
      for i in range(count):
        if not i & apart:
          y[i], y[i + apart] = y[i] + y[i + apart], y[i] - y[i + apart]
      apart *= 2
    for i, one in enumerate(y):
      out_ref[chosen, i * LANES : (i + 1) * LANES] = (one * n**-0.5).astype(out_ref.dtype)

  lax.fori_loop(0, rows // ROWS, mix, None)
