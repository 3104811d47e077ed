# SPDX-License-Identifier: Apache-2.0
"""`transform(x)`: `core.hadamard.transform`, on a TPU by a kernel where there is one."""

import jax
from jaxtyping import Array, Float

from treesurgeon.core import hadamard
from treesurgeon.kernels.hadamard import tpu


def transform(
  x: Float[Array, "*batch n"], *, implementation: str | None = None
) -> Float[Array, "*batch n"]:
  """Multiply by `core.hadamard.matrix(n)` from the right.

  Args:
    x: any vectors.
    implementation: "tpu" or "xla"; None takes the kernel on a TPU, for powers of two.

  Returns:
    x H in the dtype of `x`; sums are float32.

  Raises:
    ValueError: for an implementation that cannot; it says which can.

  Example:
    >>> import jax.numpy as jnp
    >>> transform(jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]

  Reference:
    Fino and Algazi, Unified matrix treatment of the fast Walsh-Hadamard transform, 1976.
  """
  reason = tpu.unsupported(x)
  if implementation not in (None, "tpu", "xla") or (implementation == "tpu" and reason):
    reason = reason if implementation == "tpu" else "it is unknown"
    raise ValueError(
      f"implementation={implementation!r} cannot transform {x.dtype.name}{list(x.shape)}: "
      f"{reason}; supported: {'xla' if tpu.unsupported(x) else 'tpu, xla'}"
    )
  if implementation == "tpu":
    return tpu.transform(x)
  if implementation == "xla" or reason:
    return hadamard.transform(x)
  # Decided when the program is lowered, so that one compiled ahead for a TPU has the kernel.
  return jax.lax.platform_dependent(x, tpu=tpu.transform, default=hadamard.transform)
